"""The strategy on a LightningCLI command line and in its configuration files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions, MergeOptions
from tests.package.conftest import FreshEnvironment

# Takes command lines from a file and tells what comes of each: one start of Python for all of them.
RUN = """
import contextlib, io, json, sys
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

assert "lightning_async_localsgd" not in sys.modules
outcomes = []
for arguments in json.load(open(sys.argv[1])):
    sys.argv[1:] = arguments
    out, err, built, code = io.StringIO(), io.StringIO(), None, 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            strategy = LightningCLI(BoringModel, BoringDataModule, run=False).trainer.strategy
            built = [type(strategy).__module__, type(strategy).__name__, strategy.pacing.local_steps]
        except SystemExit as end:
            code = end.code
        except (TypeError, ValueError) as error:
            code = 1
            err.write(str(error))
    outcomes.append({"out": out.getvalue(), "err": err.getvalue(), "built": built, "code": code})
print(json.dumps(outcomes))
"""

COMMON = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
CLASS_PATH = "lightning_async_localsgd.AsyncLocalSGDStrategy"

NESTED = """
trainer:
  strategy:
    class_path: lightning_async_localsgd.AsyncLocalSGDStrategy
    init_args:
      local_steps: 30
      outer_optimizer: {outer_optimizer}
      grace: {grace}
      quorum: {quorum}
      sync_warmup_steps: {sync_warmup_steps}
      staleness: {staleness}
      merge: {merge}
      exchange:
        transport: tcp
        encrypt: true
"""
OURS = "{class_path: lightning_async_localsgd.DelayedNesterov, init_args: {lr: 0.4, momentum: 0.8}}"
TORCHS = "{class_path: torch.optim.SGD, init_args: {lr: 0.4, momentum: 0.8}}"
POLYNOMIAL = "{class_path: lightning_async_localsgd.staleness.Polynomial, init_args: {power: 0.25}}"
OPTIONS: dict[str, dict[str, Any]] = {
    "ours": {"outer_optimizer": OURS, "grace": "auto", "quorum": 1, "sync_warmup_steps": 20, "staleness": POLYNOMIAL,
             "merge": "{clip_norm: 3.0}"},
    "torchs": {"outer_optimizer": TORCHS, "grace": "1.5", "quorum": 2, "sync_warmup_steps": 0, "staleness": "null",
               "merge": "{weights: tokens^2/steps, average: rda, quorum_seconds: 30}"},
    "default": {"outer_optimizer": "null", "grace": "0", "quorum": "all", "sync_warmup_steps": 0, "staleness": "null",
                "merge": "null"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration files, and the script that runs command lines."""
    folder = tmp_path_factory.mktemp("command_line")
    (folder / "run.py").write_text(RUN)
    for name, options in OPTIONS.items():
        (folder / f"{name}.yaml").write_text(NESTED.format(**options))
    return folder


def run(environment: FreshEnvironment, folder: Path, lines: dict[str, list[str]]) -> dict[str, Any]:
    (folder / "lines.json").write_text(json.dumps(list(lines.values())))
    outcomes = environment.output(folder / "run.py", folder / "lines.json", COLUMNS="400")
    return dict(zip(lines, json.loads(outcomes.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def outcomes(with_wheel: FreshEnvironment, folder: Path) -> dict[str, Any]:
    """What comes of each command line below."""
    options = [f"--trainer.strategy={CLASS_PATH}", "--trainer.strategy.local_steps=7", "--trainer.strategy.grace=0.5"]
    lines = {
        "name": [*COMMON, "--trainer.strategy=async_localsgd"],
        "options": [*COMMON, *options],
        "options, printed": [*COMMON, *options, "--print_config"],
        "help": [f"--trainer.strategy.help={CLASS_PATH}"],
        "wrong transport": [*COMMON, options[0], "--trainer.strategy.exchange.transport=pigeon"],
        "unknown option": [*COMMON, options[0], "--trainer.strategy.local_step=3"],
        "merging": [
            *COMMON[:1],
            "--trainer.devices=4",
            options[0],
            "--trainer.strategy.quorum=3",
            "--trainer.strategy.merge.weights=samples",
            "--trainer.strategy.staleness=lightning_async_localsgd.staleness.Hinge",
            "--trainer.strategy.staleness.slope=0.5",
            "--trainer.strategy.staleness.start=2",
            "--print_config",
        ],
        "all": [*COMMON, options[0], "--trainer.strategy.quorum=all", "--print_config"],
        "wrong quorum": [*COMMON, options[0], "--trainer.strategy.quorum=most"],
        "no quorum": [*COMMON, options[0], "--trainer.strategy.quorum=0"],
        "quorum and outer optimizer": [
            *COMMON,
            options[0],
            "--trainer.strategy.quorum=2",
            "--trainer.strategy.outer_optimizer=lightning_async_localsgd.DelayedNesterov",
        ],
        "wrong weights": [*COMMON, options[0], "--trainer.strategy.merge.weights=guess"],
        "wrong clip": [*COMMON, options[0], "--trainer.strategy.merge.clip_norm=-1"],
        "too many": [*COMMON, options[0], "--trainer.strategy.quorum=3"],
    }
    for name in ("ours", "torchs", "default"):
        lines[name] = [COMMON[0], "--trainer.devices=3", COMMON[2], f"--config={folder / name}.yaml"]
        lines[f"{name}, printed"] = [*lines[name], "--print_config"]
    return run(with_wheel, folder, lines)


def test_name(outcomes: dict[str, Any]) -> None:
    assert outcomes["name"]["built"] == ["lightning_async_localsgd.lightning.strategy", "AsyncLocalSGDStrategy", 1]


def test_options_on_the_command_line(outcomes: dict[str, Any]) -> None:
    assert outcomes["options"]["built"] == ["lightning_async_localsgd.lightning.strategy", "AsyncLocalSGDStrategy", 7]
    options = yaml.safe_load(outcomes["options, printed"]["out"])["trainer"]["strategy"]["init_args"]
    assert options.keys() == inspect.signature(AsyncLocalSGDStrategy).parameters.keys()
    assert (options["local_steps"], options["grace"], options["dynamic_local_steps"]) == (7, 0.5, True)


def test_how_pushes_are_merged_on_the_command_line(outcomes: dict[str, Any]) -> None:
    assert outcomes["merging"]["code"] == 0, outcomes["merging"]["err"]
    options = yaml.safe_load(outcomes["merging"]["out"])["trainer"]["strategy"]["init_args"]
    assert options["quorum"] == 3
    assert options["merge"] == {**dataclasses.asdict(MergeOptions()), "weights": "samples"}
    assert options["staleness"]["init_args"] == {"slope": 0.5, "start": 2}
    assert yaml.safe_load(outcomes["all"]["out"])["trainer"]["strategy"]["init_args"]["quorum"] == "all"


@pytest.mark.parametrize("name", ["ours", "torchs", "default"])
def test_nested_objects_in_a_file(outcomes: dict[str, Any], name: str) -> None:
    home = "lightning_async_localsgd.lightning.strategy"
    assert outcomes[name]["built"] == [home, "AsyncLocalSGDStrategy", 30], outcomes[name]
    options = yaml.safe_load(outcomes[f"{name}, printed"]["out"])["trainer"]["strategy"]["init_args"]
    exchange = {**dataclasses.asdict(ExchangeOptions()), "transport": "tcp", "port": 0, "encrypt": True}
    assert {**options["exchange"], "port": 0} == exchange
    for option in ("quorum", "sync_warmup_steps"):
        assert options[option] == OPTIONS[name][option]
    merge = yaml.safe_load(OPTIONS[name]["merge"])
    assert merge is None or merge.items() <= options["merge"].items()
    assert (options["staleness"] is None) == (OPTIONS[name]["staleness"] == "null")
    if name == "default":
        assert (options["outer_optimizer"], options["grace"]) == (None, 0)
    else:
        printed = options["outer_optimizer"]
        assert printed["class_path"].endswith({"ours": "DelayedNesterov", "torchs": "torch.optim.SGD"}[name])
        assert (printed["init_args"]["lr"], printed["init_args"]["momentum"]) == (0.4, 0.8)


def test_printed_configuration_can_be_read_again(
    outcomes: dict[str, Any], with_wheel: FreshEnvironment, folder: Path
) -> None:
    lines = {}
    for name in ("ours", "torchs", "default"):
        (folder / f"{name}.printed.yaml").write_text(outcomes[f"{name}, printed"]["out"])
        lines[name] = [f"--config={folder / name}.printed.yaml", "--print_config"]
    again = run(with_wheel, folder, lines)
    for name in lines:
        assert again[name]["out"] == outcomes[f"{name}, printed"]["out"]


def test_help_explains_every_option(outcomes: dict[str, Any]) -> None:
    # "--trainer.strategy.local_steps LOCAL_STEPS   What it is for. (type: int, default: 50)", in several lines or one.
    entries = re.split(r"\n\s+(?=--)", outcomes["help"]["out"])
    for name in inspect.signature(AsyncLocalSGDStrategy).parameters:
        texts = [entry for entry in entries if re.match(rf"--(\S+\.)?{name}[ ,]", entry)]
        assert texts, f"{name} is not in the help"
        explanation = texts[-1].split("(type:")[0]
        words = [word for word in re.findall(r"[a-zA-Z]{2,}", explanation) if not word.isupper()]
        assert len(words) > 4, f"{name} is not explained: {texts}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("wrong transport", ["transport", "pigeon"]),
        ("unknown option", ["local_step"]),
        ("wrong quorum", ["quorum", "most"]),
        ("wrong weights", ["weights", "guess"]),
    ],
)
def test_wrong_value_is_named(outcomes: dict[str, Any], line: str, words: list[str]) -> None:
    assert outcomes[line]["code"] == 2
    for word in words:
        assert word in outcomes[line]["err"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no quorum", ["quorum=0", "'all'"]),
        ("quorum and outer optimizer", ["quorum=2", "DelayedNesterov", "Nesterov"]),
        ("too many", ["quorum=3", "1 worker(s)"]),
        ("wrong clip", ["clip_norm", "-1"]),
    ],
)
def test_options_that_make_no_sense_together_are_named(outcomes: dict[str, Any], line: str, words: list[str]) -> None:
    assert outcomes[line]["built"] is None
    for word in words:
        assert word in outcomes[line]["err"]
