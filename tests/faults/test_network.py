"""A worker whose connection is cut, silent, or slow. Other workers are not affected, and no push is lost.

The tests cover known errors of other systems: time-outs must hold for silence, not for a transfer (a model may need
longer than ``silence_timeout``); heartbeats must not queue behind bulk data.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import command
from tests.faults.runs import Run
from tests.hosts import two_hosts
from tests.processes import Jobs
from tests.proxy import Proxy

pytestmark = pytest.mark.slow

VICTIM = 1


class ProxiedJob:
    """A running job with one rank, the victim, whose connection to the server can be disturbed.

    Args:
        out: folder of the job.
        process: the job.
        road: what the connection goes through.

    """

    def __init__(self, out: Path, process: subprocess.Popen[str], road: Any) -> None:
        self.out = out
        self.process = process
        self.road = road

    def await_rounds(self, more: int) -> None:
        """Wait until the victim has completed ``more`` further rounds."""
        until = time.monotonic() + 120.0
        goal = self.answers() + more
        while self.answers() < goal:
            assert self.process.poll() is None, self.process.communicate()[0][-6000:]
            assert time.monotonic() < until, f"the victim completed {self.answers()} rounds, not {goal}"
            time.sleep(0.02)

    def answers(self) -> int:
        path = self.out / f"notes_{VICTIM}_0.txt"
        return path.read_text().count("\nanswer") if path.exists() else 0


@pytest.fixture
def proxied(started: Jobs, tmp_path: Path) -> Iterator[Callable[..., ProxiedJob]]:
    """Return a function that starts the job, whose rank 1 connects through a proxy."""
    roads = []

    def start(**options: Any) -> ProxiedJob:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        road = Proxy(f"tcp://127.0.0.1:{port}")
        roads.append(road)
        options["detour"] = {str(VICTIM): road.address}
        options["exchange"] = {"transport": "tcp", "port": port, **options.get("exchange", {})}
        out = tmp_path / "out"
        return ProxiedJob(out, started.start(command(out, ranks=3, **options)), road)

    yield start
    for road in roads:
        road.close()


def finish(started: Jobs, job: ProxiedJob, normal: Run, ranks: int = 3) -> Run:
    """Wait for the end of the job, and check the run."""
    code, text = started.finish(job.process, 150.0)
    assert code == 0, text[-6000:]
    run = Run(job.out, text)
    run.assert_exactly_once()
    run.assert_one_model(set(range(ranks)))
    run.assert_learned(normal)
    assert [entry["refused"] for entry in run.pushes(VICTIM, refused=True) if "already" not in entry["refused"]] == []
    return run


def test_connection_is_cut_silent_and_slow(started: Jobs, proxied: Callable[..., ProxiedJob], normal: Run) -> None:
    # The model has 1 MB. At 10 Mbit/s and a round trip of 300 ms, it takes about a second in each direction.
    job = proxied(width=512, until={"1_0": 12}, exchange={"silence_timeout": 8.0})
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
    assert departures <= 1, "at most when the connection was cut"


def test_cable_between_two_hosts_is_unplugged(started: Jobs, tmp_path: Path, normal: Run) -> None:
    # Unlike a proxy, an unplugged cable does not end a connection: TCP sends lost data again later.
    out = tmp_path / "out"
    words = command(out, ranks=1, nodes=2, width=512, until={"1_0": 10}, exchange={"silence_timeout": 12.0})
    with two_hosts() as hosts:
        rendezvous = {"MASTER_ADDR": hosts.address, "MASTER_PORT": "29500"}
        first, second = (started.start([*hosts.enter[n], *words], NODE_RANK=str(n), **rendezvous) for n in (0, 1))
        job = ProxiedJob(out, first, hosts)
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
    assert run.outages(VICTIM, least=2.0), "the cut delayed the victim"


@pytest.mark.usefixtures("whole")
def test_transfer_may_take_longer_than_the_silence_timeout(
    started: Jobs, proxied: Callable[..., ProxiedJob], normal: Run
) -> None:
    # 4.2 MB at 800 kB/s take five seconds in each direction, without silence.
    job = proxied(width=1024, until={"1_0": 5}, exchange={"silence_timeout": 3.0})
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
