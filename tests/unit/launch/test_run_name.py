"""The name of a run and of its fits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from lightning_async_localsgd.launch import run_name
from lightning_async_localsgd.launch.run_name import fit_name, is_restarted

VARIABLES = ("ASYNC_LOCALSGD_RUN", "ASYNC_LOCALSGD_RESUME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
             "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID",
             "SLURM_ARRAY_TASK_ID")  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # Remembers the original value, even if the code under test sets the variable.
        monkeypatch.delenv(name)
    monkeypatch.setattr(run_name, "_fits", 0)
    yield
    os.environ.pop("ASYNC_LOCALSGD_RUN", None)


def test_name_is_chosen_once_and_inherited() -> None:
    name = run_name.run_name()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{os.getpid()}", name)
    assert os.environ["ASYNC_LOCALSGD_RUN"] == run_name.run_name() == name


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ASYNC_LOCALSGD_RUN": "mine", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "mine"),
        ({"TORCHELASTIC_RUN_ID": "job"}, f"torchrun-job-{os.getppid()}"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "slurm-7"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        (
            {"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
            "slurm-7_2",
        ),
    ],
)
def test_name_is_that_of_the_job(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str | None
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    chosen = run_name.run_name()
    assert chosen == name or (name is None and chosen.endswith(f"-{os.getpid()}"))


def test_runs_of_other_tasks_of_an_array_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["slurm-7_2", "slurm-7_2.2", "slurm-6_2", "slurm-7_12", "slurm-7_1.3", "slurm-7", "mine"]
    assert not any(map(run_name.belongs_to_another_task, names))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert [name for name in names if run_name.belongs_to_another_task(name)] == ["slurm-7_12", "slurm-7_1.3"]


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".."])
def test_path_is_rejected_as_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ASYNC_LOCALSGD_RUN", name)
    with pytest.raises(ValueError, match=f"ASYNC_LOCALSGD_RUN='{re.escape(name)}' must be a folder name"):
        run_name.run_name()


def test_later_fits_have_a_number_and_a_restarted_fit_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNC_LOCALSGD_RUN", "mine")
    assert [fit_name(restarted) for restarted in (False, True, False, True)] == ["mine", "mine", "mine.2", "mine.2"]


@pytest.mark.parametrize(
    ("environment", "restarted"),
    [
        ({}, False),
        ({"ASYNC_LOCALSGD_RESUME": "1"}, True),
        ({"ASYNC_LOCALSGD_RESUME": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": ""}, False),
        ({"SLURM_RESTART_COUNT": "2"}, True),
    ],
)
def test_restarted_job_is_recognized(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], restarted: bool
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert is_restarted() == restarted
