"""Kill a process while it writes checkpoints: ``python crash_job.py FOLDER``.

For each system call that changes the disk, a process is forked. It writes what a run writes, and is killed by SIGKILL
right after that call. The remaining files are then inspected. A line of JSON is printed for each process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_async_localsgd.lightning.checkpoints.periodic import store
from lightning_async_localsgd.lightning.checkpoints.run_folder import newest_checkpoint
from lightning_async_localsgd.lightning.checkpoints.worker_files import file_names
from lightning_async_localsgd.runtime.durable import write

CALLS = ("mkdir", "open", "write", "fsync", "rename", "link", "unlink", "rmdir", "close")
CHECKPOINTS = 3


def run(folder: Path, done: Callable[[int], Any]) -> None:
    """Write what a run writes: workers' states, and checkpoints that name them."""
    for rounds in range(1, CHECKPOINTS + 1):
        inner = write(folder, f"worker-1-{rounds:06d}", ".pt", lambda file: file.write(b"state"))
        server = {"model": {"version": rounds}, "optimizer_files": {"1": inner.name}}
        store(folder, {"async_localsgd": server, "weight": torch.full((1000,), float(rounds))})
        done(rounds)


def die_after(calls: int) -> None:
    """Kill this process after a number of calls from now on."""
    left = [calls]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def run_until_killed(folder: Path, calls: int, pipe: int) -> None:
    """Run in a forked process. The pipe gets the number of each completed checkpoint."""
    write_to_pipe = os.write
    die_after(calls)
    run(folder, lambda rounds: write_to_pipe(pipe, bytes([rounds])))
    os._exit(0)


def inspect(folder: Path) -> dict[str, Any]:
    """Describe the remaining files."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return {"rounds": 0}
    checkpoint = torch.load(newest, weights_only=True)
    server = checkpoint["async_localsgd"]
    [name] = file_names(server).values()
    return {
        "rounds": server["model"]["version"],
        "whole": bool((checkpoint["weight"] == server["model"]["version"]).all()),
        "inner": (folder / name).exists() or (newest.with_name(f"{newest.name}.workers") / name).exists(),
        "kept": len(list(folder.glob("rounds=*.ckpt"))),
        "leftovers": len(list(folder.glob(".unfinished-*"))),
    }


def main(root: Path) -> None:
    calls = 0
    while True:
        calls += 1
        folder = root / f"{calls:04d}"
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            run_until_killed(folder, calls, writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            complete = max(pipe.read(), default=0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"calls": calls, "code": code, "complete": complete, **inspect(folder)}), flush=True)
        if code == 0:
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
