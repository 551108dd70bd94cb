"""Each fault at each moment, in real processes: its cost for the victim, and no cost for other workers.

The first tests have several faults in one job and always run. The other tests have one fault in each job and run with
``pytest --whole``.

The tests cover known errors of other systems:

* One stalled upload blocks all workers: STOP in mid-push, SLOW_LINK.
* A push whose reply is lost is applied twice if it is resent, and is lost if it is not: LOSE_REPLY, DUPLICATE.
* The death of a peer is noticed only after a time-out, not at the socket error: KILL, with a silence_timeout that is
  longer than the run.
* A removed worker still pushes, and is merged: CORRUPT. Only a new session may be merged.
* The round of a silent worker is lost: STOP for longer than silence_timeout.
* A reconnect overwrites the local weights, and the next push is zero: DROP_LINK in mid-push. The round must count.
* A push with NaN reaches the global model and all workers: NAN.
* Saving stops all workers: STOP and DELAY while saving.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async_localsgd.faults import MOMENTS, FaultKind
from lightning_async_localsgd.lightning.checkpoints.worker_files import files_of
from lightning_async_localsgd.runtime.durable import newest
from tests.faults.conftest import command
from tests.faults.runs import ALREADY_APPLIED, Run
from tests.processes import Jobs

pytestmark = pytest.mark.slow

Job = Callable[..., Run]

WIDE = {"width": 1024}
"""A model of five parts on the wire."""


def fault(kind: str, worker: int, round: int, moment: str | None = None, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "worker": worker, "round": round, "moment": moment, **more}


def push(run: Run, worker: int, sequence: int, life: int = 0) -> list[dict[str, Any]]:
    """Return the ledger's entries of one push."""
    session = run.lives[worker, life].session
    return [entry for entry in run.pushes(worker) if (entry["session"], entry["sequence"]) == (session, sequence)]


def reasons(run: Run, worker: int, sequence: int) -> list[str | None]:
    """Return for each answer to a push why the push was refused, or None if it was merged."""
    return [entry["refused"] for entry in push(run, worker, sequence)]


def test_killed_worker_and_stopped_worker_in_one_run(job: Job, normal: Run) -> None:
    run = job(
        ranks=3,
        until={"1_1": 4, "2_0": 11},
        strategy={"checkpoint_every": 2},
        exchange={"silence_timeout": 2.0},
        faults=[
            fault("KILL", 1, 3, "mid-push"),
            fault("STOP", 2, 3, "computing", seconds=5.0),
            fault("DELAY", 2, 9, "before reply", seconds=4.0),
        ],
    )
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)

    assert reasons(run, 1, 3) == [], "the worker died before its push was complete"
    again = run.lives[1, 1]
    assert again.session != run.lives[1, 0].session
    assert any(entry["session"] == again.session for entry in run.pushes(1, refused=False)), (
        "the restarted worker was merged"
    )
    run.assert_came_back(1)
    assert "worker 1 joins with its optimizer state of" in run.text
    saved = newest(files_of(next(run.out.glob("async_localsgd/*")), 1))
    assert saved is not None
    states = torch.load(saved, weights_only=True)
    assert states["session"] == again.session
    steps = {int(state["step"]) for state in states["optimizers"][0]["state"].values()}
    assert min(steps) > len(again.steps), "steps of the first life are counted"

    (begin, end), (late_begin, late_end) = run.outages(2, least=3.5)
    # The worker was silent for longer than the time-out and was removed. Its round counts nevertheless.
    assert reasons(run, 2, 3) == [None]
    run.assert_others_went_on(begin, end, but={1, 2})
    # The heartbeat continued. Only the transfer of the model was canceled, and was requested again.
    assert reasons(run, 2, 9)[0] is None
    run.assert_others_went_on(late_begin, late_end, but={1, 2})
    assert run.text.count("worker 2 left the run") <= 1


def test_broken_links_and_invalid_pushes_in_one_run(job: Job, normal: Run) -> None:
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
        assert reasons(run, 1, sequence + 1) == [None], "the worker continues with a fresh model"

    for sequence in (2, 4, 6, 8):
        assert reasons(run, 2, sequence)[0] is None, "the round counts"
    for begin, end in run.outages(2, least=1.0):
        run.assert_others_went_on(begin, end, but={1, 2})

    run.assert_others_never_stood_still(normal, but={1, 2})
    assert reasons(run, 1, 10) == []
    assert "broke the protocol" in run.text
    run.assert_came_back(1)


def test_faults_of_pushes_in_flight_in_one_run(job: Job, normal: Run) -> None:
    """Workers go on training while their pushes are in flight. The promises are the same."""
    run = job(
        ranks=3,
        until={"1_1": 3, "2_0": 10},
        **WIDE,
        exchange={"overlap": True},
        faults=[
            fault("LOSE_REPLY", 2, 2),
            fault("DUPLICATE", 2, 3),
            fault("NAN", 2, 4, "computing"),
            fault("DROP_LINK", 2, 6, "mid-pull", seconds=1.0),
            fault("DROP_LINK", 2, 8, "computing", seconds=1.0),
            fault("KILL", 1, 3, "mid-push"),
        ],
    )
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    assert reasons(run, 2, 2) == [None, ALREADY_APPLIED]
    assert reasons(run, 2, 3) == [None, ALREADY_APPLIED]
    [reason] = reasons(run, 2, 4)
    assert reason is not None
    assert "NaN" in reason
    assert reasons(run, 2, 5) == [None], "what was learned on top of a refused push is discarded"
    for sequence in (6, 8):
        assert reasons(run, 2, sequence)[0] is None, "the round counts"
    assert reasons(run, 1, 3) == [], "the worker died before its push was complete"
    run.assert_came_back(1)


def test_rank_0_recovers_from_repeated_invalid_pushes(job: Job) -> None:
    run = job(ranks=2, until={"0_0": 12}, faults=[fault("NAN", 0, round, "computing") for round in range(2, 8)])
    run.assert_exactly_once()
    run.assert_one_model({0, 1})
    for sequence in range(2, 8):
        [reason] = reasons(run, 0, sequence)
        assert reason is not None
        assert "NaN" in reason
    assert "worker 0: 5 of its last 6 pushes were refused" in run.text
    assert reasons(run, 0, 8) == [None], "the optimizer was reset"
    assert run.loss < 0.5


# ------------------------------------------------------------------------------------------------- pytest --whole

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
def test_fault_of_a_worker(job: Job, normal: Run, kind: FaultKind, moment: str) -> None:
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
            assert reasons(run, 1, 3) == [None], "applied before the worker died"
        elif moment == "mid-push":
            assert reasons(run, 1, 3) == []
    elif kind is FaultKind.NAN:
        assert None not in reasons(run, 1, 3)
    else:
        assert reasons(run, 1, 3)[0] is None, "the round counts"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(("kind", "moment"), OF_RANK_0, ids=lambda value: getattr(value, "name", value))
def test_fault_of_rank_0(job: Job, normal: Run, kind: FaultKind, moment: str) -> None:
    run = job(ranks=3, until={"0_0": 10}, **options_of(kind, moment, 0))
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    assert f"injected: {kind.name}" in run.text
    if kind is FaultKind.DELAY:
        # The main thread or the writing thread sleeps. The server continues.
        for begin, end in run.outages(0, least=LONG - 0.5):
            run.assert_others_went_on(begin, end, but={0})


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("moment", ["before round", "computing", "saving"])
def test_run_resumes_when_rank_0_is_killed(started: Jobs, tmp_path: Path, normal: Run, moment: str) -> None:
    options = {
        "ranks": 3,
        "until": {"0_1": 6, "1_1": 6},
        "strategy": {"checkpoint_every": 4},
        "exchange": {"silence_timeout": 5.0},
        "faults": [fault("KILL", 0, 6, moment)],
    }
    [python, *words] = command(tmp_path / "out", **options)
    job = started.start([python, "-m", "lightning_async_localsgd", *words])
    code, text = started.finish(job, 200.0)
    assert code == 0, text[-6000:]
    run = Run(tmp_path / "out", text)
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    [first, second] = dict.fromkeys(push["incarnation"] for push in run.ledger)
    resumed_at = next(push["base_version"] for push in run.ledger if push["incarnation"] == second)
    last = max(push["version"] for push in run.ledger if push["incarnation"] == first)
    assert 0 < resumed_at <= last, "the run resumes from a checkpoint"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("moment", ["computing", "mid-push", "mid-pull"])
@pytest.mark.parametrize("silence_timeout", [10.0, 90.0])
def test_worker_stands_still_for_a_minute(job: Job, normal: Run, moment: str, silence_timeout: float) -> None:
    options = options_of(FaultKind.STOP, moment, 1, seconds=60.0)
    exchange = {"silence_timeout": silence_timeout}
    run = job(ranks=3, until={"1_0": 6}, timeout=250.0, exchange=exchange, **options)
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    run.assert_learned(normal)
    [(begin, end)] = run.outages(1, least=50.0)
    run.assert_others_went_on(begin, end, but={1})
    assert reasons(run, 1, 3)[0] is None, "the round counts"
