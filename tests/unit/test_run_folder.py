"""Which folder is a run's, and which checkpoint it goes on from."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async_localsgd import run_folder
from lightning_async_localsgd.durable import write
from lightning_async_localsgd.run_folder import newest_checkpoint, prepare_fit, settle_name

VARIABLES = ("ASYNC_LOCALSGD_RUN", "ASYNC_LOCALSGD_RESUME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
             "GROUP_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT")  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # So that it is put back afterwards, whoever changes it.
        monkeypatch.delenv(name)
    monkeypatch.setattr(run_folder, "_fits", 0)
    yield
    os.environ.pop("ASYNC_LOCALSGD_RUN", None)


def checkpoint(folder: Path, rounds: int, age: float = 0.0) -> Path:
    path = write(folder, f"rounds={rounds:06d}", ".ckpt", lambda file: torch.save({"rounds": rounds}, file))
    set_age(path, age)
    return path


def set_age(path: Path, age: float) -> None:
    os.utime(path, (1e9 - age, 1e9 - age))


def trainer_of(root: Path, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        strategy="async_localsgd", accelerator="cpu", devices=1, default_root_dir=root, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
        enable_checkpointing=bool(callbacks),
    )  # fmt: skip


def chosen(trainer: L.Trainer, asked: Any) -> Any:
    """What ``fit(ckpt_path=asked)`` goes on from."""
    arguments = prepare_fit(trainer, ("model", "train", "valid", "data", asked, True))
    assert arguments[:4] == ("model", "train", "valid", "data")
    assert arguments[5] is True
    return arguments[4]


# ------------------------------------------------------------------------------- names


def test_a_name_is_settled_once_and_inherited() -> None:
    name = settle_name()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{os.getpid()}", name)
    assert os.environ["ASYNC_LOCALSGD_RUN"] == settle_name() == name


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ASYNC_LOCALSGD_RUN": "mine", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "mine"),
        ({"TORCHELASTIC_RUN_ID": "job"}, f"torchrun-job-{os.getppid()}"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "slurm-7"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, None),
        ({"SLURM_JOB_ID": "7"}, None),
    ],
)
def test_who_started_the_script_names_the_run(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str | None
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    found = settle_name()
    assert found == name or (name is None and found.endswith(f"-{os.getpid()}"))


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".."])
def test_a_name_is_no_path(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ASYNC_LOCALSGD_RUN", name)
    with pytest.raises(ValueError, match="ASYNC_LOCALSGD_RUN="):
        settle_name()


def test_each_fit_of_a_script_has_a_folder_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    names = []
    for again in (False, True, False):
        prepare_fit(trainer, ("model", None, None, None, None, None), again=again)
        names.append(trainer.strategy.run_name)  # type: ignore[attr-defined]
    assert names[0] == names[1]
    assert names[2] == f"{names[0]}.2"


# ------------------------------------------------------------------------ newest valid


def test_the_newest_complete_one_is_found_and_damaged_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(tmp_path) is None
    oldest, older, newest = (checkpoint(tmp_path / "run", rounds, 9 - rounds) for rounds in (1, 2, 3))
    (tmp_path / "run" / ".unfinished-1").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == newest_checkpoint(tmp_path / "run") == newest
    with caplog.at_level(logging.WARNING):
        newest.write_bytes(newest.read_bytes()[:-1])
        set_age(newest, 6)
        assert newest_checkpoint(tmp_path) == older
    assert f"{newest} is damaged" in caplog.text
    older.unlink()
    assert newest_checkpoint(tmp_path) == oldest


# ------------------------------------------------------------------------------- last


def test_last_is_the_newest_of_all_runs_and_of_lightnings_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ModelCheckpoint(tmp_path / "kept", save_last=True))
    assert chosen(trainer, "last") == "last", "Lightning says that there is none"
    first = checkpoint(tmp_path / "async_localsgd" / "first", 500, age=100)
    second = checkpoint(tmp_path / "async_localsgd" / "second", 20, age=50)
    assert chosen(trainer, "last") == str(second)
    assert chosen(trainer, None) is None
    assert chosen(trainer, "some.ckpt") == "some.ckpt"
    own = tmp_path / "kept" / "last.ckpt"
    own.parent.mkdir()
    torch.save({}, own)
    set_age(own, 10)
    assert chosen(trainer, "last") == "last"
    set_age(own, 70)
    assert chosen(trainer, "last") == str(second)
    second.write_bytes(b"")
    set_age(second, 50)
    assert chosen(trainer, "last") == "last"
    set_age(own, 200)
    assert chosen(trainer, "last") == str(first)


@pytest.mark.parametrize(
    "variables", [{"ASYNC_LOCALSGD_RESUME": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"}]
)
def test_a_script_that_is_started_again_goes_on_with_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ASYNC_LOCALSGD_RUN", "mine")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = trainer_of(tmp_path)
    runs = tmp_path / "async_localsgd"
    checkpoint(runs / "other", 900, age=0)
    for asked, said in (
        (None, "from the beginning"),
        ("some.ckpt", "with ckpt_path='some.ckpt'"),
        ("last", "with ckpt_path='last'"),
    ):
        monkeypatch.setattr(run_folder, "_fits", 0)
        caplog.clear()
        assert chosen(trainer, asked) == asked, "this run has left nothing"
        assert "the run mine was started again, and had not saved itself" in caplog.text
        assert said in caplog.text
    caplog.clear()
    mine = checkpoint(runs / "mine", 5, age=100)
    for asked in (None, "some.ckpt", "last"):
        monkeypatch.setattr(run_folder, "_fits", 0)
        assert chosen(trainer, asked) == str(mine)
    # What a checkpoint of the manager's own signal holds is newer.
    hpc = tmp_path / "hpc_ckpt_1.ckpt"
    torch.save({}, hpc)
    set_age(hpc, 50)
    monkeypatch.setattr(run_folder, "_fits", 0)
    assert chosen(trainer, None) is None
    mine.unlink()
    monkeypatch.setattr(run_folder, "_fits", 0)
    assert chosen(trainer, None) is None
    assert "had not saved itself" not in caplog.text, "Lightning itself goes on from that"


def test_restarted_nodes_of_torchrun_find_what_the_one_with_rank_0_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = trainer_of(tmp_path)
    for name, value in {"RUN_ID": "job", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    left = checkpoint(tmp_path / "async_localsgd" / "torchrun-job-1", 5)
    checkpoint(tmp_path / "async_localsgd" / "torchrun-job-1.2", 50)
    assert chosen(trainer, None) == str(left)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("ASYNC_LOCALSGD_RUN")
    monkeypatch.setattr(run_folder, "_fits", 0)
    assert chosen(trainer, None) is None
    assert any("--rdzv-id" in str(warning.message) for warning in recwarn)


def test_a_root_that_is_on_no_disk_has_no_runs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer._default_root_dir = "s3://bucket/path"
    with pytest.warns(UserWarning, match="default_root_dir='s3://bucket/path'"):
        assert run_folder.folder_of(trainer) is None
    assert chosen(trainer, "last") == "last"
