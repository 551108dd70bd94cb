"""Ranks that only start, die and end, for ``test_restarts.py``: ``python restarts_job.py OUT JSON``.

Each leaves an empty file ``OUT/<rank>.<life>`` when it takes part. Rank 0 ends when it sees all that the job is to come
to.
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

from lightning_async_localsgd import process_job
from lightning_async_localsgd.launcher import AsyncProcessLauncher, AsyncScriptLauncher
from lightning_async_localsgd.restarts import RESUME, JoinTicket

TICKET = JoinTicket("tcp://127.0.0.1:1", "a token that nobody must see", encrypted=False, fit=1)


class Rank:
    """What a rank does: may be pickled, as :mod:`multiprocessing` needs."""

    def __init__(self, launcher: Any, out: Path, options: dict[str, Any]) -> None:
        self.launcher = launcher
        self.out = out
        self.options = options

    def __call__(self) -> str:
        rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else 0
        told = json.loads(os.environ.get("ASYNC_LOCALSGD_REJOIN", "{}"))
        life = told.get("life", 0)
        if told:
            assert told == {"worker": rank, "fit": 1, "encrypted": False, "life": life}
            assert os.environ["ASYNC_LOCALSGD_JOIN"] == TICKET.address
            assert os.environ["ASYNC_LOCALSGD_TOKEN"] == TICKET.token
        fate = self.options.get("fates", {}).get(f"{rank}.{life}")
        resumed = os.environ.get(RESUME) == "1"
        if fate == "never joins":
            self.leave_file(f"{rank}.{life}")
            time.sleep(600)
        if rank == 0:
            # Two that start together start at different moments; only who has joined may die unpunished.
            self.wait_for([f"{one}.0" for one in range(1, self.options["ranks"])] if not resumed else [])
        self.launcher.mark_started(TICKET, lambda worker: worker not in self.options.get("banned", []))
        self.leave_file(f"{rank}.{life}" + (".resumed" if resumed else ""))
        if fate == "kill" and not resumed:
            self.wait_for(["0.0"])
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "raise":
            self.wait_for(["0.0"])
            raise RuntimeError("a fault of this rank's own")
        if fate == "leave":
            self.wait_for(["0.0"])
            return ""
        if rank == 0:
            self.wait_for(self.options["until"])
            time.sleep(self.options.get("more", 0.0))
            self.launcher.mark_ended()
            self.leave_file("end")
        self.wait_for(["end"])
        return f"the result of rank {rank}"

    def leave_file(self, name: str) -> None:
        (self.out / name).touch()

    def wait_for(self, names: list[str]) -> None:
        until = time.monotonic() + 60
        while not all((self.out / name).exists() for name in names):
            assert time.monotonic() < until, f"there is no {names}"
            time.sleep(0.02)


def run_out_of_memory(place: Any, name: str, starts: int) -> None:
    """The next start of a process after ``starts`` of them fails as it does on a machine that has no memory left."""
    start = getattr(place, name)
    calls = iter(range(starts + 1))

    def start_or_fail(*args: Any, **options: Any) -> Any:
        if next(calls, -1) == starts:
            raise OSError(12, "Cannot allocate memory")
        return start(*args, **options)

    setattr(place, name, start_or_fail)


def run(out: Path, options: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO)
    method = options.get("method", "popen")
    most = options.get("max_restarts", 3)
    launcher: Any
    if method == "popen":
        launcher = AsyncScriptLauncher(LightningEnvironment(), options["ranks"], 1, most)
        if options.get("no_memory") and "LOCAL_RANK" not in os.environ:
            run_out_of_memory(subprocess, "Popen", options["ranks"] - 1)
    else:
        strategy = SimpleNamespace(
            num_processes=options["ranks"],
            num_nodes=1,
            cluster_environment=LightningEnvironment(),
            accelerator=CPUAccelerator(),
        )
        launcher = AsyncProcessLauncher(strategy, method, most)
        if options.get("no_memory"):
            run_out_of_memory(process_job, "start_processes", 1)
    print(launcher.launch(Rank(launcher, out, options)), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
