"""What the study compares: methods, devices, and the cells of every table.

A cell is one configuration. A cell with a seed is one run. If cells of different tables are equal, they are run once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from benchmarks.study.variants import GrowingMomentum
from lightning_async_localsgd import MergeOptions
from lightning_async_localsgd.outer import (
    SGD,
    Buffer,
    DelayedNesterov,
    HeLoCo,
    LookAhead,
    Nesterov,
    OuterOptimizer,
)
from lightning_async_localsgd.protocol.options import Download, Upload
from lightning_async_localsgd.server.merge_policy import Weights
from lightning_async_localsgd.staleness import (
    DelayCompensation,
    ExponentialCosine,
    Polynomial,
    PolynomialThreshold,
    Staleness,
)

SEEDS = (0, 1, 2)
MOMENTUM = 0.9

LEVELS: dict[str, tuple[float, ...]] = {
    "none": (0.995, 0.995, 0.995, 0.995),
    "slight": (0.80, 0.90, 1.05, 1.40),
    "moderate": (0.65, 0.85, 1.20, 2.05),
    "very": (0.58, 0.75, 1.51, 3.33),
}
"""Seconds per step of each device, for each level of heterogeneity.

The devices of each level make 4.02 steps per second together. The devices of ``very`` are those of the paper. Clusters
of more workers repeat the devices.
"""
DEVICES: dict[str, tuple[float, ...]] = {**LEVELS, "two": (0.58, 1.51), "1:10": (0.58, 5.8)}
"""Seconds per step of each device, for each level and for the clusters of two devices in table G."""

INNER_GRID = (3e-4, 1e-3, 2e-3, 4e-3)
OUTER_GRID = (0.007, 0.02, 0.07, 0.2, 0.7, 2.0)
OUTER_GRID_WITH_INNER = OUTER_GRID[1:-1]
"""The outer learning rates that are tried with each inner learning rate."""
GRID_SEARCH_START = {"warm": 0.07, "scratch": 0.2}
"""The first value that tuning tries on the outer grid, for each kind of start.

Tuning then continues in the direction that improves the loss, until a value is worse.
"""
STAGE_GRID: dict[str, tuple[float, ...]] = {"delay": (1.0, 30.0, 1000.0), "cosine_dn": (0.0, -0.2, -1.0)}
"""The parameters of staleness stages that are tried.

These are the strength of delay compensation, and the cosine below which a push is dropped. The learning rate is tuned
with the first value.
"""
MAX_TUNING_WORKERS = {"mla": 16}
"""The largest number of workers for which a method's learning rate is tuned. The default is eight.

More workers use the rate of that number. MLA's rate for eight workers is far too large for sixteen.
"""

METHODS: dict[str, str] = {
    "single": "single worker, k-fold batch",
    "alone": "fastest device alone",
    "ddp": "DDP",
    "default": "defaults",
    "sync": "sync DiLoCo",
    "nesterov": "async Nesterov",
    "nesterov_half": "async Nesterov, momentum 0.5",
    "sgd": "async SGD",
    "sgd_poly": "async SGD, Poly",
    "buffer": "Buffer (FedBuff)",
    "poly": "async Nesterov, Poly",
    "polythres": "async Nesterov, PolyThres",
    "delay": "async Nesterov, delay compensation",
    "dn": "DN",
    "dn_growing": "DN, growing momentum",
    "mla": "MLA",
    "heloco_mla": "HeLoCo + MLA",
    "heloco_dn": "HeLoCo + DN",
    "cosine_dn": "DN, exponential with cut-off",
    "quorum2": "quorum 2, RDA, Nesterov",
    "quorum3": "quorum 3, RDA, Nesterov",
}
"""The name of each method in the tables."""


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Args:
        method: one of :data:`METHODS`.
        dynamic: whether slower workers take fewer steps (DyLU).
        grace: the strategy's grace window in seconds, or "auto".
        level: the devices, one of :data:`DEVICES`.
        workers: number of workers, a multiple of the number of devices.
        corpus: one of :data:`.CORPORA`.
        iid: whether every worker draws from the whole corpus. Otherwise each worker has one domain.
        size: model size, one of :data:`.SIZES`.
        local_steps: H.
        steps: local steps of all workers together, divided by the number of workers; 0 if ``seconds`` is given.
        warm_steps: steps of the checkpoint from which training starts; 0 starts from random weights.
        lr: learning rate of the outer optimizer; None uses the tuned value.
        inner_lr: peak learning rate of the inner optimizer; None uses the tuned value.
        period: N of DN; None uses the number of workers.
        activation: c of DN.
        vocabulary: number of tokens of the byte pair encoding.
        processes: whether to run real processes on emulated devices instead of the simulation.
        stage: parameter of the staleness stage, see :data:`STAGE_GRID`; None uses the tuned value.
        seconds: time of the devices. The run takes as many steps as fit, see :func:`.steps_in`. None takes ``steps``.
        exchange_seconds: seconds that a message needs in one direction.
        moments: whether workers average the second moments of their inner optimizers.
        upload: how the parameters of pushes travel.
        download: how the parameters of models travel.
        overlap: whether workers go on training while their pushes are in flight.
        link_seconds: seconds that a push and a model need together in fp32, because of a link's bandwidth.
        weights: how the pushes of the defaults are weighed.
        sync_warmup_steps: steps per worker with which the defaults begin synchronously.
        early_local_steps: H in the first half of the run; None is ``local_steps``.

    """

    method: str
    dynamic: bool = False
    grace: Literal["auto"] | float = 0.0
    level: str = "very"
    workers: int = 4
    corpus: str = "c4"
    iid: bool = True
    size: str = "0.5m"
    local_steps: int | Literal["auto"] = 20
    steps: int = 2000
    warm_steps: int = 1500
    lr: float | None = None
    inner_lr: float | None = None
    period: int | None = None
    activation: float = 0.0
    vocabulary: int = 2048
    processes: bool = False
    stage: float | None = None
    seconds: float | None = None
    exchange_seconds: float = 0.0
    moments: bool = False
    upload: Upload = "fp32"
    download: Download = "fp32"
    overlap: bool = False
    link_seconds: float = 0.0
    weights: Weights = "equal"
    sync_warmup_steps: int = 0
    early_local_steps: int | None = None

    @property
    def seconds_per_step(self) -> tuple[float, ...]:
        """Seconds per step of each worker's device."""
        devices = DEVICES[self.level]
        return devices * (self.workers // len(devices))

    @property
    def has_outer_lr(self) -> bool:
        """Whether the method has a learning rate of the outer optimizer that must be chosen."""
        return self.workers_apart and self.method != "default"

    @property
    def workers_apart(self) -> bool:
        """Whether workers take steps of their own, so that the run is simulated."""
        return self.method not in ("single", "alone", "ddp")

    @property
    def batches_per_step(self) -> int:
        """Batches of one worker that an optimizer step of the trainer stands for."""
        return 1 if self.method == "alone" else self.workers

    @property
    def label(self) -> str:
        """The name of the cell's method in the tables."""
        extras = [*(["DyLU"] if self.dynamic else []), *(["grace"] if self.grace else [])]
        return " + ".join([METHODS[self.method], *extras])

    @property
    def independent_of_devices(self) -> bool:
        """Whether the devices affect only the time of the run and not its result.

        This is the case if all workers take the same number of steps and wait for each other.
        """
        if self.seconds is not None:
            return False
        return self.method == "single" or (self.method == "sync" and not self.dynamic)

    def canonical(self) -> Cell:
        """Return the cell whose run provides the result of this cell."""
        if self.method == "alone":
            # Only the fastest device matters, which is the same everywhere but at level `none`.
            level = self.level if self.level == "none" else "very"
            return replace(self, level=level, workers=4, exchange_seconds=0.0)
        return replace(self, level="very") if self.independent_of_devices and not self.processes else self

    def slowdown(self) -> float:
        """Return the ratio of this cell's time to the time of its canonical cell."""
        mine, run = self.seconds_per_step, self.canonical().seconds_per_step
        # The single worker is the fastest device. Synchronous rounds take as long as the slowest device needs.
        return min(mine) / min(run) if self.method == "single" else max(mine) / max(run)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a dictionary."""
        return asdict(self)


def tuning_workers(cell: Cell) -> int:
    """Return the number of workers for which the cell's learning rate is tuned."""
    return min(cell.workers, MAX_TUNING_WORKERS.get(cell.method, 8))


def outer_optimizer(cell: Cell) -> OuterOptimizer:
    """Create the outer optimizer of a cell whose learning rate is known."""
    assert cell.lr is not None
    match cell.method:
        case "sgd" | "sgd_poly":
            return SGD(cell.lr)
        case "buffer":
            return Buffer(cell.lr, MOMENTUM)
        case "mla":
            return LookAhead(cell.lr, MOMENTUM)
        case "heloco_mla":
            return HeLoCo(LookAhead(cell.lr, MOMENTUM))
        case "heloco_dn":
            return HeLoCo(DelayedNesterov(cell.lr, MOMENTUM))
        case "dn_growing":
            return GrowingMomentum(cell.lr, MOMENTUM)
        case "dn" | "cosine_dn":
            return DelayedNesterov(cell.lr, MOMENTUM, cell.period or "auto", cell.activation)
        case "nesterov_half":
            return Nesterov(cell.lr, 0.5)
        case _:
            return Nesterov(cell.lr, MOMENTUM)


def staleness_stage(cell: Cell) -> Staleness | None:
    """Create the staleness stage of a cell."""
    match cell.method:
        case "poly" | "sgd_poly":
            return Polynomial(0.5)
        case "polythres":
            return PolynomialThreshold(0.5, 10)
        case "delay":
            assert cell.stage is not None
            return DelayCompensation(cell.stage)
        case "cosine_dn":
            assert cell.stage is not None
            return ExponentialCosine(0.1, cell.stage)
        case _:
            return None


def strategy_quorum(cell: Cell) -> int | str:
    """Return the strategy's option ``quorum`` of a cell."""
    quorums: dict[str, int | str] = {"sync": "all", "quorum2": 2, "quorum3": 3}
    return quorums.get(cell.method, 1)


def strategy_options(cell: Cell) -> dict[str, Any]:
    """Return the options that the simulated and the live strategy have in common."""
    quorum = strategy_quorum(cell)
    if cell.method == "default":
        changed: dict[str, Any] = {}
        if not cell.moments or cell.weights != "equal":
            changed["merge"] = MergeOptions(weights=cell.weights, second_moments="auto" if cell.moments else False)
        if cell.sync_warmup_steps:
            changed["sync_warmup_steps"] = cell.sync_warmup_steps
        if cell.grace != "auto":
            changed["grace"] = cell.grace
        return {"local_steps": cell.local_steps, "checkpoint_every": None, **changed}
    average: Literal["mean", "rda"] = "rda" if quorum in (2, 3) else "mean"
    return {
        "local_steps": cell.local_steps,
        "outer_optimizer": outer_optimizer(cell),
        "dynamic_local_steps": cell.dynamic,
        "grace": cell.grace,
        "quorum": quorum,
        "staleness": staleness_stage(cell),
        "merge": MergeOptions(average=average, second_moments=cell.moments),
        "checkpoint_every": None,
    }


# ---------------------------------------------------------------------- tables

SYNC = Cell("sync")
NESTEROV = Cell("nesterov")
DN_DYLU_GRACE = Cell("dn", dynamic=True, grace="auto")
"""The paper's method, whose quality and time the study asks about."""
MLA_DYLU_GRACE = Cell("mla", dynamic=True, grace="auto")
"""The outer optimizer published after the paper that most tables compare with DN."""
SGD_DYLU_GRACE = Cell("sgd", dynamic=True, grace="auto")
"""No outer momentum at all."""
DEFAULTS = Cell("default", dynamic=True, grace="auto", moments=True)
"""The strategy's default outer optimizer, with the rounds and the local updates of the paper's method."""
MLA_OFF_GRID = replace(MLA_DYLU_GRACE, workers=16, lr=0.14)
"""MLA with a rate that is not on the grid. The loss rises steeply on both sides of the best grid value, 0.07."""
PLAIN_ASYNC = [Cell(method) for method in ("nesterov", "sgd", "buffer", "poly", "polythres", "delay", "dn")]
SYNC_SHORT_ROUNDS = replace(SYNC, local_steps=11)
"""Synchronous DiLoCo with as many outer rounds as with DyLU at level ``very``.

There, rounds have 20, 15, 7 and 3 steps, 11.25 on average.
"""
CONTROLS = [SYNC_SHORT_ROUNDS, Cell("sync", dynamic=True)]
TABLE_A = [Cell("single"), SYNC, *PLAIN_ASYNC, Cell("dn", dynamic=True), DN_DYLU_GRACE, MLA_DYLU_GRACE, SGD_DYLU_GRACE]
LATER_METHODS = ("dn", "mla", "heloco_mla", "heloco_dn", "cosine_dn", "quorum2", "quorum3")
LATER_CELLS = [cell for name in LATER_METHODS for cell in (Cell(name), Cell(name, dynamic=True, grace="auto"))]
"""The methods published after the paper, and DN, each with and without DyLU and the grace window."""
ROUND_SECONDS = 20 * 0.58
"""Length of a round of the fastest device with H = 20. With DyLU all rounds have about this length."""
GRACE_SHARES = (0.0, 0.05, 0.10, 0.15, 0.30)
INNER_TUNING_STEPS = 1000
"""Steps per worker in the runs that tune the inner learning rate: half the length of the other runs."""


def first_stage_value(cell: Cell) -> float | None:
    """Return the parameter of the staleness stage with which the learning rate is tuned, or None without a stage."""
    return STAGE_GRID.get(cell.method, (None,))[0]


def inner_tuning() -> list[Cell]:
    """Return the runs that tune the inner learning rate.

    The rate is tuned for the single worker and, with each outer learning rate, for synchronous DiLoCo.
    """
    tuned = [*(replace(SYNC, lr=outer) for outer in OUTER_GRID_WITH_INNER), Cell("single")]
    return [replace(cell, inner_lr=inner, steps=INNER_TUNING_STEPS) for inner in INNER_GRID for cell in tuned]


def outer_tuning(cell: Cell, lr: float) -> Cell:
    """Return the run that tries an outer learning rate for a method.

    The run has the full length, because large rates lose at first and gain later. Runs of half the length would choose
    rates that are too small.
    """
    return replace(cell, lr=lr, stage=first_stage_value(cell))


def table_b() -> list[Cell]:
    """Return the cells that vary the number of workers."""
    compared = (SYNC, NESTEROV, DN_DYLU_GRACE, MLA_DYLU_GRACE, SGD_DYLU_GRACE, DEFAULTS)
    return [*(replace(cell, workers=workers) for workers in (4, 8, 16) for cell in compared), MLA_OFF_GRID]


def table_c() -> list[Cell]:
    """Return the cells that vary the size of the model."""
    compared = (SYNC, NESTEROV, DN_DYLU_GRACE, MLA_DYLU_GRACE, SGD_DYLU_GRACE)
    return [replace(cell, size=size) for size in ("0.5m", "1.5m", "4m") for cell in compared]


def table_d() -> list[Cell]:
    """Return the cells that vary the options of Delayed Nesterov and the grace window."""
    activations = [replace(DN_DYLU_GRACE, activation=value) for value in (0.0, 0.1, 0.25)]
    periods = [replace(DN_DYLU_GRACE, period=value) for value in (1, 2, None, 8)]
    windows = [replace(DN_DYLU_GRACE, grace=round(share * ROUND_SECONDS, 2)) for share in GRACE_SHARES]
    return list(dict.fromkeys([*activations, *periods, *windows, DN_DYLU_GRACE]))


def table_h() -> list[Cell]:
    """Return the cells with longer rounds."""
    compared = (SYNC, NESTEROV, Cell("dn", dynamic=True), DN_DYLU_GRACE, MLA_DYLU_GRACE, SGD_DYLU_GRACE)
    return [replace(cell, local_steps=50, steps=5000) for cell in compared]


def table_e() -> list[Cell]:
    """Return the cells of the methods published after the paper, with equal data and with one domain per worker."""
    mixed = [replace(cell, corpus="domains") for cell in (SYNC, DN_DYLU_GRACE)]
    one_domain = [replace(cell, corpus="domains", iid=False) for cell in (SYNC, *LATER_CELLS)]
    return [*LATER_CELLS, *mixed, *one_domain]


def table_f() -> list[Cell]:
    """Return the cells that run in real processes."""
    return [replace(cell, processes=True) for cell in (SYNC, DN_DYLU_GRACE)]


COMMON_CELLS = [
    SYNC,
    NESTEROV,
    Cell("sgd"),
    Cell("dn"),
    Cell("dn", dynamic=True),
    DN_DYLU_GRACE,
    MLA_DYLU_GRACE,
    SGD_DYLU_GRACE,
]
"""The cells that are also run from scratch and on the second corpus."""


def at_level(level: str, cells: Iterable[Cell] = TABLE_A) -> list[Cell]:
    """Return the cells of Table A at one level of heterogeneity."""
    return [replace(cell, level=level) for cell in cells]


TABLES: dict[str, list[Cell]] = {
    "table_a": [cell for level in LEVELS for cell in at_level(level)] + CONTROLS,
    "table_b": table_b(),
    "table_c": table_c(),
    "table_d": table_d(),
    "table_e": table_e(),
    "table_f": table_f(),
    "table_h": table_h(),
    "scratch": [replace(cell, warm_steps=0) for cell in COMMON_CELLS],
    "wikitext2": [replace(cell, corpus="wikitext2") for cell in COMMON_CELLS],
}


TUNED_WITH_MORE_WORKERS = [cell for cell in table_b() if cell.lr is None and 4 < cell.workers == tuning_workers(cell)]
TUNED = list(dict.fromkeys([*TABLE_A, *CONTROLS, *LATER_CELLS, *TUNED_WITH_MORE_WORKERS, *TABLES["scratch"]]))
"""The cells whose learning rates are tuned. All other cells use the rates of one of them."""
ONE_DOMAIN_CELLS = [replace(cell, corpus="domains", iid=False) for cell in (SYNC, DN_DYLU_GRACE, MLA_DYLU_GRACE)]
"""The cells that differ most from the cells whose learning rates they use."""
RATE_CHECKS = [outer_tuning(cell, lr) for cell in ONE_DOMAIN_CELLS for lr in (0.07, 0.7)]
"""Runs that check whether the neighboring rates on the grid are worse for these cells, too."""


def shrink(cells: Iterable[Cell]) -> list[Cell]:
    """Return the same cells with tiny models and few steps, so that a table takes a minute. For smoke tests."""
    return [
        replace(
            cell,
            size="smoke",
            local_steps=cell.local_steps if cell.local_steps == "auto" else max(1, cell.local_steps // 10),
            steps=0 if cell.seconds is not None else 8,
            seconds=None if cell.seconds is None else 8 * max(cell.seconds_per_step),
            warm_steps=min(4, cell.warm_steps),
            vocabulary=300,
            lr=(cell.lr or OUTER_GRID[-2]) if cell.has_outer_lr else None,
            stage=cell.stage if cell.stage is not None else first_stage_value(cell),
            inner_lr=cell.inner_lr or INNER_GRID[1],
        )
        for cell in cells
    ]
