"""What a storm of dying and freezing workers costs those that live.

Trains the same small model twice, on ranks that are as fast as emulated devices: without faults, and in a storm in
which worker processes are killed (SIGKILL) and frozen (SIGSTOP, later SIGCONT) from outside at random moments. The
launcher starts the killed ones again. Rank 0, which has the server, is spared. Prints one JSON line for each event and
one for the whole, and a table::

    python benchmarks/chaos.py           # 50 events on six ranks, about eight minutes
    python benchmarks/chaos.py --quick   # a few of them

What is measured:

* ``T_detect``: from a kill to the server's line in the log that the worker has left;
* ``T_resume``: from a kill to the next push of another worker that was merged, as that worker saw it;
* ``T_rejoin``: from a kill to the first push of the worker's next process that was merged. It includes the launcher's
  back-off and the start of Python, torch and Lightning, for which all ranks here share the same cores;
* longest stall: the longest time between two local steps of a worker that lives, against the longest one without
  faults. The times in which a worker was frozen itself are left out, from the signal to the first step after the answer
  to its first push since: until then it finds its way back. So is the time after the storm, in which all wait for the
  last one;
* ``T_return``: from the moment a frozen worker is woken up to that step;
* goodput: local steps in merged pushes, for each second in which a worker lived, against the same without faults. A
  worker lives from the first to the last local step of each of its processes, but for the times in which it was frozen.
  Everything counts against it: rounds that died with their worker, pushes that were refused, waiting, and all that the
  others' deaths and starts take of the machine. ``raw`` is that for each second of the storm, dead and frozen workers
  included: what is left of the machine, not of the method;
* pushes that a worker was told to be merged and that are not in the server's ledger; pushes that are in it as merged
  twice; whether all ranks end with the same weights, bit by bit; and of how many frozen workers the round counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from step_notes import Life, read_notes

REQUIRED_GOODPUT = 0.95
MOST_STALL_SECONDS = 0.1
MOST_REJOIN_SECONDS = 30.0
ALREADY_APPLIED = "already applied"

Lives = dict[tuple[int, int], Life]


@dataclass
class Event:
    """One kill or stop.

    Args:
        kind: "kill" or "stop".
        worker: whose process.
        life: which of its processes, see :class:`Life`.
        at: when, on the machine's monotonic clock.
        until: when a frozen process was woken up; the same as ``at`` for a kill.
        detect: seconds, see above.
        resume: seconds.
        rejoin: seconds.
        back: seconds, of a stop.
        counted: of a stop, whether the round in which it came was merged.

    """

    kind: str
    worker: int
    life: int
    at: float
    until: float
    detect: float | None = None
    resume: float | None = None
    rejoin: float | None = None
    back: float | None = None
    counted: bool | None = None


# ---------------------------------------------------------------------------------------------------------- running


class Job:
    """The training in processes of its own.

    Args:
        directory: for its files; made here.
        options: of chaos_job.py.

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
        """What its processes have noted so far."""
        return read_notes(self.directory)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.05) -> None:
        """Waits until ``condition`` holds, which is asked every ``pause`` seconds.

        Raises:
            RuntimeError: it does not within ``seconds``, or the job has ended.

        """
        until = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(f"the job ended before {what}:\n{self.tail()}")
            if time.monotonic() > until:
                raise RuntimeError(f"{what}: not within {seconds:.0f} s; see {self._output.name}\n{self.tail()}")
            time.sleep(pause)

    def everybody_merges(self) -> bool:
        """Whether the newest process of each worker has had a push answered."""
        newest = {worker: life for (worker, _), life in sorted(self.lives.items())}
        return len(newest) == self.ranks and all(life.answers for life in newest.values())

    def finish(self, seconds: float) -> None:
        """Asks training to end, and waits until it has."""
        (self.directory / "stop").touch()
        code = self._process.wait(seconds)
        if code:
            raise RuntimeError(f"the job ended with status {code}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of what it printed."""
        return "\n".join(Path(self._output.name).read_text().splitlines()[-25:])

    def end(self) -> None:
        """None of its processes outlives this."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()


@contextmanager
def job(directory: Path, options: dict[str, Any]) -> Iterator[Job]:
    running = Job(directory, options)
    try:
        running.wait(running.everybody_merges, 180.0, "every worker has merged a push", pause=0.5)
        yield running
    finally:
        running.end()


def without_faults(directory: Path, options: dict[str, Any], seconds: float) -> tuple[float, float]:
    """Runs the job in peace for so long; returns begin and end of that time."""
    with job(directory, options) as running:
        begin = time.monotonic()
        running.wait(lambda: time.monotonic() > begin + seconds, 2 * seconds + 60, "the time is over")
        end = time.monotonic()
        running.finish(120.0)
    return begin, end


def in_a_storm(
    directory: Path, options: dict[str, Any], count: int, pause: float, longest_stop: float, seed: int
) -> tuple[float, float, list[Event]]:
    """Runs the job in a storm; returns begin and end of that, and the events."""
    dice = random.Random(seed)
    events: list[Event] = []
    frozen: dict[int, Event] = {}
    frozen_pids: dict[int, int] = {}
    with job(directory, options) as running:

        def wake(now: float = float("inf")) -> None:
            for worker, event in list(frozen.items()):
                if event.until <= now:
                    event.until = time.monotonic()
                    _signal(frozen_pids[worker], signal.SIGCONT)
                    del frozen[worker]

        def later(moment: float) -> Callable[[], bool]:
            """Whether it is, waking up meanwhile who has been frozen for long enough."""

            def look() -> bool:
                wake(time.monotonic())
                return time.monotonic() > moment

            return look

        def all_awake() -> bool:
            wake(time.monotonic())
            return not frozen

        begin = due = time.monotonic()
        try:
            while len(events) < count:
                due += dice.uniform(0.5, 1.5) * pause
                running.wait(later(due), 60 + 2 * pause, "the next event")
                targets = _targets(running.lives, events, frozen)
                if not targets:
                    continue
                # As many of the one as of the other, in any order.
                kind = "kill" if dice.random() < (count / 2 - _kills(events)) / (count - len(events)) else "stop"
                if kind == "kill":
                    # Evenly: the launcher waits twice as long before each further restart of the same worker.
                    fewest = min(_kills(events, life.worker) for life in targets)
                    targets = [life for life in targets if _kills(events, life.worker) == fewest]
                life = dice.choice(targets)
                now = time.monotonic()
                if kind == "kill" and _signal(life.pid, signal.SIGKILL):
                    events.append(Event("kill", life.worker, life.number, now, now))
                elif kind == "stop" and _signal(life.pid, signal.SIGSTOP):
                    length = dice.uniform(0.1, 1.0) * longest_stop
                    frozen[life.worker] = Event("stop", life.worker, life.number, now, now + length)
                    frozen_pids[life.worker] = life.pid
                    events.append(frozen[life.worker])
            running.wait(all_awake, 2 * longest_stop + 60, "all are awake")
            # Reading the notes takes time that would be missing on the machine.
            running.wait(lambda: _all_are_back(running.lives, events), 180.0, "all are back", pause=2.0)
        finally:
            wake()
        end = time.monotonic()
        running.finish(120.0)
    return begin, end, events


def _targets(lives: Lives, events: list[Event], frozen: dict[int, Event]) -> list[Life]:
    """Processes of workers above 0 that take part and have not been hit."""
    killed = {(event.worker, event.life) for event in events if event.kind == "kill"}
    newest = {worker: life for (worker, _), life in sorted(lives.items())}
    return [
        life
        for worker, life in newest.items()
        if worker > 0 and life.answers and worker not in frozen and (worker, life.number) not in killed
    ]


def _kills(events: list[Event], worker: int | None = None) -> int:
    return sum(event.kind == "kill" and worker in (None, event.worker) for event in events)


def _all_are_back(lives: Lives, events: list[Event]) -> bool:
    back = all(
        (event.worker, event.life + 1) in lives and lives[event.worker, event.life + 1].answers
        for event in events
        if event.kind == "kill"
    )
    return back and all(
        lives[event.worker, event.life].answers[-1][0] > event.until
        for event in events
        if event.kind == "stop" and not _killed(event.worker, event.life, events)
    )


def _killed(worker: int, life: int, events: list[Event]) -> bool:
    return any(event.kind == "kill" and (event.worker, event.life) == (worker, life) for event in events)


def _signal(pid: int, number: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


# -------------------------------------------------------------------------------------------------------- measuring


def ledger_of(directory: Path) -> list[dict[str, Any]]:
    """What the server has decided on each push."""
    return [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()]


def judge_events(events: list[Event], lives: Lives, ledger: list[dict[str, Any]]) -> None:
    """Fills in what followed from each event."""
    log = lives[0, 0].log
    merged = {(push["session"], push["sequence"]) for push in ledger if push["refused"] is None}
    for event in events:
        life = lives[event.worker, event.life]
        if event.kind == "stop":
            # The answer in whose round the stop came; the process may have been killed before it got one.
            after = [sequence for moment, sequence, _, _ in life.answers if moment > event.at]
            event.counted = (life.session, min(after)) in merged if after else None
            back = _back(life, event)
            # One that was frozen again, or killed, before it was back tells nothing.
            disturbed = any(event.at < other.at <= back and other.worker == event.worker for other in events)
            event.back = back - event.until if after and not disturbed else None
            continue
        text = f"worker {event.worker} left the run"
        event.detect = _first(moment for moment, line in log if moment > event.at and line.startswith(text))
        event.resume = _first(
            moment
            for other in lives.values()
            if other.worker != event.worker
            for moment, _, _, refused in other.answers
            if moment > event.at and refused is None
        )
        again = lives.get((event.worker, event.life + 1))
        event.rejoin = _first(moment for moment, _, _, refused in (again.answers if again else []) if refused is None)
        for name in ("detect", "resume", "rejoin"):
            moment = getattr(event, name)
            setattr(event, name, None if moment is None else moment - event.at)


def _first(moments: Iterator[float] | Any) -> float | None:
    return min(moments, default=None)


def _back(life: Life, event: Event) -> float:
    """When a process that was frozen is in step again: at its first step after its first answer."""
    answered = min((moment for moment, *_ in life.answers if moment > event.until), default=life.steps[-1])
    return max(event.until, min((step for step in life.steps if step > answered), default=life.steps[-1]))


def frozen_spans(life: Life, events: list[Event], back: bool = False) -> list[tuple[float, float]]:
    """When a process was frozen: from the signal to its first step after it was woken up.

    Args:
        life: of the process.
        events: of the storm.
        back: until it was in step again, instead.

    """
    spans = []
    for event in events:
        if event.kind == "stop" and (event.worker, event.life) == (life.worker, life.number):
            awake = min((step for step in life.steps if step > event.until), default=life.steps[-1])
            spans.append((event.at, _back(life, event) if back else max(event.until, awake)))
    return spans


def longest_stall(lives: Lives, begin: float, end: float, events: list[Event]) -> float:
    """Longest time between two steps of a process that was not frozen meanwhile, nor on its way back."""
    longest = 0.0
    for life in lives.values():
        spans = frozen_spans(life, events, back=True)
        for before, after in life.gaps:
            if before >= begin and after <= end and not any(start <= after and before < stop for start, stop in spans):
                longest = max(longest, after - before)
    return longest


def living_seconds(lives: Lives, begin: float, end: float, events: list[Event]) -> Counter[int]:
    """For each worker, the seconds in which it lived and was not frozen."""
    seconds: Counter[int] = Counter()
    for life in lives.values():
        if life.steps:
            spans = [(life.steps[0], life.steps[-1])]
            seconds[life.worker] += _within(spans, begin, end) - _within(frozen_spans(life, events), begin, end)
    return seconds


def _within(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    return sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in spans)


def merged_steps(lives: Lives, ledger: list[dict[str, Any]], begin: float, end: float) -> Counter[int]:
    """For each worker, its local steps between ``begin`` and ``end`` that are in merged pushes.

    A process's steps come in the order of its pushes: the ledger says how many each push holds, the notes when each
    step was taken.
    """
    steps: Counter[int] = Counter()
    for life in lives.values():
        pushes = sorted((p for p in ledger if p["session"] == life.session), key=lambda push: push["sequence"])
        taken = 0
        seen = set()
        for push in pushes:
            if push["sequence"] in seen:
                continue
            seen.add(push["sequence"])
            merged = any(p["refused"] is None for p in pushes if p["sequence"] == push["sequence"])
            if merged:
                steps[life.worker] += sum(begin < at <= end for at in life.steps[taken : taken + push["steps"]])
            taken += push["steps"]
    return steps


def rates(steps: Counter[int], seconds: Counter[int]) -> dict[int, float]:
    """Merged steps of each worker for each second of its life."""
    return {worker: steps[worker] / seconds[worker] for worker in seconds}


def exactly_once(lives: Lives, ledger: list[dict[str, Any]]) -> tuple[int, int]:
    """How many acknowledged pushes are lost, and how many were applied more than once."""
    applied = Counter((push["session"], push["sequence"]) for push in ledger if push["refused"] is None)
    told = {
        (life.session, sequence)
        for life in lives.values()
        for _, sequence, _, refused in life.answers
        if refused in (None, ALREADY_APPLIED)
    }
    with_steps = {(push["session"], push["sequence"]) for push in ledger if push["steps"] == 0}
    return len(told - applied.keys() - with_steps), sum(count > 1 for count in applied.values())


def measure(
    directory: Path, calm: tuple[float, float], storm: tuple[float, float], events: list[Event]
) -> dict[str, Any]:
    """Works out the figures from the notes of both runs; ``events`` get theirs."""
    lives, peaceful = read_notes(directory / "storm"), read_notes(directory / "calm")
    ledger, peaceful_ledger = ledger_of(directory / "storm"), ledger_of(directory / "calm")
    judge_events(events, lives, ledger)
    normal_rates = rates(merged_steps(peaceful, peaceful_ledger, *calm), living_seconds(peaceful, *calm, []))
    living = living_seconds(lives, *storm, events)
    useful = merged_steps(lives, ledger, *storm)
    normal_stall = longest_stall(peaceful, *calm, [])
    stall = longest_stall(lives, *storm, events)
    lost, twice = exactly_once(lives, ledger)
    finals = [json.loads(path.read_text()) for path in sorted((directory / "storm").glob("final_*.json"))]
    stops = [event for event in events if event.kind == "stop"]
    result: dict[str, Any] = {
        "ranks": len(normal_rates),
        "events": len(events),
        "kills": _kills(events),
        "stops": len(stops),
        "seconds": storm[1] - storm[0],
        "goodput": sum(useful.values()) / sum(normal_rates[worker] * living[worker] for worker in living),
        "raw": sum(useful.values()) / sum(normal_rates[worker] * (storm[1] - storm[0]) for worker in normal_rates),
        "normal_stall_seconds": normal_stall,
        "longest_stall_seconds": stall,
        "acknowledged_and_lost": lost,
        "applied_twice": twice,
        "pushes_merged": sum(push["refused"] is None and push["steps"] > 0 for push in ledger),
        "pushes_refused": dict(Counter(push["refused"] for push in ledger if push["refused"] is not None)),
        "stops_whose_round_counted": sum(event.counted is True for event in stops),
        "stops_that_were_answered": sum(event.counted is not None for event in stops),
        "ranks_at_the_end": len(finals),
        "identical_weights": len({final["digest"] for final in finals}) == 1,
        "cpus": os.cpu_count(),
    }
    for name in ("detect", "resume", "rejoin", "back"):
        values = [value for event in events if (value := getattr(event, name)) is not None]
        result["T_return" if name == "back" else f"T_{name}"] = {
            "count": len(values),
            "median": statistics.median(values) if values else None,
            "max": max(values, default=None),
        }
    result["passed"] = _passed(result)
    return result


def _passed(found: dict[str, Any]) -> dict[str, bool]:
    """Which bars are met."""
    rejoin = found["T_rejoin"]
    return {
        "goodput": found["goodput"] >= REQUIRED_GOODPUT,
        "stall": found["longest_stall_seconds"] - found["normal_stall_seconds"] < MOST_STALL_SECONDS,
        "rejoin": rejoin["count"] == found["kills"] and (rejoin["max"] or 0.0) <= MOST_REJOIN_SECONDS,
        "lost": found["acknowledged_and_lost"] == 0,
        "twice": found["applied_twice"] == 0,
        "weights": found["identical_weights"] and found["ranks_at_the_end"] == found["ranks"],
    }


def table(found: dict[str, Any]) -> str:
    """The figures as text."""

    def times(name: str) -> str:
        values = found[f"T_{name}"]
        if not values["count"]:
            return "-"
        return f"{values['median']:.2f} s median, {values['max']:.2f} s at most ({values['count']} times)"

    beyond = found["longest_stall_seconds"] - found["normal_stall_seconds"]
    verdicts = {True: "passed", False: "FAILED"}
    rows = [
        ("events", f"{found['kills']} kills, {found['stops']} stops in {found['seconds']:.0f} s", None),
        ("T_detect", times("detect"), None),
        ("T_resume", times("resume"), None),
        ("T_rejoin", f"{times('rejoin')}, bar {MOST_REJOIN_SECONDS:g} s", "rejoin"),
        ("T_return", times("return"), None),
        (
            "longest stall of the living",
            f"{found['longest_stall_seconds']:.3f} s, {found['normal_stall_seconds']:.3f} s without faults: "
            f"{beyond:+.3f} s, bar {MOST_STALL_SECONDS:g} s",
            "stall",
        ),
        (
            "goodput of the living",
            f"{found['goodput']:.1%}, bar {REQUIRED_GOODPUT:.0%} (raw {found['raw']:.1%})",
            "goodput",
        ),
        ("acknowledged and lost", str(found["acknowledged_and_lost"]), "lost"),
        ("applied twice", f"{found['applied_twice']} of {found['pushes_merged']} merged", "twice"),
        (
            "rounds of frozen workers",
            f"{found['stops_whose_round_counted']} of {found['stops_that_were_answered']} counted",
            None,
        ),
        ("final weights", f"of {found['ranks_at_the_end']} ranks, identical: {found['identical_weights']}", "weights"),
    ]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(
        f"{name:{width}}  {text}" + (f"  {verdicts[found['passed'][bar]]}" if bar else "") for name, text, bar in rows
    )


def main() -> int:
    """Runs the benchmark; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=6)
    parser.add_argument("--events", type=int, default=50, help="kills and stops together")
    parser.add_argument("--pause", type=float, default=8.0, help="mean seconds between two events")
    parser.add_argument("--longest-stop", type=float, default=15.0, help="seconds for which a worker is frozen at most")
    parser.add_argument("--calm", type=float, default=60.0, help="seconds without faults, to compare with")
    parser.add_argument("--seconds-per-step", type=float, default=0.05, help="of the fastest rank")
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--silence-timeout", type=float, default=10.0, help="of the strategy; some stops are longer")
    parser.add_argument("--width", type=int, default=4096, help="of the model, which has ten times as many parameters")
    parser.add_argument("--seed", type=int, default=0, help="of the storm")
    parser.add_argument("--directory", type=Path, help="where notes and logs go (default: a new temporary directory)")
    parser.add_argument("--quick", action="store_true", help="few events on three ranks, to see that it works")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks {arguments.ranks}: rank 0 is spared, so there must be at least 2")
    if arguments.quick:
        arguments.ranks, arguments.events, arguments.pause = 3, 4, 3.0
        arguments.longest_stop, arguments.silence_timeout, arguments.calm = 4.0, 2.0, 6.0
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="async_localsgd_chaos_"))
    print(f"notes and logs in {directory}", file=sys.stderr, flush=True)
    # The slowest is half as fast as the fastest.
    seconds = [arguments.seconds_per_step * (1 + rank / (arguments.ranks - 1)) for rank in range(arguments.ranks)]
    options = {
        "seconds_per_step": seconds,
        "local_steps": arguments.local_steps,
        "silence_timeout": arguments.silence_timeout,
        "max_restarts": arguments.events,
        "width": arguments.width,
    }
    calm = without_faults(directory / "calm", options, arguments.calm)
    begin, end, events = in_a_storm(
        directory / "storm", options, arguments.events, arguments.pause, arguments.longest_stop, arguments.seed
    )
    found = measure(directory, calm, (begin, end), events)
    for event in events:
        print(json.dumps({**asdict(event), "at": event.at - begin, "until": event.until - begin}), flush=True)
    print(json.dumps(found), flush=True)
    print(table(found), flush=True)
    return 0 if all(found["passed"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
