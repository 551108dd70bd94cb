"""Runs of which the commands are asked."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_async_localsgd import Arrival, AsyncLocalSGDCallback, Death, SimulatedAsyncLocalSGDStrategy
from lightning_async_localsgd.commands.errors import CommandError
from lightning_async_localsgd.commands.main import main
from lightning_async_localsgd.commands.sources import ServerSource
from tests.processes import Jobs
from tests.unit.lightning.simulated.support import fit

TOKEN = "a token that only the run knows"
JOB = Path(__file__).with_name("job.py")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run, in which a worker was lost, one came back and one joined."""
    out = tmp_path_factory.mktemp("finished")
    schedule = [Death(1, 1.1, back_at=1.6), Death(2, 2.0), Arrival(0.9, 0.1)]
    strategy = SimulatedAsyncLocalSGDStrategy([0.1, 0.17, 0.3], 0.02, schedule, local_steps=5)
    callbacks: list[L.Callback] = [AsyncLocalSGDCallback(table=False)]
    options = {"max_steps": 60, "log_every_n_steps": 5, "val_check_interval": 10}
    fit(strategy, callbacks=callbacks, logger=CSVLogger(out), **options)
    return out


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command line and returns its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


class LiveRun:
    """A training in processes of its own, which ends when :meth:`stop` is called."""

    def __init__(self, started: Jobs, out: Path, **options: Any) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.out = out
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._started = started
        words = [sys.executable, JOB, out, json.dumps({"port": self.port, **options})]
        self.process: Popen[str] = started.start(words, ASYNC_LOCALSGD_TOKEN=TOKEN)

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first state for which the condition holds. The test fails if the run ends before."""
        while self.process.poll() is None:
            try:
                source = ServerSource(self.address, TOKEN, True, 5.0)
            except CommandError:
                continue
            try:
                while not condition(state := source.state()):
                    time.sleep(0.05)
                return state
            finally:
                source.close()
        pytest.fail(f"the run has ended:\n{self._started.finish(self.process)[1]}")

    def stop(self) -> str:
        """End the run and return its output."""
        (self.out / "stop").touch()
        code, text = self._started.finish(self.process)
        assert code == 0, text
        return text


@pytest.fixture
def live_run(started: Jobs, tmp_path: Path) -> Iterator[Callable[..., LiveRun]]:
    """Return a function that starts a training, which ends at the latest with the test."""
    yield lambda **options: LiveRun(started, tmp_path, **options)
    (tmp_path / "stop").touch()
