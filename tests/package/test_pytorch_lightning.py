"""Projects that import ``pytorch_lightning`` get the same strategy, with classes of that package."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys
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
from lightning_async_localsgd.pytorch_lightning import _mirror
from tests.package.conftest import PROJECT, FreshEnvironment

TREES = [(lightning.pytorch, ours), (pytorch_lightning, theirs)]
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 4}
QUIET |= {"enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}


# ------------------------------------------------------------------------------------------------ in one process


MODULES = sorted(
    ".".join(("lightning_async_localsgd", *path.relative_to(_mirror.FOLDER.parent).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in _mirror.FOLDER.rglob("*.py")
    if path.parent != _mirror.FOLDER or path.name != "__init__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_mirrored_module_has_no_names_of_the_other_package(name: str) -> None:
    first, second = (vars(importlib.import_module(module)) for module in (name, _mirror.counterpart(name)))
    for attribute, value in second.items():
        home = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
        assert home.split(".")[0] != "lightning", attribute
        assert home not in MODULES, attribute
    names = [
        # A package also has a name for each of its modules that was imported.
        {key for key, value in module.items() if not key.startswith("__") and not _is_part(value, module["__name__"])}
        for module in (first, second)
    ]
    assert names[0] == names[1]


def _is_part(value: object, package: str) -> bool:
    return isinstance(value, ModuleType) and value.__name__.startswith(f"{package}.")


def test_public_modules_can_be_imported_with_both_prefixes() -> None:
    """Class paths in configuration files may name any public module of both packages."""
    for name in ("faults", "outer", "staleness"):
        shared, named = (importlib.import_module(f"{package.__name__}.{name}") for package in (ours, theirs))
        for attribute in set(dir(shared)) - {"FaultInjection"}:
            assert attribute.startswith("__") or getattr(named, attribute) is getattr(shared, attribute)
    assert importlib.import_module(f"{theirs.__name__}.faults").FaultInjection is theirs.FaultInjection
    assert importlib.import_module(f"{ours.__name__}.faults").FaultInjection is ours.FaultInjection
    for package in (ours, theirs):
        assert importlib.import_module(f"{package.__name__}.emulation").EmulatedDevices is package.EmulatedDevices
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{theirs.__name__}.nothing")


def test_both_packages_have_the_same_names_and_share_objects_without_lightning() -> None:
    assert sorted(theirs.__all__) == sorted(ours.__all__)
    own = {"AsyncLocalSGDCallback", "AsyncLocalSGDStrategy", "EmulatedDevices", "FaultInjection"}
    own.add("SimulatedAsyncLocalSGDStrategy")
    for name in ours.__all__:
        assert (getattr(theirs, name) is getattr(ours, name)) == (name not in own), name
        assert name in dir(theirs)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = theirs.Nothing


def _constructors(tree: ast.AST) -> dict[str, ast.arguments]:
    """Return the arguments of each class's constructor."""
    return {
        node.name: function.args
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
    }


def test_types_are_those_of_the_source() -> None:
    stub = ast.parse(Path(theirs.__file__).with_suffix(".pyi").read_text())
    constructors = _constructors(stub)
    assert set(constructors) == {name for name in ours.__all__ if ours.HOMES[name].startswith("lightning.")}
    for name, typed in constructors.items():
        own = _constructors(ast.parse(inspect.getsource(inspect.getmodule(getattr(ours, name)))))[name]  # type: ignore[arg-type]
        assert [ast.unparse(arg) for arg in typed.args] == [ast.unparse(arg) for arg in own.args], name
        for stated, default in zip(typed.defaults, own.defaults, strict=True):
            assert ast.unparse(stated) in ("...", ast.unparse(default)), name
    exported = next(node for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(exported.value)) == sorted(theirs.__all__)
    for node in ast.walk(stub):
        for member in node.body if isinstance(node, ast.ClassDef) and node.name in theirs.__all__ else []:
            if isinstance(member, ast.FunctionDef):
                assert hasattr(getattr(theirs, node.name), member.name), member.name
    for name in ("emulation", "faults", "outer", "staleness"):
        module = importlib.import_module(f"{ours.__name__}.{name}")
        public = getattr(module, "__all__", None) or [
            key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
        ]
        text = Path(theirs.__file__).with_name(f"{name}.pyi").read_text()
        assert set(re.findall(r"import (\w+) as \1$", text, re.MULTILINE)) == set(public), name


USER = """
import {lightning} as pl
from {package} import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, SimulatedAsyncLocalSGDStrategy
from {package}.outer import DelayedNesterov
from {package}.staleness import Polynomial


class Mine(AsyncLocalSGDCallback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)


strategy = AsyncLocalSGDStrategy(outer_optimizer=DelayedNesterov(), staleness=Polynomial())
pl.Trainer(strategy=strategy, callbacks=[Mine(table=False)]).fit(pl.LightningModule())
print((SimulatedAsyncLocalSGDStrategy([1.0]).virtual_seconds or 0.0) + 1)
AsyncLocalSGDStrategy(local_stepz=3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("lightning", "package"), TREES, ids=["lightning", "pytorch_lightning"])
def test_strict_type_checker_accepts_subclasses_and_finds_mistakes(
    lightning: Any, package: Any, tmp_path: Path
) -> None:
    file = tmp_path / "user.py"
    file.write_text(USER.format(lightning=lightning.__name__, package=package.__name__))
    checker = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", file]
    checked = subprocess.run(checker, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=False)
    errors = [line for line in checked.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, checked.stdout
    assert 'Unexpected keyword argument "local_stepz"' in errors[0]


@pytest.mark.parametrize(("lightning", "package"), TREES, ids=["lightning", "pytorch_lightning"])
def test_trainer_gets_the_strategy_of_its_package(lightning: Any, package: Any, tmp_path: Path) -> None:
    boring = importlib.import_module(f"{lightning.__name__}.demos.boring_classes")
    callback = package.AsyncLocalSGDCallback(table=False)
    by_name = lightning.Trainer(strategy="async_localsgd", default_root_dir=tmp_path, callbacks=[callback], **QUIET)
    assert type(by_name.strategy) is package.AsyncLocalSGDStrategy
    assert isinstance(by_name.strategy, lightning.strategies.Strategy)
    by_name.fit(boring.BoringModel())
    assert by_name.global_step == 4
    assert [type(c) for c in by_name.callbacks].count(package.AsyncLocalSGDCallback) == 1


@pytest.mark.parametrize(("lightning", "package"), TREES, ids=["lightning", "pytorch_lightning"])
def test_trainer_gets_the_simulated_strategy_of_its_package(lightning: Any, package: Any, tmp_path: Path) -> None:
    boring = importlib.import_module(f"{lightning.__name__}.demos.boring_classes")
    trainer = lightning.Trainer(strategy="async_localsgd_simulated", default_root_dir=tmp_path, **QUIET)
    assert type(trainer.strategy) is package.SimulatedAsyncLocalSGDStrategy
    assert isinstance(trainer.strategy, lightning.strategies.Strategy)
    trainer.fit(boring.BoringModel())
    assert trainer.global_step == 4


def test_error_for_a_callback_of_the_other_package_names_the_right_import() -> None:
    module = importlib.import_module("pytorch_lightning.demos.boring_classes").BoringModel()
    trainer = pytorch_lightning.Trainer(
        strategy="async_localsgd", callbacks=[ours.AsyncLocalSGDCallback(events="never.jsonl")], **QUIET
    )
    right = r"import lightning_async_localsgd\.pytorch_lightning\.AsyncLocalSGDCallback"
    with pytest.raises(ValueError, match=right):
        trainer.fit(module)


def test_error_for_a_strategy_of_the_other_package_names_the_right_import() -> None:
    right = r"pytorch_lightning.Trainer use lightning_async_localsgd\.pytorch_lightning\.AsyncLocalSGDStrategy"
    with pytest.raises(ValueError, match=rf"AsyncLocalSGDStrategy for lightning\.pytorch\.Trainer; for {right}"):
        pytorch_lightning.Trainer(strategy=ours.AsyncLocalSGDStrategy(), **QUIET)
    right = r"lightning\.pytorch\.Trainer use lightning_async_localsgd\.AsyncLocalSGDStrategy"
    with pytest.raises(ValueError, match=rf"AsyncLocalSGDStrategy for pytorch_lightning\.Trainer; for {right}"):
        lightning.pytorch.Trainer(strategy=theirs.AsyncLocalSGDStrategy(), **QUIET)


def test_mirrored_classes_can_be_pickled_and_inspected() -> None:
    strategy = theirs.AsyncLocalSGDStrategy
    assert pickle.loads(pickle.dumps(strategy)) is strategy
    assert strategy.__module__ == "lightning_async_localsgd.pytorch_lightning.strategy"
    assert inspect.getsourcefile(strategy) == inspect.getsourcefile(ours.AsyncLocalSGDStrategy)
    assert inspect.getsource(strategy) == inspect.getsource(ours.AsyncLocalSGDStrategy)
    with pytest.raises(ValueError, match="local_steps") as caught:
        strategy(local_steps=0)
    frames = traceback.extract_tb(caught.value.__traceback__)
    [line] = [frame.line for frame in frames if frame.filename.endswith("strategy_base.py")]
    assert line is not None
    assert "SpeedAwareSteps(" in line


@pytest.mark.parametrize(
    ("statement", "becomes"),
    [
        ("import lightning as L", "import pytorch_lightning as L"),
        ("import lightning.pytorch as pl", "import pytorch_lightning as pl"),
        ("import lightning.fabric.utilities as u", "import lightning_fabric.utilities as u"),
        ("from lightning import Trainer", "from pytorch_lightning import Trainer"),
        ("from lightning.pytorch.callbacks import A, B as C", "from pytorch_lightning.callbacks import A, B as C"),
        ("from lightning.pytorch.callbacks import (", "from pytorch_lightning.callbacks import ("),
        ("from lightning_utilities.core import x", "from lightning_utilities.core import x"),
        (
            "import lightning_async_localsgd.lightning.callback as c",
            "import lightning_async_localsgd.pytorch_lightning.callback as c",
        ),
        (
            "from lightning_async_localsgd.lightning.loop.limits import epoch_steps_per_rank",
            "from lightning_async_localsgd.pytorch_lightning.loop.limits import epoch_steps_per_rank",
        ),
        ("import lightning_async_localsgd.runtime.live", "import lightning_async_localsgd.runtime.live"),
        ("from lightning_async_localsgd.outer import base", "from lightning_async_localsgd.outer import base"),
        (
            "from lightning_async_localsgd import EmulatedDevices",
            "from lightning_async_localsgd.pytorch_lightning import EmulatedDevices",
        ),
        ("from lightning_async_localsgd_autoload import x", "from lightning_async_localsgd_autoload import x"),
        ('"lightning.pytorch is a name"', '"lightning.pytorch is a name"'),
    ],
)
def test_import_statements_are_redirected(statement: str, becomes: str) -> None:
    for before in ("", "def f():\n    ", "x = 1\n"):
        assert _mirror.redirect(f"{before}{statement}\ny = 2\n") == f"{before}{becomes}\ny = 2\n"


@pytest.mark.parametrize(
    ("statement", "instead"),
    [
        ("import lightning", "import lightning as ..."),
        ("import lightning.pytorch.callbacks", "import lightning.pytorch.callbacks as ..."),
        (
            "import lightning_async_localsgd.lightning.strategy",
            "import lightning_async_localsgd.lightning.strategy as ...",
        ),
        ("from lightning import pytorch as pl", "import lightning.pytorch as ..."),
    ],
)
def test_import_statements_that_cannot_be_redirected_are_refused(statement: str, instead: str) -> None:
    with pytest.raises(ImportError, match=r"a\.py:2") as caught:
        _mirror.redirect(f"\n{statement}\n", "a.py")
    assert f"write '{instead}'" in str(caught.value)


@pytest.mark.parametrize("path", sorted(_mirror.FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_all_import_statements_can_be_redirected(path: Path) -> None:
    """Each statement is in a line of its own that begins with its keyword."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert len(node.names) == 1, lines[node.lineno - 1]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert lines[node.lineno - 1].lstrip().startswith(("import ", "from ")), lines[node.lineno - 1]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert f"{node.module}" != "lightning_async_localsgd", (
                "users import public names, modules import each other"
            )


# -------------------------------------------------------------------------------------- in separate environments

# A user's script. Only its import statements differ between the two packages.
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
        # A single write, so that ranks' lines do not mix.
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
def test_language_model_trains(request: pytest.FixtureRequest, tmp_path: Path, root: str, strategy: str) -> None:
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
    # Spawned ranks do not reach the end of the script.
    assert len(seen) == (1 if "spawn" in strategy else 2), output
    assert all(rank == seen[0] for rank in seen)
    module = {"lightning.pytorch": f"{home}.lightning.strategy", "pytorch_lightning": f"{home}.strategy"}[root]
    assert seen[0]["module"] == module
    assert root.split(".")[0] in seen[0]["bases"]
    assert {"lightning", "pytorch_lightning"} - {root.split(".")[0]} - set(seen[0]["bases"])
    assert seen[0]["loss"] < 5.0, "a random model has 5.5"
    [summary] = [json.loads(path.read_text()) for path in tmp_path.rglob("async_localsgd_summary.json")]
    assert sum(worker["steps"] for worker in summary["workers"]) == 60


def test_package_uses_pytorch_lightning_if_lightning_is_not_installed(without_lightning: FreshEnvironment) -> None:
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


def test_folder_named_lightning_is_not_mistaken_for_lightning(
    without_lightning: FreshEnvironment, tmp_path: Path
) -> None:
    (tmp_path / "lightning").mkdir()
    code = "import lightning, lightning_async_localsgd as package; print(package.AsyncLocalSGDCallback.__module__)"
    output = without_lightning.output("-c", code, PYTHONPATH=str(tmp_path))
    assert output == "lightning_async_localsgd.pytorch_lightning.callback\n"


def test_command_line_knows_the_types_of_all_options(without_lightning: FreshEnvironment, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LANGUAGE_MODEL.format(root="pytorch_lightning"))
    path = f"{HOMES['pytorch_lightning']}.AsyncLocalSGDStrategy"
    options = [f"--trainer.strategy={path}", "--trainer.strategy.local_steps=7", "--trainer.accelerator=cpu"]
    text = without_lightning.output(script, "fit", *options, "--print_config")
    strategy = yaml.safe_load(text)["trainer"]["strategy"]
    assert strategy["class_path"] == path
    assert strategy["init_args"].keys() == inspect.signature(ours.AsyncLocalSGDStrategy).parameters.keys()
    text = without_lightning.output(script, "fit", f"--trainer.strategy.help={path}", COLUMNS="400")
    # An entry is "--trainer.strategy.accelerator ACCELERATOR   Its description. (type: ..., known subclasses: ...)".
    entries = re.split(r"\n\s+(?=--)", text)
    for option, known in (
        ("accelerator", "pytorch_lightning.accelerators.CPUAccelerator"),
        ("cluster_environment", "lightning_fabric.plugins.environments.LightningEnvironment"),
        ("checkpoint_io", "pytorch_lightning.plugins.AsyncCheckpointIO"),
        ("precision_plugin", "pytorch_lightning.plugins.MixedPrecision"),
    ):
        [entry] = [entry for entry in entries if re.match(rf"--(\S+\.)?{option} ", entry)]
        assert known in entry.split("(type:")[1]
