"""Writes checkpoints and dies: ``python crash_job.py FOLDER``.

A process is forked for each call that changes something on the disk: it writes what a run writes, and is killed by
SIGKILL right after that call. What it has left is then looked at. Prints one line of JSON for each.
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

from lightning_async_localsgd.companions import names_in
from lightning_async_localsgd.durable import write
from lightning_async_localsgd.periodic import store
from lightning_async_localsgd.run_folder import newest_checkpoint

CALLS = ("mkdir", "open", "write", "fsync", "rename", "link", "unlink", "rmdir", "close")
CHECKPOINTS = 3


def run(folder: Path, done: Callable[[int], Any]) -> None:
    """What a run writes: each time a worker's state, and a checkpoint that names it."""
    for rounds in range(1, CHECKPOINTS + 1):
        inner = write(folder, f"worker-1-{rounds:06d}", ".pt", lambda file: file.write(b"state"))
        server = {"model": {"version": rounds}, "inner_states": {"1": inner.name}}
        store(folder, {"async_localsgd": server, "weight": torch.full((1000,), float(rounds))})
        done(rounds)


def die_after(calls: int) -> None:
    """Has this process killed after so many calls from now on."""
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


def live_and_die(folder: Path, calls: int, pipe: int) -> None:
    """What a forked process does. It tells through the pipe which checkpoints are complete."""
    tell = os.write
    die_after(calls)
    run(folder, lambda rounds: tell(pipe, bytes([rounds])))
    os._exit(0)


def look(folder: Path) -> dict[str, Any]:
    """What is found of what was left."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return {"rounds": 0}
    checkpoint = torch.load(newest, weights_only=True)
    server = checkpoint["async_localsgd"]
    [name] = names_in(server).values()
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
            live_and_die(folder, calls, writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            complete = max(pipe.read(), default=0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"calls": calls, "code": code, "complete": complete, **look(folder)}), flush=True)
        if code == 0:
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
