"""Types of the names for ``pytorch_lightning``, as type checkers see them.

The classes are made at run time from those for ``lightning``, see :mod:`._mirror`. A test compares both.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import DDPStrategy
from torch.optim import Optimizer

from lightning_async_localsgd.faults import Fault as Fault
from lightning_async_localsgd.faults import FaultKind as FaultKind
from lightning_async_localsgd.launch.restarts import WorkersLostError as WorkersLostError
from lightning_async_localsgd.outer import DelayedNesterov as DelayedNesterov
from lightning_async_localsgd.outer import OuterOptimizer as OuterOptimizer
from lightning_async_localsgd.outer import TorchOptimizer as TorchOptimizer
from lightning_async_localsgd.policies.worker_batches import BatchSize, BatchSizes
from lightning_async_localsgd.protocol.exchange import TooFewWorkersError as TooFewWorkersError
from lightning_async_localsgd.protocol.options import ExchangeOptions as ExchangeOptions
from lightning_async_localsgd.runtime.base import Runtime
from lightning_async_localsgd.server.merge_policy import MergeOptions as MergeOptions
from lightning_async_localsgd.server.observers import RunObserver as RunObserver
from lightning_async_localsgd.simulation.devices import Arrival as Arrival
from lightning_async_localsgd.simulation.devices import Death as Death
from lightning_async_localsgd.simulation.devices import Link as Link
from lightning_async_localsgd.simulation.devices import Slowdown as Slowdown
from lightning_async_localsgd.simulation.devices import StepSeconds as StepSeconds
from lightning_async_localsgd.staleness import Staleness as Staleness

__all__ = [
    "Arrival",
    "AsyncLocalSGDCallback",
    "AsyncLocalSGDStrategy",
    "Death",
    "DelayedNesterov",
    "EmulatedDevices",
    "ExchangeOptions",
    "Fault",
    "FaultInjection",
    "FaultKind",
    "Link",
    "MergeOptions",
    "OuterOptimizer",
    "RunObserver",
    "SimulatedAsyncLocalSGDStrategy",
    "Slowdown",
    "Staleness",
    "StepSeconds",
    "TooFewWorkersError",
    "TorchOptimizer",
    "WorkersLostError",
]

class _StrategyBase(DDPStrategy):
    strategy_name: str
    run_name: str
    outer_optimizer: OuterOptimizer
    exchange: ExchangeOptions
    min_workers: int
    checkpoint_every: int | timedelta | None
    @property
    def runtime(self) -> Runtime | None: ...
    def add_observer(self, observer: RunObserver) -> None: ...

class AsyncLocalSGDStrategy(_StrategyBase):
    max_restarts: int
    fail_on_lost_workers: bool
    expected_workers: int | None
    evaluator: bool
    def __init__(
        self,
        local_steps: int | Literal["auto"] = "auto",
        outer_optimizer: OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
        dynamic_local_steps: bool = True,
        grace: Literal["auto"] | float = "auto",
        quorum: int | Literal["all"] = 1,
        sync_warmup_steps: int | Literal["auto"] = 0,
        staleness: Staleness | None = None,
        merge: MergeOptions | None = None,
        exchange: ExchangeOptions | None = None,
        max_restarts: int = 3,
        fail_on_lost_workers: bool = False,
        expected_workers: int | None = None,
        min_workers: int = 1,
        batch_size: BatchSizes | None = None,
        evaluator: bool = False,
        checkpoint_every: int | timedelta | None = ...,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = ...,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None: ...

class SimulatedAsyncLocalSGDStrategy(_StrategyBase):
    worker_data: Callable[[int], Any] | None
    inner_states_on_cpu: bool
    seed: int
    def __init__(
        self,
        seconds_per_step: Sequence[float | StepSeconds] = ...,
        exchange_seconds: float | Link | Sequence[float | Link] = 0.0,
        schedule: Sequence[Slowdown | Death | Arrival] = (),
        worker_data: Callable[[int], Any] | None = None,
        inner_states_on_cpu: bool = False,
        seed: int = 0,
        replay: str | PathLike[str] | None = None,
        local_steps: int | Literal["auto"] = "auto",
        outer_optimizer: OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
        dynamic_local_steps: bool = True,
        grace: Literal["auto"] | float = "auto",
        quorum: int | Literal["all"] = 1,
        sync_warmup_steps: int | Literal["auto"] = 0,
        staleness: Staleness | None = None,
        merge: MergeOptions | None = None,
        overlap: bool = False,
        upload: Literal["fp32", "bf16", "int8", "int4"] = "fp32",
        download: Literal["fp32", "bf16", "int8"] = "fp32",
        min_workers: int = 1,
        batch_size: dict[int, BatchSize] | None = None,
        pause_timeout: float = 1800.0,
        checkpoint_every: int | timedelta | None = ...,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None: ...
    @property
    def virtual_seconds(self) -> float | None: ...

class AsyncLocalSGDCallback(Callback):
    table: bool
    per_worker: bool
    events: Path | str | PathLike[str] | None
    max_event_megabytes: float | None
    recording: Path | None
    def __init__(
        self,
        table: bool = True,
        events: str | PathLike[str] | None = "auto",
        max_event_megabytes: float | None = 256,
        recording: str | PathLike[str] | None = None,
        per_worker: bool = False,
    ) -> None: ...

class EmulatedDevices(Callback):
    seconds_per_step: list[float]
    def __init__(self, seconds_per_step: Sequence[float]) -> None: ...
    def total_speed(self, world_size: int) -> float: ...

class FaultInjection(Callback):
    faults: list[Fault]
    def __init__(self, faults: list[Fault]) -> None: ...
