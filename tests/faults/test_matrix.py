"""Every fault at every moment, in real processes: what it costs the victim, and that it costs nobody else anything.

The first tests have several faults in one job and are part of every run of the tests. ``pytest --whole``
has every fault at every moment in a job of its own.

What has bitten others, and is looked for here: one stalled uploader blocked everyone (STOP in mid-push, SLOW_LINK); a
push whose reply is lost is applied twice if resent, lost if not (LOSE_REPLY, DUPLICATE); a dead peer's socket error is
acted on at once, not after the time-out (KILL, with a silence_timeout longer than the run); an evicted "ghost" kept
pushing and was merged (CORRUPT: only a new session is); a worker that was silent has its round counted (STOP, beyond
silence_timeout); reconnecting overwrote local weights and then pushed zeros (DROP_LINK in mid-push, whose round
counts); a non-finite push reached the global model and every worker (NAN); saving to disk stopped all workers (STOP and
DELAY while saving).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async_localsgd.companions import files_of
from lightning_async_localsgd.faults import MOMENTS, FaultKind
from lightning_async_localsgd.run_folder import newest
from tests.faults.conftest import ROOT, command
from tests.faults.runs import ALREADY_APPLIED, Run
from tests.processes import Jobs

pytestmark = pytest.mark.slow

Job = Callable[..., Run]

WIDE = {"width": 1024}
"""A model of five parts on the wire."""


def fault(kind: str, worker: int, round: int, moment: str | None = None, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "worker": worker, "round": round, "moment": moment, **more}


def push(run: Run, worker: int, sequence: int, life: int = 0) -> list[dict[str, Any]]:
    """What the server's ledger says of one push."""
    session = run.lives[worker, life].session
    return [entry for entry in run.pushes(worker) if (entry["session"], entry["sequence"]) == (session, sequence)]


def reasons(run: Run, worker: int, sequence: int) -> list[str | None]:
    """How often a push was answered, and why it was refused."""
    return [entry["refused"] for entry in push(run, worker, sequence)]


def test_one_dies_and_one_hangs_and_dawdles(job: Job, normal: Run) -> None:
    run = job(
        ranks=3,
        until={"1_1": 4, "2_0": 11},
        strategy={"silence_timeout": 2.0, "checkpoint_every": 2},
        faults=[
            fault("KILL", 1, 3, "mid-push"),
            fault("STOP", 2, 3, "computing", seconds=5.0),
            fault("DELAY", 2, 9, "before reply", seconds=4.0),
        ],
    )
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)

    assert reasons(run, 1, 3) == [], "it died before its push was complete"
    again = run.lives[1, 1]
    assert again.session != run.lives[1, 0].session
    assert any(entry["session"] == again.session for entry in run.pushes(1, refused=False)), "and came back"
    run.assert_came_back(1)
    assert "worker 1 joins with its optimizer state of" in run.text
    saved = newest(files_of(next(run.out.glob("async_localsgd/*")), 1))
    assert saved is not None
    states = torch.load(saved, weights_only=True)
    assert states["session"] == again.session
    steps = {int(state["step"]) for state in states["optimizers"][0]["state"].values()}
    assert min(steps) > len(again.steps), "those of its first life are counted in it"

    (begin, end), (late_begin, late_end) = run.outages(2, least=3.5)
    # Given up meanwhile, for it was silent for longer than the time-out. Its round counts all the same.
    assert reasons(run, 2, 3) == [None]
    run.assert_others_went_on(begin, end, but={1, 2})
    # Its heartbeat went on: only the model that was on its way to it was given up, and asked for again.
    assert reasons(run, 2, 9)[0] is None
    run.assert_others_went_on(late_begin, late_end, but={1, 2})
    assert run.text.count("worker 2 left the run") <= 1


def test_links_break_and_pushes_are_wrong(job: Job, normal: Run) -> None:
    run = job(
        ranks=3,
        until={"1_1": 1, "2_0": 10},
        **WIDE,
        faults=[
            fault("LOSE_REPLY", 1, 2),
            fault("DUPLICATE", 1, 4),
            fault("NAN", 1, 6),
            fault("NAN", 1, 8, "computing"),
            fault("DROP_LINK", 2, 2, "mid-push", seconds=1.5),
            fault("DROP_LINK", 2, 4, "mid-pull", seconds=1.5),
            fault("DROP_LINK", 2, 6, "computing", seconds=1.5),
            fault("SLOW_LINK", 2, 8, bytes_per_second=4e6),
            fault("CORRUPT", 1, 10),
        ],
    )
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)

    assert reasons(run, 1, 2) == [None, ALREADY_APPLIED]
    assert reasons(run, 1, 4) == [None, ALREADY_APPLIED]
    for sequence in (6, 8):
        [reason] = reasons(run, 1, sequence)
        assert reason is not None
        assert "NaN" in reason
        assert reasons(run, 1, sequence + 1) == [None], "it goes on with a fresh model"

    for sequence in (2, 4, 6, 8):
        assert reasons(run, 2, sequence)[0] is None, "its round counts, and once"
    for begin, end in run.outages(2, least=1.0):
        run.assert_others_went_on(begin, end, but={1, 2})

    run.assert_others_never_stood_still(normal, but={1, 2})
    assert reasons(run, 1, 10) == []
    assert "sent nonsense" in run.text
    run.assert_came_back(1)


def test_rank_0_goes_wrong_again_and_again(job: Job) -> None:
    run = job(ranks=2, until={"0_0": 12}, faults=[fault("NAN", 0, round, "computing") for round in range(2, 8)])
    run.assert_exactly_once()
    run.assert_one_model({0, 1})
    for sequence in range(2, 8):
        [reason] = reasons(run, 0, sequence)
        assert reason is not None
        assert "NaN" in reason
    assert "worker 0: 5 of its last 6 pushes were refused" in run.text
    assert reasons(run, 0, 8) == [None], "its optimizer has begun anew"
    assert run.loss < 0.5


# ------------------------------------------------------------------------------------------------------ the whole

LONG = 4.0
WHOLE = [(kind, moment) for kind in FaultKind for moment in MOMENTS[kind]]
OF_RANK_0 = [
    (kind, moment) for kind in (FaultKind.STOP, FaultKind.DELAY) for moment in ("before round", "computing", "saving")
]


def options_of(kind: FaultKind, moment: str, worker: int, seconds: float = LONG) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if kind in (FaultKind.STOP, FaultKind.DELAY, FaultKind.DROP_LINK):
        more["seconds"] = seconds
    if kind is FaultKind.SLOW_LINK:
        more["bytes_per_second"] = 1e6
    strategy = {"checkpoint_every": 2 if moment == "saving" else None}
    return {**WIDE, "faults": [fault(kind.name, worker, 3, moment, **more)], "strategy": strategy}


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(("kind", "moment"), WHOLE, ids=lambda value: getattr(value, "name", value))
def test_a_fault_of_a_worker(job: Job, normal: Run, kind: FaultKind, moment: str) -> None:
    comes_back = kind in (FaultKind.KILL, FaultKind.CORRUPT)
    run = job(ranks=3, until={"1_1": 3} if comes_back else {"1_0": 8}, **options_of(kind, moment, 1))
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    assert f"injected: {kind.name}" in run.text
    for begin, end in run.outages(1, least=1.0):
        run.assert_others_went_on(begin, end, but={1})
    run.assert_others_never_stood_still(normal, but={1})
    if comes_back:
        run.assert_came_back(1)
        if moment in ("before reply", "mid-pull"):
            assert reasons(run, 1, 3) == [None], "applied before it died"
        elif moment == "mid-push":
            assert reasons(run, 1, 3) == []
    elif kind is FaultKind.NAN:
        assert None not in reasons(run, 1, 3)
    else:
        assert reasons(run, 1, 3)[0] is None, "the round counts"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(("kind", "moment"), OF_RANK_0, ids=lambda value: getattr(value, "name", value))
def test_a_fault_of_rank_0(job: Job, normal: Run, kind: FaultKind, moment: str) -> None:
    run = job(ranks=3, until={"0_0": 10}, **options_of(kind, moment, 0))
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    assert f"injected: {kind.name}" in run.text
    if kind is FaultKind.DELAY:
        # Its main thread sleeps, or that which writes its files; the server goes on.
        for begin, end in run.outages(0, least=LONG - 0.5):
            run.assert_others_went_on(begin, end, but={0})


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("moment", ["before round", "computing", "saving"])
def test_rank_0_is_killed(started: Jobs, tmp_path: Path, normal: Run, moment: str) -> None:
    options = {
        "ranks": 3,
        "until": {"0_1": 6, "1_1": 6},
        "strategy": {"checkpoint_every": 4, "silence_timeout": 5.0},
        "faults": [fault("KILL", 0, 6, moment)],
    }
    [python, *words] = command(tmp_path / "out", **options)
    job = started.start([python, "-m", "lightning_async_localsgd", *words], PYTHONPATH=str(ROOT))
    code, text = started.finish(job, 200.0)
    assert code == 0, text[-6000:]
    run = Run(tmp_path / "out", text)
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    [first, second] = dict.fromkeys(push["incarnation"] for push in run.ledger)
    resumed_at = next(push["base_version"] for push in run.ledger if push["incarnation"] == second)
    last = max(push["version"] for push in run.ledger if push["incarnation"] == first)
    assert 0 < resumed_at <= last, "it goes on from a checkpoint"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("moment", ["computing", "mid-push", "mid-pull"])
@pytest.mark.parametrize("silence_timeout", [10.0, 90.0])
def test_a_worker_stands_still_for_a_minute(job: Job, normal: Run, moment: str, silence_timeout: float) -> None:
    options = options_of(FaultKind.STOP, moment, 1, seconds=60.0)
    options["strategy"]["silence_timeout"] = silence_timeout
    run = job(ranks=3, until={"1_0": 6}, timeout=250.0, **options)
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    [(begin, end)] = run.outages(1, least=50.0)
    run.assert_others_went_on(begin, end, but={1})
    assert reasons(run, 1, 3)[0] is None, "the round counts"
