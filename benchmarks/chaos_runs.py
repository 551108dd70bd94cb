"""The two runs that ``benchmarks/chaos.py`` compares: one without faults, one with killed and frozen workers.

Both runs train ``chaos_job.py`` in processes of its own and leave notes, the event file and logs in a directory.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_notes import Life, read_notes

Lives = dict[tuple[int, int], Life]
"""The notes of all worker processes, by worker and number of the process."""


@dataclass
class Event:
    """One kill (SIGKILL) or one stop (SIGSTOP, later SIGCONT) of a worker process.

    The measured fields are None until :func:`chaos_metrics.measure_events` fills them in, and where nothing could be
    measured. See the module ``chaos`` for their definitions.

    Args:
        kind: "kill" or "stop".
        worker: the worker's number.
        life: which of the worker's processes, see :class:`Life`.
        at: time of the signal on the machine's monotonic clock.
        until: time at which a frozen process was woken up; equal to ``at`` for a kill.
        detect: T_detect in seconds, for a kill.
        resume: T_resume in seconds, for a kill.
        rejoin: T_rejoin in seconds, for a kill.
        recover: T_recover in seconds, for a stop.
        counted: for a stop, whether the round that it interrupted was merged.

    """

    kind: str
    worker: int
    life: int
    at: float
    until: float
    detect: float | None = None
    resume: float | None = None
    rejoin: float | None = None
    recover: float | None = None
    counted: bool | None = None


@dataclass(frozen=True)
class RandomFaults:
    """The random faults of one run.

    Args:
        events: number of kills and stops together.
        pause: mean seconds between two events.
        longest_stop: longest time in seconds for which a worker is frozen.
        seed: of the random choices.

    """

    events: int
    pause: float
    longest_stop: float
    seed: int


class TrainingJob:
    """The training of ``chaos_job.py`` in its own process group.

    Args:
        directory: for the job's files; created here.
        options: options of ``chaos_job.py``.

    """

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.ranks = len(options["seconds_per_step"])
        self._output = (directory / "output.txt").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("chaos_job.py")), str(directory), json.dumps(options)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            start_new_session=True,
        )

    @property
    def lives(self) -> Lives:
        """The notes that the job's processes have written so far."""
        return read_notes(self.directory)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.05) -> None:
        """Wait until ``condition()`` is true. It is called every ``pause`` seconds.

        Raises:
            RuntimeError: the condition was not true within ``seconds``, or the job ended before.

        """
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(f"The training ended while the benchmark waited for {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Waited {seconds:.0f} s for {what}, without success; see {self._output.name}\n{self.tail()}"
                )
            time.sleep(pause)

    def all_workers_have_merged(self) -> bool:
        """Return whether the newest process of each worker has received an answer to a push."""
        newest = {worker: life for (worker, _), life in sorted(self.lives.items())}
        return len(newest) == self.ranks and all(life.answers for life in newest.values())

    def finish(self, seconds: float) -> None:
        """Request the end of training, and wait for it."""
        (self.directory / "stop").touch()
        code = self._process.wait(seconds)
        if code:
            raise RuntimeError(f"The training ended with exit code {code}:\n{self.tail()}")

    def tail(self) -> str:
        """Return the last lines that the job printed."""
        return "\n".join(Path(self._output.name).read_text().splitlines()[-25:])

    def kill(self) -> None:
        """Kill all processes of the job that are still running."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()


@contextmanager
def training_job(directory: Path, options: dict[str, Any]) -> Iterator[TrainingJob]:
    """Start the job, wait until every worker has merged a push, and kill the job at the end."""
    job = TrainingJob(directory, options)
    try:
        job.wait(job.all_workers_have_merged, 180.0, "the first merged push of every worker", pause=0.5)
        yield job
    finally:
        job.kill()


def run_without_faults(directory: Path, options: dict[str, Any], seconds: float) -> tuple[float, float]:
    """Run the job without faults for ``seconds``, and return the begin and the end of this time."""
    with training_job(directory, options) as job:
        begin = time.monotonic()
        job.wait(lambda: time.monotonic() > begin + seconds, 2 * seconds + 60, "the end of the run without faults")
        end = time.monotonic()
        job.finish(120.0)
    return begin, end


def run_with_faults(directory: Path, options: dict[str, Any], faults: RandomFaults) -> tuple[float, float, list[Event]]:
    """Run the job with random faults, and return the begin and the end of the faults, and the events."""
    rng = random.Random(faults.seed)
    count = faults.events
    events: list[Event] = []
    frozen = FrozenWorkers()
    with training_job(directory, options) as job:

        def is_after(moment: float) -> Callable[[], bool]:
            def check() -> bool:
                frozen.wake_due(time.monotonic())
                return time.monotonic() > moment

            return check

        def all_awake() -> bool:
            frozen.wake_due(time.monotonic())
            return not frozen.events

        begin = due = time.monotonic()
        try:
            while len(events) < count:
                due += rng.uniform(0.5, 1.5) * faults.pause
                job.wait(is_after(due), 60 + 2 * faults.pause, "the time of the next event")
                targets = _targets(job.lives, events, set(frozen.events))
                if not targets:
                    continue
                # The same number of kills and stops in total, in random order.
                kills = number_of_kills(events)
                kind = "kill" if rng.random() < (count / 2 - kills) / (count - len(events)) else "stop"
                if kind == "kill":
                    # Spread the kills evenly: the launcher doubles its delay before each restart of the same worker.
                    fewest = min(number_of_kills(events, life.worker) for life in targets)
                    targets = [life for life in targets if number_of_kills(events, life.worker) == fewest]
                life = rng.choice(targets)
                now = time.monotonic()
                if kind == "kill" and send_signal(life.pid, signal.SIGKILL):
                    events.append(Event("kill", life.worker, life.number, now, now))
                elif kind == "stop" and send_signal(life.pid, signal.SIGSTOP):
                    length = rng.uniform(0.1, 1.0) * faults.longest_stop
                    events.append(Event("stop", life.worker, life.number, now, now + length))
                    frozen.add(events[-1], life.pid)
            job.wait(all_awake, 2 * faults.longest_stop + 60, "the end of the last stop")
            # Reading the notes takes CPU time from the training, so check rarely.
            job.wait(lambda: _all_recovered(job.lives, events), 180.0, "the recovery of all workers", pause=2.0)
        finally:
            frozen.wake_due(float("inf"))
        end = time.monotonic()
        job.finish(120.0)
    return begin, end, events


class FrozenWorkers:
    """The processes that are stopped at present.

    Attributes:
        events: the current stop of each frozen worker.

    """

    def __init__(self) -> None:
        self.events: dict[int, Event] = {}
        self._pids: dict[int, int] = {}

    def add(self, event: Event, pid: int) -> None:
        self.events[event.worker] = event
        self._pids[event.worker] = pid

    def wake_due(self, now: float) -> None:
        """Wake up all processes whose stop ends at ``now`` or earlier."""
        for worker, event in list(self.events.items()):
            if event.until <= now:
                event.until = time.monotonic()
                send_signal(self._pids[worker], signal.SIGCONT)
                del self.events[worker]


def _targets(lives: Lives, events: list[Event], frozen: set[int]) -> list[Life]:
    """Return the processes that can be hit: workers above 0 that train and are neither killed nor frozen."""
    killed = {(event.worker, event.life) for event in events if event.kind == "kill"}
    newest = {worker: life for (worker, _), life in sorted(lives.items())}
    return [
        life
        for worker, life in newest.items()
        if worker > 0 and life.answers and worker not in frozen and (worker, life.number) not in killed
    ]


def number_of_kills(events: list[Event], worker: int | None = None) -> int:
    """Return the number of kills, of one worker if ``worker`` is given."""
    return sum(event.kind == "kill" and worker in (None, event.worker) for event in events)


def _all_recovered(lives: Lives, events: list[Event]) -> bool:
    """Return whether each worker has received an answer to a push after each of its events."""
    restarted = all(
        (event.worker, event.life + 1) in lives and lives[event.worker, event.life + 1].answers
        for event in events
        if event.kind == "kill"
    )
    killed = {(event.worker, event.life) for event in events if event.kind == "kill"}
    return restarted and all(
        lives[event.worker, event.life].answers[-1][0] > event.until
        for event in events
        if event.kind == "stop" and (event.worker, event.life) not in killed
    )


def send_signal(pid: int, number: int) -> bool:
    """Send a signal, and return whether the process still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
