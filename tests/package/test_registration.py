"""Registration of the strategy's names by installation alone, without breaking programs that do not use them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.package.conftest import FreshEnvironment, copy_of_project
from tests.processes import OF_A_LAUNCHER

LIVE = ["async_localsgd", "async_localsgd_fork", "async_localsgd_notebook", "async_localsgd_spawn"]
NAMES = sorted([*LIVE, "async_localsgd_simulated"])

PRINT_NAMES = """
import json, sys
{imports}
from lightning.pytorch.strategies import StrategyRegistry
print(json.dumps(sorted(name for name in StrategyRegistry.available_strategies() if "async_localsgd" in name)))
"""

FIT = """
import os, sys
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

if __name__ == "__main__":
    assert "lightning_async_localsgd" not in sys.modules
    trainer = pl.Trainer(
        strategy=sys.argv[1], devices=int(sys.argv[2]), accelerator="cpu", max_steps=8, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    rank = os.environ.get("LOCAL_RANK", "0")
    print(rank, type(trainer.strategy).__module__, type(trainer.strategy).__name__, trainer.state.finished, flush=True)
"""


LOOK_UP = """
import torch, lightning.pytorch as pl
pl.Trainer(strategy="ddp", devices=1, accelerator="cpu", logger=False, enable_checkpointing=False)
try:
    pl.Trainer(strategy="async_localsgd")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def names(environment: FreshEnvironment, imports: str = "", **variables: str) -> list[str]:
    return json.loads(environment.output("-c", PRINT_NAMES.format(imports=imports), **variables))


def test_without_the_package_no_names_are_registered(bare: FreshEnvironment) -> None:
    assert names(bare) == []


@pytest.mark.parametrize("imports", ["", "import torch", "import lightning as L"])
def test_names_are_registered_without_an_import(with_wheel: FreshEnvironment, imports: str) -> None:
    assert names(with_wheel, f"{imports}\nassert 'lightning_async_localsgd' not in sys.modules") == NAMES


def test_without_autoload_of_torch_names_need_an_import(with_wheel: FreshEnvironment) -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert names(with_wheel, **off) == []
    assert names(with_wheel, "import lightning_async_localsgd, lightning.pytorch", **off) == NAMES
    assert names(with_wheel, "import lightning.pytorch, lightning_async_localsgd", **off) == NAMES


def test_names_are_registered_by_an_import_from_the_search_path(bare: FreshEnvironment, tmp_path: Path) -> None:
    source = copy_of_project(tmp_path / "checkout") / "src"
    assert names(bare, "import lightning_async_localsgd", PYTHONPATH=str(source)) == NAMES


def test_registration_survives_a_reload_and_keeps_lightnings_loader(with_wheel: FreshEnvironment) -> None:
    code = """
import importlib, inspect
import lightning.pytorch.strategies as strategies
assert type(strategies.__spec__.loader) is importlib.machinery.SourceFileLoader
assert "DDPStrategy" in inspect.getsource(strategies)
importlib.reload(strategies)
"""
    assert names(with_wheel, code) == NAMES


def test_trainer_accepts_the_name(installed: FreshEnvironment, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FIT)
    output = installed.output(script, "async_localsgd", "1")
    assert "0 lightning_async_localsgd.lightning.strategy AsyncLocalSGDStrategy True" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["async_localsgd", "async_localsgd_spawn"])
def test_every_rank_accepts_the_name(with_wheel: FreshEnvironment, tmp_path: Path, name: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(FIT)
    output = with_wheel.output(script, name, "2")
    assert "0 lightning_async_localsgd.lightning.strategy AsyncLocalSGDStrategy True" in output
    if name == "async_localsgd":  # Spawned processes do not run the last lines of the script.
        assert "1 lightning_async_localsgd.lightning.strategy AsyncLocalSGDStrategy True" in output


def test_import_of_the_package_imports_neither_torch_nor_lightning(with_wheel: FreshEnvironment) -> None:
    code = "import sys, lightning_async_localsgd; print(sorted({'torch', 'lightning', 'zmq'} & set(sys.modules)))"
    assert with_wheel.output("-c", code).strip() == "[]"


def test_broken_package_is_reported_when_the_strategy_is_looked_up(
    make_environment: Callable[[], FreshEnvironment],
) -> None:
    environment = make_environment()
    (environment.site_packages / "lightning_async_localsgd" / "__init__.py").write_text("raise OSError('on purpose')")
    assert environment.output("-c", LOOK_UP) == "OSError: on purpose\n"


def test_missing_checkout_is_reported_when_the_strategy_is_looked_up(tmp_path: Path) -> None:
    environment = FreshEnvironment(tmp_path / "env")
    checkout = copy_of_project(tmp_path / "checkout")
    environment.install("--editable", checkout)
    shutil.rmtree(checkout)
    assert environment.output("-c", LOOK_UP) == "ModuleNotFoundError: No module named 'lightning_async_localsgd'\n"


@pytest.mark.parametrize("broken", ["_Finder", "_register_after_import", "_register", "START_METHODS"])
def test_failing_registration_is_one_line_in_the_log(with_wheel: FreshEnvironment, broken: str) -> None:
    sabotage = f"import lightning_async_localsgd_autoload as broken\nbroken.{broken} = None\n"
    done = with_wheel.run("-c", sabotage + LOOK_UP)
    assert done.returncode == 0, done.stderr
    assert "ValueError: You selected an invalid strategy name" in done.stdout
    assert done.stderr.count("registering strategy='async_localsgd' with Lightning failed") == 1


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(("environment", "rank"), [({}, 0), ({"ASYNC_LOCALSGD_JOIN": "tcp://host:1"}, 1)])
def test_process_that_joins_a_run_is_never_rank_0(package: str, environment: dict[str, str], rank: int) -> None:
    """Lightning #11380: what a script does on rank 0 only, it also does before there is a trainer."""
    code = (
        "import lightning_async_localsgd_autoload\nlightning_async_localsgd_autoload.install()\n"
        f"import {package}\nfrom {package}.utilities import rank_zero_only\nprint('rank', rank_zero_only.rank)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"rank {rank}"


def test_any_class_can_be_registered() -> None:
    # Imported here, because the other tests in this file run in environments of their own.
    from lightning.fabric.strategies.registry import _StrategyRegistry

    from lightning_async_localsgd.lightning.registration import register_names, register_simulated

    class Mine:
        def __init__(self, start_method: str) -> None:
            self.start_method = start_method

    registry = _StrategyRegistry()
    registry.register("async_localsgd", object)
    register_names(registry, Mine)
    assert sorted(registry.available_strategies()) == LIVE
    built = {name: registry.get(name) for name in LIVE}
    assert all(isinstance(strategy, Mine) for strategy in built.values())
    assert [built[name].start_method for name in LIVE] == ["popen", "fork", "fork", "spawn"]
    register_simulated(registry, dict)
    assert sorted(registry.available_strategies()) == NAMES
    assert registry.get("async_localsgd_simulated") == {}


def test_public_names_are_exported() -> None:
    import lightning_async_localsgd as package

    exports: Any = package
    for name in package.__all__:
        assert getattr(exports, name).__name__ == name
        assert name in dir(exports)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = exports.Nothing
