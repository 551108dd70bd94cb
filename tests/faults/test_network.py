"""A worker behind a road that is cut, goes silent, and is slow and long. The others notice nothing, nothing is lost.

What has bitten others, and is looked for here: time-outs are per silence, never per transfer (a model needs longer than
silence_timeout); heartbeats must not queue behind bulk data.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import ROOT, command
from tests.faults.runs import Run
from tests.hosts import two_hosts
from tests.processes import Jobs, python_path
from tests.proxy import Proxy

pytestmark = pytest.mark.slow

VICTIM = 1


class Behind:
    """A running job, one of whose ranks reaches the server through ``road``."""

    def __init__(self, out: Path, process: subprocess.Popen[str], road: Any) -> None:
        self.out = out
        self.process = process
        self.road = road

    def await_rounds(self, more: int) -> None:
        """Waits until the victim has finished so many rounds more."""
        until = time.monotonic() + 120.0
        wanted = self.answers() + more
        while self.answers() < wanted:
            assert self.process.poll() is None, self.process.communicate()[0][-6000:]
            assert time.monotonic() < until, f"the victim came to {self.answers()} rounds, not to {wanted}"
            time.sleep(0.02)

    def answers(self) -> int:
        path = self.out / f"notes_{VICTIM}_0.txt"
        return path.read_text().count("\nanswer") if path.exists() else 0


@pytest.fixture
def behind(started: Jobs, tmp_path: Path) -> Iterator[Callable[..., Behind]]:
    roads = []

    def start(**options: Any) -> Behind:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        road = Proxy(f"tcp://127.0.0.1:{port}")
        roads.append(road)
        options["detour"] = {str(VICTIM): road.address}
        options["exchange"] = {"transport": "tcp", "port": port}
        out = tmp_path / "out"
        return Behind(out, started.start(command(out, ranks=3, **options), PYTHONPATH=str(ROOT)), road)

    yield start
    for road in roads:
        road.close()


def finish(started: Jobs, behind: Behind, normal: Run, ranks: int = 3) -> Run:
    code, text = started.finish(behind.process, 150.0)
    assert code == 0, text[-6000:]
    run = Run(behind.out, text)
    run.assert_exactly_once()
    run.assert_one_model(set(range(ranks)))
    run.assert_learned(normal)
    assert [entry["refused"] for entry in run.pushes(VICTIM, refused=True) if "already" not in entry["refused"]] == []
    return run


def test_a_road_is_cut_silent_and_slow(started: Jobs, behind: Callable[..., Behind], normal: Run) -> None:
    # 1 MB of model; at 10 Mbit/s with 300 ms to the server and back it takes about a second each way.
    job = behind(width=512, until={"1_0": 12}, strategy={"silence_timeout": 8.0})
    job.await_rounds(3)
    job.road.cut()
    time.sleep(2.0)
    job.road.restore()
    job.await_rounds(2)
    job.road.freeze()
    time.sleep(3.0)
    job.road.restore()
    job.await_rounds(2)
    slow_since = time.monotonic()
    job.road.throttle(1.25e6)
    job.road.delay(0.15)
    job.await_rounds(3)
    slow_until = time.monotonic()
    job.road.throttle(None)
    job.road.delay(0.0)
    run = finish(started, job, normal)
    run.assert_others_went_on(slow_since, slow_until, but={VICTIM})
    for begin, end in run.outages(VICTIM, least=1.5):
        run.assert_others_went_on(begin, end, but={VICTIM})
    departures = run.text.count(f"worker {VICTIM} left the run")
    assert departures <= 1, "only when the road was cut"


def test_the_cable_between_two_hosts_is_pulled(started: Jobs, tmp_path: Path, normal: Run) -> None:
    # Unlike a proxy, a dead cable ends no connection: TCP itself sends again what was lost, when it comes to it.
    out = tmp_path / "out"
    words = command(out, ranks=1, nodes=2, width=512, until={"1_0": 10}, strategy={"silence_timeout": 12.0})
    with two_hosts() as hosts:
        meeting = {"MASTER_ADDR": hosts.address, "MASTER_PORT": "29500", **python_path(ROOT)}
        first, second = (started.start([*hosts.enter[n], *words], NODE_RANK=str(n), **meeting) for n in (0, 1))
        job = Behind(out, first, hosts)
        job.await_rounds(3)
        hosts.cut()
        cut_at = time.monotonic()
        time.sleep(4.0)
        hosts.restore()
        restored_at = time.monotonic()
        job.await_rounds(3)
        run = finish(started, job, normal, ranks=2)
        code, text = started.finish(second)
        assert code == 0, text[-6000:]
    run.assert_others_went_on(cut_at, restored_at, but={VICTIM})
    assert run.outages(VICTIM, least=2.0), "it felt it"


@pytest.mark.usefixtures("whole")
def test_a_transfer_takes_longer_than_the_silence_timeout(
    started: Jobs, behind: Callable[..., Behind], normal: Run
) -> None:
    # 4.2 MB at 800 kB/s: five seconds each way, of which none is silent.
    job = behind(width=1024, until={"1_0": 5}, strategy={"silence_timeout": 3.0})
    job.await_rounds(2)
    slow_since = time.monotonic()
    job.road.throttle(8e5)
    job.await_rounds(1)
    slow_until = time.monotonic()
    job.road.throttle(None)
    run = finish(started, job, normal)
    assert slow_until - slow_since > 2 * 3.0
    run.assert_others_went_on(slow_since, slow_until, but={VICTIM})
    assert f"worker {VICTIM} left the run" not in run.text
