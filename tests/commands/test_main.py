"""The console script: help, exit codes, a small process, and the supervisor beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_async_localsgd.commands.main import COMMANDS
from tests.commands.conftest import Command
from tests.package.conftest import PROJECT

NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]


@pytest.mark.parametrize("name", [[], *([name] for name in NAMES)], ids=["all", *NAMES])
def test_help_describes_the_command(name: list[str], command: Command) -> None:
    code, output, _ = command(*name, "--help")
    assert code == 0
    assert "usage: lightning-async-localsgd" in output
    if name:
        assert "--json" in output
    else:
        assert all(command in output for command in [*NAMES, "run", "exit codes"])


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["watch"], ["watch", ".", "--interval", "0"]])
def test_wrong_command_line_has_exit_code_2(arguments: list[str], command: Command) -> None:
    assert command(*arguments)[0] == 2


def test_version_is_that_of_the_package(command: Command) -> None:
    assert command("--version")[1].startswith("lightning-async-localsgd ")


def test_help_imports_neither_torch_nor_lightning_nor_rich() -> None:
    program = (
        "import sys\n"
        "from lightning_async_localsgd.commands.main import make_parser\n"
        "make_parser().format_help()\n"
        "print(*{'torch', 'lightning', 'pytorch_lightning', 'rich', 'zmq', 'numpy'} & set(sys.modules))\n"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.strip() == ""


def test_run_is_the_supervisor(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    words = ["-m", "lightning_async_localsgd.commands", "run", script, "--help", "-x"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (7, "['--help', '-x']")
    words = ["-m", "lightning_async_localsgd.commands", "run", "--help"]
    done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
    assert "usage: lightning-async-localsgd run" in done.stdout


def test_console_script_is_declared() -> None:
    text = (PROJECT / "pyproject.toml").read_text()
    assert '\nlightning-async-localsgd = "lightning_async_localsgd.commands.main:main"\n' in text


def test_output_that_is_not_unicode_and_a_reader_that_leaves(finished: Path) -> None:
    words = [sys.executable, "-m", "lightning_async_localsgd.commands"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*words, "watch", finished, "--once"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loss ????" in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*words, "watch", finished, "--json"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupted_command_has_not_done_its_work(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setattr("lightning_async_localsgd.commands.plan.make_plan", interrupt)
    assert command("plan", "--seconds-per-step", "1", "--params", "1")[0] == 130


def interrupt(_: object) -> None:
    raise KeyboardInterrupt
