"""What the study compares: methods, devices, and the cells of every table.

A cell is one configuration; with a seed it is one run. Cells of different tables may be the same configuration, which
is then run once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

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
"""Seconds a step of each device. All levels have the same speed in all, 4.02 steps a second; ``very`` is the paper's.
More than four workers are so many such sets."""

INNER_GRID = (3e-4, 1e-3, 2e-3, 4e-3)
OUTER_GRID = (0.007, 0.02, 0.07, 0.2, 0.7, 2.0)
OUTER_WITH_INNER = OUTER_GRID[1:-1]
"""Those that are tried with each inner learning rate."""
WALK_FROM = {"warm": 0.07, "scratch": 0.2}
"""Where on the outer grid tuning begins: from there it goes on in the direction that is better, to the first value that
is worse."""
STAGE_GRID: dict[str, tuple[float, ...]] = {"delay": (1.0, 30.0, 1000.0), "cosine_dn": (0.0, -0.2, -1.0)}
"""Of the staleness stages that have a value of their own to tune: the strength of delay compensation, and the cosine
below which a push is dropped. The learning rate is tuned with the first one."""
MOST_TUNED_WORKERS = {"mla": 16}
"""Learning rates are tuned for so many workers at most, and used for more of them; those that are not named for eight.
MLA's rate for eight is far too large for sixteen."""

METHODS: dict[str, str] = {
    "single": "single worker, k-fold batch",
    "sync": "sync DiLoCo",
    "nesterov": "async Nesterov",
    "sgd": "async SGD",
    "buffer": "Buffer (FedBuff)",
    "poly": "async Nesterov, Poly",
    "polythres": "async Nesterov, PolyThres",
    "delay": "async Nesterov, delay compensation",
    "dn": "DN",
    "mla": "MLA",
    "heloco_mla": "HeLoCo + MLA",
    "heloco_dn": "HeLoCo + DN",
    "cosine_dn": "DN, exponential with cut-off",
    "quorum2": "quorum 2, RDA, Nesterov",
    "quorum3": "quorum 3, RDA, Nesterov",
}
"""What the tables call each method."""


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Args:
        method: one of :data:`METHODS`.
        dynamic: whether slower workers take fewer steps (DyLU).
        grace: the grace window.
        level: how unequal the devices are, one of :data:`LEVELS`.
        workers: a multiple of four.
        corpus: one of :data:`.CORPORA`.
        iid: whether every worker draws from all of it; else it has one domain to itself.
        size: one of :data:`.SIZES`.
        local_steps: H.
        steps: local steps of all workers together, divided by the number of workers.
        warm_steps: steps of the checkpoint that training starts from; 0 is random weights.
        lr: of the outer optimizer; None is the tuned one.
        stage: of the staleness stage, see :data:`STAGE_GRID`; None is the tuned one.
        inner_lr: peak of the inner one; None is the tuned one.
        period: N of DN; None is the number of workers.
        activation: c of DN.
        vocabulary: size of the byte pair encoding.
        processes: real processes on emulated devices instead of the simulation.

    """

    method: str
    dynamic: bool = False
    grace: Literal["auto"] | float = 0.0
    level: str = "very"
    workers: int = 4
    corpus: str = "c4"
    iid: bool = True
    size: str = "0.5m"
    local_steps: int = 20
    steps: int = 2000
    warm_steps: int = 1500
    lr: float | None = None
    inner_lr: float | None = None
    period: int | None = None
    activation: float = 0.0
    vocabulary: int = 2048
    processes: bool = False
    stage: float | None = None

    @property
    def seconds_per_step(self) -> tuple[float, ...]:
        """Of each worker's device."""
        return LEVELS[self.level] * (self.workers // 4)

    @property
    def label(self) -> str:
        """What a table calls the method."""
        extras = [*(["DyLU"] if self.dynamic else []), *(["grace"] if self.grace else [])]
        return " + ".join([METHODS[self.method], *extras])

    @property
    def independent_of_devices(self) -> bool:
        """Whether the devices decide about the time alone: everybody waits for everybody, and takes equal steps."""
        return self.method == "single" or (self.method == "sync" and not self.dynamic)

    def canonical(self) -> Cell:
        """The cell that is run for this one."""
        return replace(self, level="very") if self.independent_of_devices and not self.processes else self

    def slowdown(self) -> float:
        """How many times as long this cell takes as its canonical one."""
        mine, run = self.seconds_per_step, self.canonical().seconds_per_step
        # A single worker is the fastest device; synchronous rounds last as long as the slowest.
        return min(mine) / min(run) if self.method == "single" else max(mine) / max(run)

    def as_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def tuned_workers(cell: Cell) -> int:
    """The number of workers with which a cell's learning rate is tuned."""
    return min(cell.workers, MOST_TUNED_WORKERS.get(cell.method, 8))


def outer_optimizer(cell: Cell) -> OuterOptimizer:
    """The outer optimizer of a cell whose learning rate is known."""
    assert cell.lr is not None
    match cell.method:
        case "sgd":
            return SGD(cell.lr)
        case "buffer":
            return Buffer(cell.lr, MOMENTUM)
        case "mla":
            return LookAhead(cell.lr, MOMENTUM)
        case "heloco_mla":
            return HeLoCo(LookAhead(cell.lr, MOMENTUM))
        case "heloco_dn":
            return HeLoCo(DelayedNesterov(cell.lr, MOMENTUM))
        case "dn" | "cosine_dn":
            return DelayedNesterov(cell.lr, MOMENTUM, cell.period or "auto", cell.activation)
        case _:
            return Nesterov(cell.lr, MOMENTUM)


def staleness(cell: Cell) -> Staleness | None:
    """What a cell does to stale pushes."""
    match cell.method:
        case "poly":
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
    """How many workers hand in before their pushes are merged."""
    quorums: dict[str, int | str] = {"sync": "all", "quorum2": 2, "quorum3": 3}
    return quorums.get(cell.method, 1)


def strategy_options(cell: Cell) -> dict[str, Any]:
    """What the simulated and the live strategy are told alike."""
    quorum = strategy_quorum(cell)
    return {
        "local_steps": cell.local_steps,
        "outer_optimizer": outer_optimizer(cell),
        "dynamic_local_steps": cell.dynamic,
        "grace": cell.grace,
        "quorum": quorum,
        "staleness": staleness(cell),
        "merge": MergeOptions(average="rda") if quorum in (2, 3) else None,
        "checkpoint_every": None,
    }


# ---------------------------------------------------------------------- tables

BEST = Cell("dn", dynamic=True, grace="auto")
SYNC = Cell("sync")
MLA = Cell("mla", dynamic=True, grace="auto")
"""The one of the rules after the paper that is compared with DN in the other tables, too."""
MLA_BETWEEN = replace(MLA, workers=16, lr=0.14)
"""With a rate that is not on the grid. On both sides of the best one there, 0.07, the loss rises steeply."""
NESTEROV = Cell("nesterov")
AT_ONCE = [Cell(method) for method in ("nesterov", "sgd", "buffer", "poly", "polythres", "delay", "dn")]
DYLU_ROUNDS = replace(SYNC, local_steps=11)
"""As many outer rounds as with DyLU at ``very``: rounds of 20, 15, 7 and 3 steps are 11.25 in the mean."""
CONTROLS = [DYLU_ROUNDS, Cell("sync", dynamic=True)]
TABLE_A = [Cell("single"), SYNC, *AT_ONCE, Cell("dn", dynamic=True), BEST, MLA]
LATER_RULES = ("dn", "mla", "heloco_mla", "heloco_dn", "cosine_dn", "quorum2", "quorum3")
RULES = [cell for rule in LATER_RULES for cell in (Cell(rule), Cell(rule, dynamic=True, grace="auto"))]
ROUND_SECONDS = 20 * 0.58
"""Of the fastest device with H = 20, which with DyLU is everybody's, about."""
GRACE_SHARES = (0.0, 0.05, 0.10, 0.15, 0.30)
SHORT = 1000
"""Steps a worker in the runs that tune the inner learning rate: half of the others'."""


def first_stage(cell: Cell) -> float | None:
    """The value of a staleness stage with which the learning rate of a cell is tuned; None where there is none."""
    return STAGE_GRID.get(cell.method, (None,))[0]


def inner_tuning() -> list[Cell]:
    """The peak of the inner learning rate, for the single worker and, with every outer one, for synchronous DiLoCo."""
    alike = [*(replace(SYNC, lr=outer) for outer in OUTER_WITH_INNER), Cell("single")]
    return [replace(cell, inner_lr=inner, steps=SHORT) for inner in INNER_GRID for cell in alike]


def outer_tuning(cell: Cell, lr: float) -> Cell:
    """The run that tries an outer learning rate for a method.

    It is as long as every other: in half the length, rates that lose at first what they gain later look too large.
    """
    return replace(cell, lr=lr, stage=first_stage(cell))


def table_b() -> list[Cell]:
    """Numbers of workers."""
    tuned = [replace(cell, workers=workers) for workers in (4, 8, 16) for cell in (SYNC, NESTEROV, BEST, MLA)]
    return [*tuned, MLA_BETWEEN]


def table_c() -> list[Cell]:
    """Sizes of the model."""
    return [replace(cell, size=size) for size in ("0.5m", "1.5m", "4m") for cell in (SYNC, NESTEROV, BEST, MLA)]


def table_d() -> list[Cell]:
    """What Delayed Nesterov, the grace window and H do."""
    activations = [replace(BEST, activation=value) for value in (0.0, 0.1, 0.25)]
    periods = [replace(BEST, period=value) for value in (1, 2, None, 8)]
    windows = [replace(BEST, grace=round(share * ROUND_SECONDS, 2)) for share in GRACE_SHARES]
    return list(dict.fromkeys([*activations, *periods, *windows, BEST]))


def table_h() -> list[Cell]:
    """Longer rounds."""
    return [replace(cell, local_steps=50, steps=5000) for cell in (SYNC, NESTEROV, Cell("dn", dynamic=True), BEST, MLA)]


def table_e() -> list[Cell]:
    """The rules after the paper, on shards that are alike and on one domain a worker."""
    mixed = [replace(cell, corpus="domains") for cell in (SYNC, BEST)]
    apart = [replace(cell, corpus="domains", iid=False) for cell in (SYNC, *RULES)]
    return [*RULES, *mixed, *apart]


def table_f() -> list[Cell]:
    """Real processes."""
    return [replace(cell, processes=True) for cell in (SYNC, BEST)]


ELSEWHERE = [SYNC, NESTEROV, Cell("sgd"), Cell("dn"), Cell("dn", dynamic=True), BEST, MLA]
"""What is compared from scratch and on the second corpus."""


def at(level: str, cells: Iterable[Cell] = TABLE_A) -> list[Cell]:
    """The cells of Table A at one level."""
    return [replace(cell, level=level) for cell in cells]


TABLES: dict[str, list[Cell]] = {
    "table_a": [cell for level in LEVELS for cell in at(level)] + CONTROLS,
    "table_b": table_b(),
    "table_c": table_c(),
    "table_d": table_d(),
    "table_e": table_e(),
    "table_f": table_f(),
    "table_h": table_h(),
    "scratch": [replace(cell, warm_steps=0) for cell in ELSEWHERE],
    "wikitext2": [replace(cell, corpus="wikitext2") for cell in ELSEWHERE],
}


MORE_WORKERS = [cell for cell in table_b() if cell.lr is None and 4 < cell.workers == tuned_workers(cell)]
TUNED = list(dict.fromkeys([*TABLE_A, *CONTROLS, *RULES, *MORE_WORKERS, *TABLES["scratch"]]))
"""All that have learning rates of their own; what else there is uses theirs."""
APART = [replace(cell, corpus="domains", iid=False) for cell in (SYNC, BEST, MLA)]
"""Of what uses others' learning rates, the furthest from those that they were tuned for."""
CHECKED = [outer_tuning(cell, lr) for cell in APART for lr in (0.07, 0.7)]
"""Whether the rates on both sides, too, are worse for them."""


def small(cells: Iterable[Cell]) -> list[Cell]:
    """The same cells, so small that a table takes a minute: to see that everything works."""
    return [
        replace(
            cell,
            size="smoke",
            local_steps=max(1, cell.local_steps // 10),
            steps=8,
            warm_steps=min(4, cell.warm_steps),
            vocabulary=300,
            lr=None if cell.method == "single" else cell.lr or OUTER_GRID[-2],
            stage=cell.stage if cell.stage is not None else first_stage(cell),
            inner_lr=cell.inner_lr or INNER_GRID[1],
        )
        for cell in cells
    ]
