"""What trainer_access does for the launchers."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_async_localsgd.lightning.trainer_access import launchers
from tests.unit.lightning.trainer_access.support import Model, at, fit, loader, trainer_with


@pytest.mark.parametrize(
    ("start_method", "launcher"), [("popen", launchers.ScriptLauncher), ("spawn", launchers.ProcessLauncher)]
)
def test_launchers_are_those_of_lightnings_strategies(start_method: Any, launcher: type) -> None:
    strategy = DDPStrategy(start_method=start_method)
    trainer = trainer_with(strategy=strategy, devices=2)
    assert type(trainer.strategy.launcher) is launcher


def test_ranks_can_be_spawned_only_below_the_main_guard(tmp_path: Path) -> None:
    # Lightning looks at a process that multiprocessing is still starting.
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from lightning_async_localsgd.lightning.trainer_access.launchers import check_can_start\n"
        "check_can_start('spawn')\n"
        "process = multiprocessing.get_context('spawn').Process(target=print)\n"
        "process.start()\n"
        "process.join()\n"
    )
    done = subprocess.run([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, check=True)
    assert "__main__" in done.stderr


def test_ranks_cannot_be_forked_with_a_cuda_context(monkeypatch: pytest.MonkeyPatch) -> None:
    launchers.check_can_start("fork")
    # Lightning asks for the one or the other, depending on its release.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA"):
        launchers.check_can_start("fork")
    launchers.check_can_start("spawn")


def test_cores_are_divided_among_the_ranks_unless_omp_num_threads_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        launchers.limit_threads(2)
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        launchers.limit_threads(2 * len(os.sched_getaffinity(0)))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS", None)


def test_hydra_is_recognized() -> None:
    assert launchers.hydra_is_installed() is (subprocess.run([sys.executable, "-c", "import hydra"]).returncode == 0)


def test_global_states_restore_the_random_state() -> None:
    torch.manual_seed(5)
    states = launchers.global_states()
    expected = torch.rand(1)
    torch.manual_seed(6)
    states.restore()
    assert torch.equal(torch.rand(1), expected)


def test_abort_calls_the_exception_hooks_and_tears_the_trainer_down() -> None:
    failure = RuntimeError("the launcher failed")
    seen: list[BaseException] = []

    class Watch(L.Callback):
        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            seen.append(exception)

    trainer = fit(Watch())
    ends: list[bool] = []
    trainer.strategy.teardown = lambda: ends.append(True)  # type: ignore[method-assign]
    launchers.abort(trainer, failure)
    assert seen == [failure]
    assert ends == [True]
    assert trainer.interrupted


def test_position_of_ckpt_path_matches_lightnings_fit() -> None:
    positions: list[int] = []

    def record(trainer: L.Trainer) -> None:
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_name != "_fit_impl":
            frame = frame.f_back
        assert frame is not None
        names = frame.f_code.co_varnames[1 : frame.f_code.co_argcount]
        positions.append(names.index("ckpt_path"))

    callback, _ = at(on_train_start=record)
    trainer = fit(callback)
    assert positions == [launchers.ckpt_path_position(trainer)]


def test_last_checkpoints_of_a_callback_are_found(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(callback, enable_checkpointing=True, default_root_dir=tmp_path)
    assert {str(Path(path)) for path in launchers.last_checkpoints(callback, trainer)} == {str(tmp_path / "last.ckpt")}


def test_hpc_checkpoint_is_found_in_the_default_root(tmp_path: Path) -> None:
    trainer = trainer_with(default_root_dir=tmp_path)
    assert launchers.hpc_checkpoint(trainer) is None
    trainer.fit(Model(), loader(1))
    trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    assert str(launchers.hpc_checkpoint(trainer)) == str(tmp_path / "hpc_ckpt_1.ckpt")


def test_command_runs_the_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from lightning_async_localsgd.lightning.trainer_access.launchers import script_command\n"
        "print(*script_command(), sep=chr(10))\n"
    )
    command = [sys.executable, str(script), "an argument"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines() == [str(command), str(tmp_path)]
    assert launchers.script_command()[1] == os.getcwd()
