"""Ranks that only start, die and end, for ``test_restarts.py``: ``python restarts_job.py OUT JSON``.

Each rank creates an empty file ``OUT/<rank>.<restart count>`` when it joins. Rank 0 ends the job when all files in the
option ``until`` exist.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_async_localsgd.launch import rank_processes
from lightning_async_localsgd.launch.restarts import JoinTicket
from lightning_async_localsgd.launch.run_name import RESUME_ENV
from lightning_async_localsgd.lightning.launchers.process_launcher import AsyncProcessLauncher
from lightning_async_localsgd.lightning.launchers.script_launcher import AsyncScriptLauncher

TICKET = JoinTicket("tcp://127.0.0.1:1", "a token that must not be printed", encrypted=False, fit=1)


class Rank:
    """The function that a rank runs. A class, because :mod:`multiprocessing` must be able to pickle it."""

    def __init__(self, launcher: Any, out: Path, options: dict[str, Any]) -> None:
        self.launcher = launcher
        self.out = out
        self.options = options

    def __call__(self) -> str:
        rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else 0
        settings = json.loads(os.environ.get("ASYNC_LOCALSGD_REJOIN", "{}"))
        restart_count = settings.get("restart_count", 0)
        if settings:
            assert settings == {"worker": rank, "fit": 1, "encrypted": False, "restart_count": restart_count}
            assert os.environ["ASYNC_LOCALSGD_JOIN"] == TICKET.address
            assert os.environ["ASYNC_LOCALSGD_TOKEN"] == TICKET.token
        if not self.options.get("trains", True):
            self.wait_for([] if rank == self.options["first_to_end"] else ["over"])
            (self.out / "over").touch()
            return f"the result of rank {rank}"
        fate = self.options.get("fates", {}).get(f"{rank}.{restart_count}")
        resumed = os.environ.get(RESUME_ENV) == "1"
        if fate == "never joins":
            self.create_file(f"{rank}.{restart_count}")
            time.sleep(600)
        if rank == 0:
            # A rank that dies before it has joined ends the job, so rank 0 waits for the others to join.
            self.wait_for([f"{other}.0" for other in range(1, self.options["ranks"])] if not resumed else [])
        self.launcher.mark_started(TICKET, lambda worker: worker not in self.options.get("banned", []))
        self.create_file(f"{rank}.{restart_count}" + (".resumed" if resumed else ""))
        if fate == "kill" and not resumed:
            self.wait_for(["0.0"])
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "raise":
            self.wait_for(["0.0"])
            raise RuntimeError("a fault of this rank's own")
        if fate == "exit 143":
            self.wait_for(["1.0"])
            self.create_file("end")
            sys.exit(143)
        if fate == "leave":
            self.wait_for(["0.0"])
            return ""
        if rank == 0:
            self.wait_for(self.options["until"])
            time.sleep(self.options.get("more_seconds", 0.0))
            self.launcher.mark_ended()
            self.create_file("end")
        self.wait_for(["end"])
        return f"the result of rank {rank}"

    def create_file(self, name: str) -> None:
        (self.out / name).touch()

    def wait_for(self, names: list[str]) -> None:
        deadline = time.monotonic() + 100
        while not all((self.out / name).exists() for name in names):
            assert time.monotonic() < deadline, f"the files {names} do not exist"
            time.sleep(0.02)


def run_out_of_memory(module: Any, name: str, starts: int) -> None:
    """Make the function fail once, after ``starts`` calls, as it does on a machine without free memory."""
    start = getattr(module, name)
    calls = iter(range(starts + 1))

    def start_or_fail(*args: Any, **options: Any) -> Any:
        if next(calls, -1) == starts:
            raise OSError(12, "Cannot allocate memory")
        return start(*args, **options)

    setattr(module, name, start_or_fail)


def run(out: Path, options: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO)
    method = options.get("method", "popen")
    max_restarts = options.get("max_restarts", 3)
    launcher: Any
    if method == "popen":
        launcher = AsyncScriptLauncher(LightningEnvironment(), options["ranks"], 1, max_restarts)
        if options.get("no_memory") and "LOCAL_RANK" not in os.environ:
            run_out_of_memory(subprocess, "Popen", options["ranks"] - 1)
    else:
        strategy = SimpleNamespace(
            num_processes=options["ranks"],
            num_nodes=1,
            cluster_environment=LightningEnvironment(),
            accelerator=CPUAccelerator(),
            global_rank=0,
        )
        launcher = AsyncProcessLauncher(strategy, method, max_restarts)
        if options.get("no_memory"):
            run_out_of_memory(rank_processes, "start_processes", 1)
    print(launcher.launch(Rank(launcher, out, options)), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
