"""What trainer_access does to strategies and checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_async_localsgd.lightning.trainer_access import checkpoints, strategy
from tests.unit.lightning.trainer_access.support import Model, fit, trainer_with


def test_launcher_of_a_strategy_runs_the_trainers_function() -> None:
    class Recording(strategy.Launcher):
        functions: list[str]

        @property
        def is_interactive_compatible(self) -> bool:
            return True

        def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
            functions.append(function.__name__)
            return function(*args, **kwargs)

        def kill(self, signum: int) -> None:
            pass

    class Launched(SingleDeviceStrategy):
        def _configure_launcher(self) -> None:
            self._launcher = Recording()

    functions: list[str] = []
    own = Launched(torch.device("cpu"))
    trainer = fit(strategy=own)
    assert functions == ["_fit_impl"]
    assert strategy.strategy_of(trainer) is own  # type: ignore[comparison-overlap] # any strategy


def test_interactive_session_is_recognized() -> None:
    assert not strategy.is_interactive()
    code = "from lightning_async_localsgd.lightning.trainer_access.strategy import is_interactive as x; print(x())"
    session = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.ps1 = '>>> '; {code}"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert session.stdout.split() == ["True"]


def test_synchronization_of_batch_norm_is_removed() -> None:
    for synchronized in (True, False):
        trainer = trainer_with(strategy="ddp", devices=2, sync_batchnorm=synchronized)
        assert isinstance(trainer.strategy, DDPStrategy)
        assert strategy.remove_batch_norm_sync(trainer.strategy) is synchronized
        assert not strategy.remove_batch_norm_sync(trainer.strategy)


def _sync_on(rank: int, address: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    module = torch.nn.BatchNorm1d(1)
    with torch.no_grad():
        module.weight.fill_(rank + 1)
        module.running_mean.fill_(rank + 1)  # type: ignore[union-attr] # a tensor
    strategy.sync_module_states(module)
    torch.save(module.state_dict(), f"{results}/{rank}")
    torch.distributed.destroy_process_group()


def test_all_ranks_get_rank_0s_parameters_and_buffers(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sync_on, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in (0, 1):
        state = torch.load(tmp_path / str(rank), weights_only=True)
        assert state["weight"].item() == state["running_mean"].item() == 1.0


def test_trainer_of_a_module_is_none_before_the_module_is_attached() -> None:
    module = Model()
    assert strategy.trainer_of(None) is None
    assert strategy.trainer_of(module) is None
    trainer = fit(module=module)
    assert strategy.trainer_of(module) is trainer


def test_dumped_checkpoint_equals_the_saved_checkpoint(tmp_path: Path) -> None:
    class Saves(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["of the hook"] = 7

    trainer = fit(module=Saves())
    dumped = checkpoints.dump_checkpoint(trainer)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"} <= dumped.keys()
    assert dumped["of the hook"] == 7
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert saved.keys() == dumped.keys()
    assert saved["loops"] == dumped["loops"]
