"""What a run of this folder's job came to, and what must be true of it whatever has failed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.step_notes import Life, read_notes

ALREADY_APPLIED = "already applied"

STALL_SECONDS = 1.0
"""Steps are of 0.03 s. What a fault costs others is measured by ``benchmarks/chaos.py``; here it must not be so much
that it cannot be the noise of a machine on which processes are being started."""

REJOIN_SECONDS = 30.0
"""Most of them are the start of a Python process: about five on an idle machine. Where the machine was so busy that the
job itself was long in starting, a restart may be, too."""


@dataclass
class Run:
    """A finished job.

    Args:
        out: its folder.
        text: what it printed.
        began: when it was started.

    """

    out: Path
    text: str
    began: float = math.inf

    @cached_property
    def lives(self) -> dict[tuple[int, int], Life]:
        """What all processes noted, by worker and life."""
        return read_notes(self.out)

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "ledger.jsonl").read_text().splitlines()]

    @cached_property
    def ranks(self) -> dict[int, dict[str, Any]]:
        """What those noted that have come to the end of the fit."""
        notes = [json.loads(path.read_text()) for path in self.out.glob("rank_*.json")]
        return {note["rank"]: note for note in notes}

    @property
    def loss(self) -> float:
        return float(self.ranks[0]["loss"])

    def pushes(self, worker: int, refused: bool | None = None) -> list[dict[str, Any]]:
        """The answered pushes of a worker."""
        mine = [push for push in self.ledger if push["worker"] == worker]
        return mine if refused is None else [push for push in mine if (push["refused"] is not None) == refused]

    def seconds_away(self, worker: int) -> float:
        """From a worker's death, as far as its steps tell, until the server has merged a round of its next life."""
        return self.lives[worker, 1].answers[0][0] - self.lives[worker, 0].steps[-1]

    # ------------------------------------------------------ what must be true

    def assert_exactly_once(self) -> None:
        """No push was applied twice, and none that was acknowledged is missing."""
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
        """All that live hold the same final model."""
        assert self.ranks.keys() == living
        assert len({rank["digest"] for rank in self.ranks.values()}) == 1

    def assert_came_back(self, worker: int) -> None:
        """The worker was started again and merged soon, as it must be for a model as small as this."""
        away = self.seconds_away(worker)
        to_start = self.lives[0, 0].steps[0] - self.began
        assert away < max(REJOIN_SECONDS, 3 * to_start), f"worker {worker} was away for {away:.0f} s"

    def assert_learned(self, normal: Run) -> None:
        """The loss is that of a run without faults, within noise."""
        assert self.loss < 1.3 * normal.loss

    def assert_others_went_on(self, begin: float, end: float, but: set[int]) -> None:
        """Between those two moments, when somebody was out, no other worker stood still.

        Args:
            begin: of the outage.
            end: of it.
            but: the worker that was out, and others that had an outage of their own.

        """
        others = [life for life in self.lives.values() if life.worker not in but and life.number == 0]
        assert others
        for life in others:
            until = min(end, life.steps[-1])
            assert until - begin > 0.5, f"worker {life.worker} was there during the outage"
            meanwhile = [after - before for before, after in life.gaps if begin <= before < until]
            otherwise = [after - before for before, after in life.gaps if not begin <= before < until]
            # On a machine that is so busy that steps take long at any time nothing shorter can be told apart.
            most = max(STALL_SECONDS, 2 * max(otherwise))
            assert max(meanwhile) < most, f"worker {life.worker} stood still for {max(meanwhile):.2f} s"
            usual = len(life.steps) / (life.steps[-1] - life.steps[0])
            assert life.steps_within(begin, until) > 0.3 * usual * (until - begin), f"worker {life.worker} was slow"

    def assert_others_never_stood_still(self, normal: Run, but: set[int]) -> None:
        """No other worker had a longer step than those of a run without faults, as far as that can be told.

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
        """When a worker took no steps for longer than that: (begin, end), between two of its lives included."""
        mine = [life for life in self.lives.values() if life.worker == worker]
        steps = sorted(step for life in mine for step in life.steps)
        return [(before, after) for before, after in pairwise(steps) if after - before > least]
