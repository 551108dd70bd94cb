"""A project that imports ``pytorch_lightning`` gets the same strategy, of classes that belong there."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pickle
import re
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import yaml

import lightning_async_localsgd as ours
import lightning_async_localsgd.pytorch_lightning as theirs
from lightning_async_localsgd import twin
from tests.package.conftest import FreshEnvironment

TREES = [(lightning.pytorch, ours), (pytorch_lightning, theirs)]
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 4}
QUIET |= {"enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}


# ------------------------------------------------------------------------------------------------ in one process


@pytest.mark.parametrize("name", sorted(twin.twins()))
def test_a_module_has_nothing_of_the_other_package(name: str) -> None:
    first, second = (vars(importlib.import_module(module)) for module in (name, twin.counterpart(name)))
    for attribute, value in second.items():
        home = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
        assert home.split(".")[0] != "lightning", attribute
        assert home not in twin.twins(), attribute
    names = [
        # Of a package, which modules of its own have been imported by now is no matter.
        {key for key, value in module.items() if not key.startswith("__") and not _is_part(value, module["__name__"])}
        for module in (first, second)
    ]
    assert names[0] == names[1]


def _is_part(value: object, package: str) -> bool:
    return isinstance(value, ModuleType) and value.__name__.startswith(f"{package}.")


def test_what_needs_lightning_is_found_out() -> None:
    found = {name.removeprefix("lightning_async_localsgd.") for name in twin.twins()}
    assert {"simulation", "simulation.strategy", "simulation.data", "simulation.training"} <= found
    assert {"strategy", "callback", "emulation", "launcher", "schedules", "trainer_parts"} <= found
    # These know of Lightning for type checkers at most, and hold what belongs to the process.
    assert not {"simulation.devices", "simulation.cluster", "simulation.replay", "simulation.phase"} & found
    assert not {"phase", "children", "rendezvous", "outer", "twin", "registration"} & found


def test_both_have_the_same_names_and_share_what_needs_no_lightning() -> None:
    assert sorted(theirs.__all__) == sorted(ours.__all__)
    own = {"AsyncLocalSGDCallback", "AsyncLocalSGDStrategy", "EmulatedDevices", "FaultInjection"}
    own.add("SimulatedAsyncLocalSGDStrategy")
    for name in ours.__all__:
        assert (getattr(theirs, name) is getattr(ours, name)) == (name not in own), name
        assert name in dir(theirs)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = theirs.Nothing


@pytest.mark.parametrize(("lightning", "package"), TREES, ids=["lightning", "pytorch_lightning"])
def test_a_trainer_gets_the_class_of_its_package(lightning: Any, package: Any, tmp_path: Path) -> None:
    boring = importlib.import_module(f"{lightning.__name__}.demos.boring_classes")
    callback = package.AsyncLocalSGDCallback(table=False)
    by_name = lightning.Trainer(strategy="async_localsgd", default_root_dir=tmp_path, callbacks=[callback], **QUIET)
    assert type(by_name.strategy) is package.AsyncLocalSGDStrategy
    assert isinstance(by_name.strategy, lightning.strategies.Strategy)
    by_name.fit(boring.BoringModel())
    assert by_name.global_step == 4
    assert [type(c) for c in by_name.callbacks].count(package.AsyncLocalSGDCallback) == 1


@pytest.mark.parametrize(("lightning", "package"), TREES, ids=["lightning", "pytorch_lightning"])
def test_a_trainer_finds_the_simulated_strategy_of_its_package(lightning: Any, package: Any, tmp_path: Path) -> None:
    boring = importlib.import_module(f"{lightning.__name__}.demos.boring_classes")
    trainer = lightning.Trainer(strategy="async_localsgd_simulated", default_root_dir=tmp_path, **QUIET)
    assert type(trainer.strategy) is package.SimulatedAsyncLocalSGDStrategy
    assert isinstance(trainer.strategy, package.AsyncLocalSGDStrategy)
    trainer.fit(boring.BoringModel())
    assert trainer.global_step == 4


def test_a_callback_of_the_other_package_is_refused_with_the_right_one() -> None:
    module = importlib.import_module("pytorch_lightning.demos.boring_classes").BoringModel()
    trainer = pytorch_lightning.Trainer(
        strategy="async_localsgd", callbacks=[ours.AsyncLocalSGDCallback(ledger="never.jsonl")], **QUIET
    )
    right = r"import lightning_async_localsgd\.pytorch_lightning\.AsyncLocalSGDCallback"
    with pytest.raises(ValueError, match=right):
        trainer.fit(module)


def test_the_strategy_of_the_other_package_is_named_with_the_right_one() -> None:
    right = r"pytorch_lightning.Trainer there is lightning_async_localsgd\.pytorch_lightning\.AsyncLocalSGDStrategy"
    with pytest.raises(ValueError, match=rf"AsyncLocalSGDStrategy for lightning\.pytorch\.Trainer; for {right}"):
        pytorch_lightning.Trainer(strategy=ours.AsyncLocalSGDStrategy(), **QUIET)
    right = r"lightning\.pytorch\.Trainer there is lightning_async_localsgd\.AsyncLocalSGDStrategy"
    with pytest.raises(ValueError, match=rf"AsyncLocalSGDStrategy for pytorch_lightning\.Trainer; for {right}"):
        lightning.pytorch.Trainer(strategy=theirs.AsyncLocalSGDStrategy(), **QUIET)


def test_classes_are_pickled_by_name_and_show_their_source() -> None:
    strategy = theirs.AsyncLocalSGDStrategy
    assert pickle.loads(pickle.dumps(strategy)) is strategy
    assert strategy.__module__ == "lightning_async_localsgd.pytorch_lightning.strategy"
    assert inspect.getsourcefile(strategy) == inspect.getsourcefile(ours.AsyncLocalSGDStrategy)
    assert inspect.getsource(strategy) == inspect.getsource(ours.AsyncLocalSGDStrategy)
    with pytest.raises(ValueError, match="local_steps") as caught:
        strategy(local_steps=0)
    lines = [
        frame for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename.endswith("strategy.py")
    ]
    assert lines[0].line is not None
    assert "SpeedAwareSteps(" in lines[0].line


@pytest.mark.parametrize(
    ("statement", "becomes"),
    [
        ("import lightning as L", "import pytorch_lightning as L"),
        ("import lightning.pytorch as pl", "import pytorch_lightning as pl"),
        ("import torch, lightning.fabric.utilities as u", "import torch, lightning_fabric.utilities as u"),
        ("from lightning import Trainer", "from pytorch_lightning import Trainer"),
        ("from lightning.pytorch.callbacks import A, B as C", "from pytorch_lightning.callbacks import A, B as C"),
        ("from lightning_utilities.core import x", "from lightning_utilities.core import x"),
        (
            "import lightning_async_localsgd.callback as c",
            "import lightning_async_localsgd.pytorch_lightning.callback as c",
        ),
        ("import lightning_async_localsgd.phase", "import lightning_async_localsgd.phase"),
        (
            "from lightning_async_localsgd import phase, callback, EmulatedDevices, outer as o, ExchangeOptions",
            "from lightning_async_localsgd import phase, outer as o, ExchangeOptions\n"
            "from lightning_async_localsgd.pytorch_lightning import callback, EmulatedDevices",
        ),
        (
            "from lightning_async_localsgd.launcher import AsyncScriptLauncher",
            "from lightning_async_localsgd.pytorch_lightning.launcher import AsyncScriptLauncher",
        ),
        ("from lightning_async_localsgd.outer import base, x", "from lightning_async_localsgd.outer import base, x"),
    ],
)
def test_import_statements_lead_to_the_other_package(statement: str, becomes: str) -> None:
    for indented in ("", "def f():\n    ", "if TYPE_CHECKING:\n    "):
        tree = twin._Redirect("a.py").visit(ast.parse(indented + statement))
        wanted = "\n".join(("    " if indented else "") + line for line in becomes.splitlines())
        assert ast.unparse(tree) == indented.removesuffix("    ") + wanted


@pytest.mark.parametrize(
    ("statement", "instead"),
    [
        ("import lightning", "import lightning as ..."),
        ("import lightning.pytorch.callbacks", "import lightning.pytorch.callbacks as ..."),
        ("import lightning_async_localsgd.strategy", "import lightning_async_localsgd.strategy as ..."),
        ("from lightning import pytorch as pl", "import lightning.pytorch as ..."),
        ("from . import strategy", "from lightning_async_localsgd.... import ..."),
    ],
)
def test_what_cannot_be_led_elsewhere_is_refused(statement: str, instead: str) -> None:
    with pytest.raises(ImportError, match=r"a\.py:2") as caught:
        twin._Redirect("a.py").visit(ast.parse(f"\n{statement}"))
    assert f"write `{instead}`" in str(caught.value)


# -------------------------------------------------------------------------------------- in separate environments

# What a user's language model may look like: the import statements are all that tells the two packages apart.
LANGUAGE_MODEL = '''
"""A language model on the sources of Python's standard library, byte by byte."""

import json
import os
import time
from pathlib import Path

import torch
from {root} import Callback, LightningDataModule, LightningModule
from {root}.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Bytes(LightningDataModule):
    def setup(self, stage):
        text = Path(json.__file__).read_bytes()[:33 * 256]
        self.windows = TensorDataset(torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 33))

    def train_dataloader(self):
        return DataLoader(self.windows, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.windows, batch_size=32)


class LanguageModel(LightningModule):
    def __init__(self, width: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def loss(self, batch):
        tokens = batch[0]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1] - 1)
        states = self.transformer(self.embedding(tokens[:, :-1]), mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Uneven(Callback):
    def on_train_batch_end(self, trainer, *_):
        time.sleep((0.01, 0.05)[trainer.global_rank])


class CLI(LightningCLI):
    def before_fit(self):
        self.trainer.callbacks.insert(0, Uneven())

    def after_fit(self):
        [result] = self.trainer.validate(self.model, self.datamodule, verbose=False)
        weights = float(sum(p.detach().double().abs().sum() for p in self.model.parameters()))
        kind = type(self.trainer.strategy)
        bases = sorted({{base.__module__.split(".")[0] for base in kind.__mro__}})
        seen = {{"module": kind.__module__, "bases": bases, "loss": result["val_loss"], "weights": weights}}
        # One write, which another rank's cannot come into.
        os.write(1, ("\\nSEEN " + json.dumps(seen) + "\\n").encode())


if __name__ == "__main__":
    CLI(LanguageModel, Bytes, seed_everything_default=0)
'''

CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  max_steps: 30
  num_sanity_val_steps: 0
  enable_progress_bar: false
  logger:
    class_path: {root}.loggers.CSVLogger
    init_args: {{save_dir: {folder}}}
  strategy: {strategy}
"""
WITH_OPTIONS = """
    class_path: {home}.AsyncLocalSGDStrategy
    init_args:
      local_steps: 5
      outer_optimizer:
        class_path: lightning_async_localsgd.DelayedNesterov
        init_args: {{lr: 0.5}}
      exchange: {{transport: tcp}}
  callbacks:
    - class_path: {home}.AsyncLocalSGDCallback
      init_args: {{table: false}}
    - class_path: {home}.EmulatedDevices
      init_args: {{seconds_per_step: [0.005, 0.01]}}
"""
HOMES = {
    "lightning.pytorch": "lightning_async_localsgd",
    "pytorch_lightning": "lightning_async_localsgd.pytorch_lightning",
}


def environment_of(request: pytest.FixtureRequest, root: str) -> FreshEnvironment:
    return request.getfixturevalue("with_wheel" if root == "lightning.pytorch" else "without_lightning")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("root", "strategy"),
    [
        ("lightning.pytorch", "options"),
        ("pytorch_lightning", "options"),
        ("pytorch_lightning", "name"),
        ("pytorch_lightning", "name, spawn"),
    ],
)
def test_a_language_model_trains(request: pytest.FixtureRequest, tmp_path: Path, root: str, strategy: str) -> None:
    environment = environment_of(request, root)
    home = HOMES[root]
    chosen = {
        "name": "async_localsgd",
        "name, spawn": "async_localsgd_spawn",
        "options": WITH_OPTIONS.format(home=home),
    }
    (tmp_path / "train.py").write_text(LANGUAGE_MODEL.format(root=root))
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=root, folder=tmp_path, strategy=chosen[strategy]))
    output = environment.output(tmp_path / "train.py", "fit", f"--config={tmp_path / 'config.yaml'}")
    seen = [json.loads(line.removeprefix("SEEN ")) for line in output.splitlines() if line.startswith("SEEN")]
    # Spawned ranks don't come back to the script's end.
    assert len(seen) == (1 if "spawn" in strategy else 2), output
    assert all(rank == seen[0] for rank in seen)
    assert seen[0]["module"] == f"{home}.strategy"
    assert root.split(".")[0] in seen[0]["bases"]
    assert {"lightning", "pytorch_lightning"} - {root.split(".")[0]} - set(seen[0]["bases"])
    assert seen[0]["loss"] < 5.0, "5.5 is a guess"
    [summary] = [json.loads(path.read_text()) for path in tmp_path.rglob("async_localsgd_summary.json")]
    assert sum(worker["steps"] for worker in summary["workers"]) == 60


def test_without_lightning_the_package_is_that_of_pytorch_lightning(without_lightning: FreshEnvironment) -> None:
    code = """
import lightning_async_localsgd as package
import lightning_async_localsgd.pytorch_lightning as theirs
assert all(getattr(package, name) is getattr(theirs, name) for name in package.__all__)
try:
    import lightning.pytorch
except ModuleNotFoundError:
    print(package.AsyncLocalSGDStrategy.__module__)
"""
    assert without_lightning.output("-c", code) == "lightning_async_localsgd.pytorch_lightning.strategy\n"


def test_a_folder_called_lightning_is_not_lightning(without_lightning: FreshEnvironment, tmp_path: Path) -> None:
    (tmp_path / "lightning").mkdir()
    code = "import lightning, lightning_async_localsgd as package; print(package.AsyncLocalSGDCallback.__module__)"
    output = without_lightning.output("-c", code, PYTHONPATH=str(tmp_path))
    assert output == "lightning_async_localsgd.pytorch_lightning.callback\n"


def test_the_command_line_knows_the_types_of_all_options(without_lightning: FreshEnvironment, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LANGUAGE_MODEL.format(root="pytorch_lightning"))
    path = f"{HOMES['pytorch_lightning']}.AsyncLocalSGDStrategy"
    options = [f"--trainer.strategy={path}", "--trainer.strategy.local_steps=7", "--trainer.accelerator=cpu"]
    text = without_lightning.output(script, "fit", *options, "--print_config")
    strategy = yaml.safe_load(text)["trainer"]["strategy"]
    assert strategy["class_path"] == path
    assert strategy["init_args"].keys() == inspect.signature(ours.AsyncLocalSGDStrategy).parameters.keys()
    text = without_lightning.output(script, "fit", f"--trainer.strategy.help={path}", COLUMNS="400")
    # "--trainer.strategy.accelerator ACCELERATOR   What it is for. (type: ..., known subclasses: ...)"
    entries = re.split(r"\n\s+(?=--)", text)
    for option, known in (
        ("accelerator", "pytorch_lightning.accelerators.CPUAccelerator"),
        ("cluster_environment", "lightning_fabric.plugins.environments.LightningEnvironment"),
        ("checkpoint_io", "pytorch_lightning.plugins.AsyncCheckpointIO"),
        ("precision_plugin", "pytorch_lightning.plugins.MixedPrecision"),
    ):
        [entry] = [one for one in entries if re.match(rf"--(\S+\.)?{option} ", one)]
        assert known in entry.split("(type:")[1]
