"""``plan``: what a run on some machines would do, without training."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.commands import text
from lightning_async_localsgd.commands.errors import OK, CommandError
from lightning_async_localsgd.commands.sources import positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_async_localsgd.simulation.forecast import Forecast

_RATES = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_UPLOADS = ("fp32", "bf16", "int8", "int4")
_DOWNLOADS = ("fp32", "bf16", "int8")
_SYNC_STEPS = 50
"""H of synchronous DiLoCo, the default with a quorum."""

_SHORT_ENOUGH = 20
"""Local steps of a round that fewer bits need not shorten."""

_BUSY_LINK = 0.5
"""Share of rank 0's link from which transfers of different workers delay each other noticeably."""

_ITERATIONS = 5
"""Forecasts from which the delays on rank 0's link are computed."""

_CLEARLY_MORE = 1.02
"""Factor of the speed for which the grace window is given up."""


@dataclass(frozen=True)
class LinkOption:
    """A link between a worker and rank 0.

    Args:
        bytes_per_second: bandwidth in one direction.
        latency: seconds in one direction.

    """

    bytes_per_second: float
    latency: float

    @classmethod
    def parse(cls, argument: str) -> LinkOption:
        """Return the link in an argument such as ``1Gbit,20ms``."""
        match = re.fullmatch(r"([\d.e]+)(\w+)(?:/s)?(?:,([\d.e-]+)(\w+))?", argument)
        if match is None or str(match[2]) not in _RATES or (match[4] is not None and str(match[4]) not in _TIMES):
            raise argparse.ArgumentTypeError(
                f"{argument!r} is not a link; use BANDWIDTH,LATENCY such as 1Gbit,20ms or 100Mbit,500us"
            )
        latency = 0.0 if match[3] is None else float(match[3]) * _TIMES[str(match[4])]
        return cls(positive(str(match[1])) * _RATES[str(match[2])] / 8.0, latency)


@dataclass(frozen=True)
class Setup:
    """What is planned: machines, links and options.

    Args:
        seconds: seconds of a local step on each machine; rank 0 is on the first one.
        links: link of each machine but the first.
        params: number of exchanged parameters.
        moments: whether second moments are exchanged.
        local_steps: H, or ``"auto"``.
        grace: grace window, in seconds or ``"auto"``.
        upload: how the parameters of pushes travel.
        download: how those of models do.
        overlap: whether workers train while their pushes are in flight.
        total: local steps of all workers in the run; None for a long run.
        sharing: by how much transfers take longer, because rank 0's link is shared.

    """

    seconds: tuple[float, ...]
    links: tuple[LinkOption, ...]
    params: int
    moments: bool
    local_steps: Any
    grace: Any
    upload: str
    download: str
    overlap: bool
    total: int | None
    sharing: float = 1.0

    def bytes_of(self, encoding: str) -> int:
        """Return the bytes of a push or model whose parameters have an encoding."""
        # As `Codec` packs: blocks of 256 values with a scale; second moments as bf16 beside packed parameters.
        blocks = 4 * -(-self.params // 256)
        parameters = {
            "fp32": 4 * self.params, "bf16": 2 * self.params, "int8": self.params + blocks,
            "int4": self.params // 2 + blocks,
        }[encoding]  # fmt: skip
        return parameters + (0 if not self.moments else (4 if encoding == "fp32" else 2) * self.params)

    @property
    def round_bytes(self) -> int:
        """Bytes of a push and a model."""
        return self.bytes_of(self.upload) + self.bytes_of(self.download)

    @property
    def exchange_seconds(self) -> list[float]:
        """Seconds of each worker's exchange. The one on rank 0's machine sends nothing."""
        # A push waits for the server's permission: two round trips in all.
        return [
            0.0,
            *(self.round_bytes / min(link.bytes_per_second, self.rank_0_rate / self.sharing) + 4 * link.latency
              for link in self.links),
        ]  # fmt: skip

    @property
    def rank_0_rate(self) -> float:
        """Bytes per second of rank 0's own link, in one direction: as fast as the fastest of the others."""
        return max((link.bytes_per_second for link in self.links), default=math.inf)

    def run(self, **options: Any) -> Forecast:
        """Forecast the run, with some options replaced."""
        from lightning_async_localsgd.simulation.forecast import forecast

        given = {
            "local_steps": self.local_steps, "grace": self.grace, "overlap": self.overlap, "total": self.total,
            **options,
        }  # fmt: skip
        return forecast(self.seconds, self.exchange_seconds, **given)

    def shared(self) -> Setup:
        """Return this setup with the delay of transfers that share rank 0's link.

        A transfer takes longer by the number of other transfers in the same direction that are under way on average.
        """
        setup = self
        for _ in range(_ITERATIONS if self.rank_0_rate < math.inf else 0):
            result = setup.run()
            seconds = setup.round_bytes / 2 / self.rank_0_rate * setup.sharing
            busy = [
                min(1.0, seconds * worker.steps_per_second / worker.local_steps)
                for worker in result.workers[1:]
                if worker.local_steps
            ]
            sharing = 1.0 + sum(busy) * (1.0 - 1.0 / max(1, len(busy)))
            setup = replace(setup, sharing=(setup.sharing + sharing) / 2)
        return setup

    def memory(self) -> dict[str, int]:
        """Return the bytes that rank 0 needs in its host's memory for models, usually and at most."""
        vector = 4 * self.params * (2 if self.moments else 1)
        workers = len(self.seconds)
        # Delayed Nesterov has a momentum and a sum of pushes.
        needed = vector + 2 * 4 * self.params
        needed += vector if self.upload == "fp32" else 2 * vector + self.bytes_of(self.upload)
        if self.download == "bf16":
            needed += self.bytes_of("bf16")
        elif self.download == "int8":
            needed += workers * (vector + self.bytes_of("int8"))
        needed += 2 * vector  # its own worker
        most = needed + (workers + 1) * (self.bytes_of(self.upload) + self.bytes_of("bf16") * (self.download == "bf16"))
        return {"usual": needed, "most": most}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="forecast the speed of a run, and recommend options",
        description="Forecast what a run on some machines does, by the simulator's policies and without training.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds-per-step", type=_seconds, required=True, metavar="S,S,...",
        help="seconds of a local step on each machine; rank 0 is on the first one",
    )  # fmt: skip
    parser.add_argument("--params", type=_count, required=True, metavar="N", help="exchanged parameters, such as 1.1e9")
    parser.add_argument(
        "--link", type=LinkOption.parse, action="append", metavar="BANDWIDTH,LATENCY",
        help="link to rank 0 in one direction, such as 1Gbit,20ms: one for all other machines, or the option once for "
        "each of them (default: no time)",
    )  # fmt: skip
    parser.add_argument(
        "--local-steps", type=_steps, default="auto", metavar="H", help="local steps, or auto (the default)"
    )
    parser.add_argument("--grace", type=_grace, metavar="SECONDS", help="grace window, or auto")
    parser.add_argument("--upload", choices=_UPLOADS, help="how the parameters of pushes travel")
    parser.add_argument("--download", choices=_DOWNLOADS, help="how the parameters of models travel")
    parser.add_argument("--overlap", action="store_true", help="workers train while their pushes are in flight")
    parser.add_argument(
        "--no-second-moments", action="store_true",
        help="second moments are not exchanged: the inner optimizer is SGD, or MergeOptions(second_moments=False)",
    )  # fmt: skip
    parser.add_argument(
        "--max-steps", type=_count, metavar="S", help="max_steps of the Trainer; rounds of a short run are shorter"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    try:
        result = make_plan(options)
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(json.dumps(result, indent=2) if options.json else as_text(result))
    return OK


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Return the forecasts and the recommendation.

    Raises:
        CommandError: The options do not fit together.
        ValueError: A machine or link is so slow that nothing can be forecast.

    """
    seconds: tuple[float, ...] = options.seconds_per_step
    setup, advice = _chosen(options, seconds)
    setup = setup.shared()
    own = setup.run()
    without_grace = setup.run(grace=0.0)
    grace = setup.grace
    if options.grace is None and without_grace.steps_per_second > _CLEARLY_MORE * own.steps_per_second:
        grace, own = 0.0, without_grace
        advice.append("grace 0: the grace window would cost more than 2 % of the steps")
    auto = own if setup.local_steps == "auto" else setup.run(local_steps="auto", grace=grace)
    sync = setup.run(
        quorum="all", local_steps=_SYNC_STEPS, dynamic_local_steps=False, grace="auto", overlap=False, total=None
    )
    used = _link_use(setup, own)
    if used > _BUSY_LINK:
        advice.append(
            f"rank 0's link is busy for {used:.0%} of the time, so transfers take {setup.sharing:.1f} times as long as "
            "alone, which is an estimate; use fewer bits, longer rounds, or a faster link for rank 0"
        )
    fastest = 1.0 / min(seconds)
    return {
        "workers": [
            {"worker": n, "seconds_per_step": seconds[n], "exchange_seconds": exchange, **asdict(worker)}
            for n, (exchange, worker) in enumerate(zip(setup.exchange_seconds, own.workers, strict=True))
        ],
        "methods": [
            _method("this strategy", own, fastest, setup),
            _method("synchronous DiLoCo", sync, fastest, setup),
            _data_parallel(setup, fastest),
            {"method": "the fastest device alone", "steps_per_second": fastest, "speedup": 1.0, "local_steps": None,
             "waiting": 0.0, "staleness": None, "bytes_per_hour": 0.0},
        ],
        "rank_0": {"memory": setup.memory(), "link_use": used},
        "recommended": {
            "local_steps": auto.local_steps, "grace": grace, "upload": setup.upload, "download": setup.download,
            "overlap": setup.overlap,
        },
        "advice": advice,
    }  # fmt: skip


def as_text(plan: dict[str, Any]) -> str:
    """Return a plan for people."""
    columns = ("method", "H", "steps/s", "x fastest", "waiting", "staleness", "traffic/h")
    rows = [
        (
            method["method"],
            "-" if method["local_steps"] is None else str(method["local_steps"]),
            text.number(method["steps_per_second"]),
            f"{method['speedup']:.2f}",
            f"{method['waiting']:.1%}",
            "-" if method["staleness"] is None else f"{method['staleness']:.2f}",
            text.size(method["bytes_per_hour"]),
        )
        for method in plan["methods"]
    ]
    workers = [
        (
            str(worker["worker"]),
            text.duration(worker["seconds_per_step"]),
            f"{worker['local_steps']:.1f}",
            f"{worker['share']:.1%}",
            f"{worker['staleness']:.2f}",
            f"{worker['waiting']:.1%}",
            f"{worker['exchanging']:.1%}",
            text.duration(worker["exchange_seconds"]),
        )
        for worker in plan["workers"]
    ]
    names = ("worker", "step", "H", "share", "staleness", "waiting", "exchanging", "exchange")
    best, memory = plan["recommended"], plan["rank_0"]["memory"]
    lines = [
        text.table(columns, rows),
        "",
        text.table(names, workers),
        "",
        f"rank 0 needs {text.size(memory['usual'])} of host memory for models, at most {text.size(memory['most'])}; "
        f"its link is busy for {plan['rank_0']['link_use']:.1%} of the time",
        f"recommended: local_steps={best['local_steps']} (what 'auto' finds), grace={best['grace']!r}, "
        f"upload={best['upload']!r}, download={best['download']!r}, overlap={best['overlap']}",
    ]
    return "\n".join([*lines, *(f"- {line}" for line in plan["advice"])])


def _chosen(options: argparse.Namespace, seconds: tuple[float, ...]) -> tuple[Setup, list[str]]:
    """Return the setup with the recommended encodings, where the user has chosen none, and the reasons."""
    setup = Setup(
        seconds=seconds,
        links=_links(options.link, len(seconds) - 1),
        params=options.params,
        moments=not options.no_second_moments,
        local_steps=options.local_steps,
        grace="auto" if options.grace is None else options.grace,
        upload=options.upload or "fp32",
        download=options.download or "fp32",
        overlap=options.overlap,
        total=None if options.max_steps is None else options.max_steps * len(seconds),
    )
    advice: list[str] = []
    if options.upload is not None or options.download is not None or options.overlap:
        return setup, advice
    fastest = min(seconds)
    setup = setup.shared()
    needed = max(setup.exchange_seconds) / (0.02 * fastest)
    if needed <= _SHORT_ENOUGH:
        return setup, advice
    copies = 4 * setup.params * (2 if setup.moments else 1) * len(seconds)
    download = "int8" if copies <= 16 << 30 else "bf16"
    setup = replace(setup, upload="int8", download=download, sharing=1.0).shared()
    advice.append(
        f"upload='int8', download={download!r}: in fp32, an exchange takes 2 % of a worker's time only with rounds of "
        f"{math.ceil(needed)} steps, and shorter rounds learn more from the same steps"
        + ("" if download == "int8" else "; download='int8' would need more than 16 GiB for copies of the model")
    )
    length = setup.run(local_steps="auto").local_steps if setup.local_steps == "auto" else setup.local_steps
    round_seconds = length * fastest
    if max(setup.exchange_seconds) > 0.1 * round_seconds:
        setup = replace(setup, overlap=True)
        advice.append("overlap=True: even so, an exchange takes more than a tenth of a round")
    if max(setup.exchange_seconds) > round_seconds:
        setup = replace(setup, upload="int4")
        advice.append("upload='int4': even so, an exchange takes longer than a round")
    return setup, advice


def _links(given: list[LinkOption] | None, others: int) -> tuple[LinkOption, ...]:
    links = given or [LinkOption(math.inf, 0.0)]
    if len(links) == 1:
        return tuple(links * others)
    if len(links) != others:
        raise CommandError(
            f"--link is given {len(links)} times, and there are {others} machines beside that of rank 0; give it once "
            "for all of them, or once for each"
        )
    return tuple(links)


def _method(name: str, result: Forecast, fastest: float, setup: Setup) -> dict[str, Any]:
    from lightning_async_localsgd.simulation.forecast import mean_waiting

    rounds = sum(worker.steps_per_second / worker.local_steps for worker in result.workers[1:] if worker.local_steps)
    return {
        "method": name,
        "steps_per_second": result.steps_per_second,
        "speedup": result.steps_per_second / fastest,
        "local_steps": result.local_steps,
        "waiting": mean_waiting(result),
        "staleness": result.staleness,
        "bytes_per_hour": 3600 * rounds * setup.round_bytes,
    }


def _data_parallel(setup: Setup, fastest: float) -> dict[str, Any]:
    """Return the figures of DDP: a ring all-reduce of fp32 gradients after each step, not hidden behind computing."""
    workers, slowest = len(setup.seconds), max(setup.seconds)
    hops, sent = 2 * (workers - 1), 2 * (workers - 1) / workers * 4 * setup.params
    reduce = max((sent / link.bytes_per_second + hops * link.latency for link in setup.links), default=0.0)
    step = slowest + reduce
    waiting = sum(slowest - seconds for seconds in setup.seconds) / workers / step
    return {
        "method": "DDP", "steps_per_second": workers / step, "speedup": workers / step / fastest, "local_steps": None,
        "waiting": waiting, "staleness": None, "bytes_per_hour": 3600 * workers * sent / step,
    }  # fmt: skip


def _link_use(setup: Setup, result: Forecast) -> float:
    """Return the share of time for which the busier direction of rank 0's link is used."""
    size = max(setup.bytes_of(setup.upload), setup.bytes_of(setup.download))
    rounds = sum(worker.steps_per_second / worker.local_steps for worker in result.workers[1:] if worker.local_steps)
    return rounds * size / setup.rank_0_rate


def _seconds(argument: str) -> tuple[float, ...]:
    values: Sequence[str] = argument.split(",")
    return tuple(positive(value) for value in values)


def _count(argument: str) -> int:
    value = positive(argument)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{argument} must be a whole number")
    return int(value)


def _steps(argument: str) -> Any:
    return "auto" if argument == "auto" else _count(argument)


def _grace(argument: str) -> Any:
    if argument == "auto":
        return "auto"
    return 0.0 if argument in ("0", "0.0") else positive(argument)
