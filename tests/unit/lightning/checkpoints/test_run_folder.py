"""The folder of a run, and the checkpoint from which a run resumes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async_localsgd.launch import run_name
from lightning_async_localsgd.lightning.checkpoints import run_folder
from lightning_async_localsgd.lightning.checkpoints.run_folder import newest_checkpoint, prepare_fit
from lightning_async_localsgd.runtime.durable import write
from tests.lightning_models import quiet_trainer

VARIABLES = ("ASYNC_LOCALSGD_RUN", "ASYNC_LOCALSGD_RESUME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
             "GROUP_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT")  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # Remembers the original value, even if the code under test sets the variable.
        monkeypatch.delenv(name)
    monkeypatch.setattr(run_name, "_fits", 0)
    yield
    os.environ.pop("ASYNC_LOCALSGD_RUN", None)


def checkpoint(folder: Path, rounds: int, age: float = 0.0) -> Path:
    path = write(folder, f"rounds={rounds:06d}", ".ckpt", lambda file: torch.save({"rounds": rounds}, file))
    set_age(path, age)
    return path


def set_age(path: Path, age: float) -> None:
    os.utime(path, (1e9 - age, 1e9 - age))


def trainer_of(root: Path, *callbacks: L.Callback) -> L.Trainer:
    return quiet_trainer(default_root_dir=root, callbacks=[*callbacks], enable_checkpointing=bool(callbacks))


def chosen(trainer: L.Trainer, ckpt_path: Any) -> Any:
    """Return the checkpoint from which ``fit(ckpt_path=ckpt_path)`` resumes."""
    arguments = prepare_fit(trainer, ("model", "train", "valid", "data", ckpt_path, True))
    assert arguments[:4] == ("model", "train", "valid", "data")
    assert arguments[5] is True
    return arguments[4]


# -------------------------------------------------------------------------- folders of fits


def test_each_fit_of_a_script_has_its_own_folder(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    names = []
    for restarted in (False, True, False):
        prepare_fit(trainer, ("model", None, None, None, None, None), restarted=restarted)
        names.append(trainer.strategy.run_name)  # type: ignore[attr-defined]
    assert names[0] == names[1]
    assert names[2] == f"{names[0]}.2"


def test_fits_of_both_packages_have_different_folders(tmp_path: Path) -> None:
    import pytorch_lightning
    from lightning_async_localsgd.pytorch_lightning.checkpoints.run_folder import prepare_fit as prepare_other

    names = []
    for package, prepare in ((L, prepare_fit), (pytorch_lightning, prepare_other)):
        trainer = package.Trainer(
            strategy="async_localsgd", accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        prepare(trainer, ("model", None, None, None, None, None))
        names.append(trainer.strategy.run_name)
    assert names[1] == f"{names[0]}.2"


# ------------------------------------------------------------------------------- newest


def test_newest_intact_checkpoint_is_chosen_and_damaged_ones_are_named(
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


def test_last_is_the_newest_checkpoint_of_all_runs_and_of_lightning(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ModelCheckpoint(tmp_path / "kept", save_last=True))
    assert chosen(trainer, "last") == "last", "Lightning reports that no checkpoint exists"
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


def test_last_is_not_a_checkpoint_of_another_task_of_a_slurm_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning #14893, #20542: the tasks of an array share a script and its folders."""
    runs = tmp_path / "async_localsgd"
    mine = checkpoint(runs / "slurm-6_2", 5, age=100)
    other = checkpoint(runs / "slurm-7_1", 900, age=0)
    trainer = trainer_of(tmp_path)
    assert chosen(trainer, "last") == str(other)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert chosen(trainer, "last") == str(mine)


@pytest.mark.parametrize(
    "variables", [{"ASYNC_LOCALSGD_RESUME": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"}]
)
def test_restarted_script_resumes_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ASYNC_LOCALSGD_RUN", "mine")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = trainer_of(tmp_path)
    runs = tmp_path / "async_localsgd"
    checkpoint(runs / "other", 900, age=0)
    for ckpt_path, beginning in (
        (None, "from the beginning"),
        ("some.ckpt", "with ckpt_path='some.ckpt'"),
        ("last", "with ckpt_path='last'"),
    ):
        monkeypatch.setattr(run_name, "_fits", 0)
        caplog.clear()
        assert chosen(trainer, ckpt_path) == ckpt_path, "this run has no checkpoint"
        assert "the restarted run mine has no checkpoint" in caplog.text
        assert beginning in caplog.text
    caplog.clear()
    mine = checkpoint(runs / "mine", 5, age=100)
    for ckpt_path in (None, "some.ckpt", "last"):
        monkeypatch.setattr(run_name, "_fits", 0)
        assert chosen(trainer, ckpt_path) == str(mine)
    # The checkpoint that Lightning saves before the time limit of SLURM is newer.
    hpc = tmp_path / "hpc_ckpt_1.ckpt"
    torch.save({}, hpc)
    set_age(hpc, 50)
    monkeypatch.setattr(run_name, "_fits", 0)
    assert chosen(trainer, None) is None
    mine.unlink()
    monkeypatch.setattr(run_name, "_fits", 0)
    assert chosen(trainer, None) is None
    assert "has no checkpoint" not in caplog.text, "Lightning itself resumes from that file"


def test_restarted_nodes_of_torchrun_find_the_checkpoint_of_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = trainer_of(tmp_path)
    for name, value in {"RUN_ID": "job", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    expected = checkpoint(tmp_path / "async_localsgd" / "torchrun-job-1", 5)
    checkpoint(tmp_path / "async_localsgd" / "torchrun-job-1.2", 50)
    assert chosen(trainer, None) == str(expected)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("ASYNC_LOCALSGD_RUN")
    monkeypatch.setattr(run_name, "_fits", 0)
    assert chosen(trainer, None) is None
    assert any("--rdzv-id" in str(warning.message) for warning in recwarn)


def test_root_folder_that_is_not_local_has_no_runs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer._default_root_dir = "s3://bucket/path"
    with pytest.warns(UserWarning, match="default_root_dir='s3://bucket/path'"):
        assert run_folder.folder_of(trainer) is None
    assert chosen(trainer, "last") == "last"
