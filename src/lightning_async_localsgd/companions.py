"""The workers' inner optimizer states that belong to a checkpoint P of rank 0, in the folder ``P.workers/``.

When P is written, they are what each worker has saved last. Rank 0 then asks the workers to save theirs, and what they
report takes the place of the older files: that is of the next round's end, as near to P as can be had without anybody
waiting.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_async_localsgd.durable import link

if TYPE_CHECKING:
    from lightning_async_localsgd.server import Server

_log = logging.getLogger(__name__)

NAME = re.compile(r"worker-(\d+)-(\d{6,})-[0-9a-f]{64}\.pt")
"""Of a worker's file: its number, a count, the content's hash."""

_MOST_PENDING = 8
"""Checkpoints that newer files are awaited for at the same time."""


def files_of(folder: Path, worker: int) -> list[Path]:
    """The worker's files in a folder."""
    return [path for path in folder.glob(f"worker-{worker}-*.pt") if NAME.fullmatch(path.name)]


def names_in(server: Mapping[str, Any]) -> dict[int, str]:
    """Which worker's file of which name belongs to a server's state."""
    # The names came over the network: nothing else is taken for one, above all no path.
    named = ((int(worker), str(name)) for worker, name in server.get("inner_states", {}).items())
    return {worker: name for worker, name in named if (is_one := NAME.fullmatch(name)) and int(is_one[1]) == worker}


def beside(checkpoint: Any) -> Path | None:
    """The folder of the workers' files that belong to a checkpoint; None if that is on no disk of this machine."""
    path = Path(str(checkpoint))
    return None if "://" in str(checkpoint) else path.with_name(f"{path.name}.workers")


def keep_beside(checkpoint: Any, server: Mapping[str, Any], folder: Path | None) -> None:
    """Puts the workers' files that belong to a checkpoint beside it, those of them that are on this disk.

    Args:
        checkpoint: its path.
        server: the server's state in it.
        folder: of the run; None if there is none.

    """
    place, names = beside(checkpoint), set(names_in(server).values())
    if folder is None:
        return
    if place is None:
        if names:
            rank_zero_info(f"{checkpoint} is on no disk of this machine: workers' optimizer states stay in {folder}")
        return
    for name in names:
        if (folder / name).exists():
            try:
                link(folder / name, place)
            except OSError as error:
                _log.warning("the optimizer state %s cannot be kept beside %s: %s", name, checkpoint, error)
    for old in place.glob("worker-*.pt"):
        if old.name not in names:
            old.unlink(missing_ok=True)


def remove_beside(checkpoint: Any) -> None:
    """Removes what was kept beside the checkpoint."""
    place = beside(checkpoint)
    if place is None:
        return
    for path in place.glob("worker-*.pt"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # It is not there, or somebody has put something else into it.
        place.rmdir()


class AwaitedStates:
    """Rank 0: has the workers save their states for each checkpoint, and keeps beside it what they report.

    Args:
        server: the server.
        folder: of the run; None if there is none, and nothing is asked for.

    Attributes:
        asked: how often the workers were asked.

    """

    def __init__(self, server: Server, folder: Path | None) -> None:
        self.asked = 0
        self._server = server
        self._folder = folder
        # Path of a checkpoint, names of files when it was written, and of those that are newer.
        self._pending: list[tuple[Any, dict[int, str], dict[int, str]]] = []

    def ask(self, checkpoint: Any, state: Mapping[str, Any]) -> None:
        """A checkpoint has been written.

        Args:
            checkpoint: its path.
            state: the server's state in it.

        """
        if self._folder is None or beside(checkpoint) is None:
            return
        self.asked += 1
        self._server.ask_for_inner_states()
        self._pending = [one for one in self._pending if str(one[0]) != str(checkpoint)][1 - _MOST_PENDING :]
        self._pending.append((checkpoint, names_in(state), {}))

    def forget(self, checkpoint: Any) -> None:
        """A checkpoint has been removed."""
        self._pending = [one for one in self._pending if str(one[0]) != str(checkpoint)]

    def look(self) -> None:
        """Keeps what has been reported. Called at the end of rank 0's rounds."""
        if self._pending:
            names, live = self._server.ask(
                lambda coordinator: (dict(coordinator.attendance.inner_states), coordinator.live)
            )
            self._keep(names, set(live) - {0})

    def finish(self, names: Mapping[int, str]) -> None:
        """Training is over, and the workers have saved these files."""
        self._keep(names, names)
        self._pending = []

    def _keep(self, names: Mapping[int, str], awaited: Iterable[int]) -> None:
        for checkpoint, before, newer in list(self._pending):
            found = {
                worker: name
                for worker, name in names.items()
                if worker not in newer and name and name != before.get(worker)
            }
            if found:
                newer.update(found)
                keep_beside(checkpoint, {"inner_states": {**before, **newer}}, self._folder)
            if newer.keys() >= set(awaited):
                self._pending.remove((checkpoint, before, newer))
