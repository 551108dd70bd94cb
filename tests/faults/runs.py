"""Notes of a run of this folder's job, and what must hold in every run, whatever has failed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.step_notes import Life, read_notes
from lightning_async_localsgd.server.event_file import read_pushes

ALREADY_APPLIED = "already applied"

STALL_SECONDS = 1.0
"""Longest step that can be noise of a machine on which processes are started; steps take 0.03 s. The cost of faults is
measured by ``benchmarks/chaos.py``."""

REJOIN_SECONDS = 30.0
"""Longest absence of a restarted worker. Starting a Python process takes about five seconds on an idle machine. If the
job itself was slow to start because the machine was busy, a restart may be slow, too."""


@dataclass
class Run:
    """A finished job.

    Args:
        out: folder of the job.
        text: its output.
        began: time of its start.

    """

    out: Path
    text: str
    began: float = math.inf

    @cached_property
    def lives(self) -> dict[tuple[int, int], Life]:
        """Notes of all processes, by worker and life."""
        return read_notes(self.out)

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        return read_pushes(self.out / "events.jsonl")

    @cached_property
    def ranks(self) -> dict[int, dict[str, Any]]:
        """Notes of the ranks that reached the end of fit."""
        notes = [json.loads(path.read_text()) for path in self.out.glob("rank_*.json")]
        return {note["rank"]: note for note in notes}

    @property
    def loss(self) -> float:
        return float(self.ranks[0]["loss"])

    def pushes(self, worker: int, refused: bool | None = None) -> list[dict[str, Any]]:
        """Return the answered pushes of a worker."""
        mine = [push for push in self.ledger if push["worker"] == worker]
        return mine if refused is None else [push for push in mine if (push["refused"] is not None) == refused]

    def seconds_away(self, worker: int) -> float:
        """Return the seconds from a worker's last step until the server merged a round of its next life."""
        return self.lives[worker, 1].answers[0][0] - self.lives[worker, 0].steps[-1]

    # ------------------------------------------------------ assertions

    def assert_exactly_once(self) -> None:
        """Assert that no push was applied twice, and that no acknowledged push is missing."""
        # A push without steps is answered and applies nothing.
        merged = [push for push in self.ledger if push["refused"] is None and push["steps"] > 0]
        applied = [(push["session"], push["sequence"]) for push in merged]
        assert len(applied) == len(set(applied)), "a push was applied twice"
        for incarnation in {push["incarnation"] for push in merged}:
            versions = [push["version"] for push in merged if push["incarnation"] == incarnation]
            assert versions == list(range(versions[0], versions[0] + len(versions))), "each merge is one version"
        acknowledged = {
            (life.session, sequence)
            for life in self.lives.values()
            for _, sequence, _, refused in life.answers
            if refused in (None, ALREADY_APPLIED)
        }
        lost = acknowledged - {(push["session"], push["sequence"]) for push in self.ledger}
        assert not lost, "an acknowledged push is not in the ledger"

    def assert_one_model(self, living: set[int]) -> None:
        """Assert that exactly these ranks reached the end of fit, with the same model."""
        assert self.ranks.keys() == living
        assert len({rank["digest"] for rank in self.ranks.values()}) == 1

    def assert_came_back(self, worker: int) -> None:
        """Assert that a worker was restarted, and that a push of its was merged soon afterwards."""
        away = self.seconds_away(worker)
        to_start = self.lives[0, 0].steps[0] - self.began
        assert away < max(REJOIN_SECONDS, 3 * to_start), f"worker {worker} was away for {away:.0f} s"

    def assert_learned(self, normal: Run) -> None:
        """Assert that the loss is that of a run without faults, within noise."""
        assert self.loss < 1.3 * normal.loss

    def assert_others_went_on(self, begin: float, end: float, but: set[int]) -> None:
        """Assert that no other worker stood still during an outage.

        Args:
            begin: begin of the outage.
            end: end of the outage.
            but: the absent worker, and other workers with outages.

        """
        others = [life for life in self.lives.values() if life.worker not in but and life.number == 0]
        assert others
        for life in others:
            until = min(end, life.steps[-1])
            assert until - begin > 0.5, f"worker {life.worker} was not present during the outage"
            meanwhile = [after - before for before, after in life.gaps if begin <= before < until]
            otherwise = [after - before for before, after in life.gaps if not begin <= before < until]
            # On a machine that is so busy that steps are always long, shorter stalls cannot be detected.
            limit = max(STALL_SECONDS, 2 * max(otherwise))
            assert max(meanwhile) < limit, f"worker {life.worker} stood still for {max(meanwhile):.2f} s"
            usual = len(life.steps) / (life.steps[-1] - life.steps[0])
            assert life.steps_within(begin, until) > 0.3 * usual * (until - begin), f"worker {life.worker} was slow"

    def assert_others_never_stood_still(self, normal: Run, but: set[int]) -> None:
        """Assert that no other worker had a much longer step than those of a run without faults.

        Args:
            normal: the run without faults.
            but: workers that had faults.

        """
        usual = max(after - before for life in normal.lives.values() for before, after in life.gaps)
        for life in self.lives.values():
            if life.worker not in but and life.number == 0:
                longest = max(after - before for before, after in life.gaps)
                assert longest < max(STALL_SECONDS, 2 * usual), f"worker {life.worker} stood still for {longest:.2f} s"

    def outages(self, worker: int, least: float) -> list[tuple[float, float]]:
        """Return (begin, end) of each time in which a worker took no steps for ``least`` seconds, restarts included."""
        mine = [life for life in self.lives.values() if life.worker == worker]
        steps = sorted(step for life in mine for step in life.steps)
        return [(before, after) for before, after in pairwise(steps) if after - before > least]
