"""Run one cell with one seed: warm start, training and the result."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.study import text
from benchmarks.study.bandwidth import link_of
from benchmarks.study.cells import Cell, strategy_options, strategy_quorum
from benchmarks.study.equal_time import steps_in
from benchmarks.study.model import LanguageModel
from benchmarks.study.text import Corpus, Windows
from benchmarks.study.variants import follow_progress
from lightning_async_localsgd import AsyncLocalSGDCallback, SimulatedAsyncLocalSGDStrategy

LENGTH = 32
BATCH = 4
WARM_BATCH = 16
CURVE_POINTS = 20
CURVE_STEPS = 100
"""Minimum number of steps between two points of a curve."""
CURVE_WINDOWS = 256
FINAL_WINDOWS = 2048
WARM_LR = {"smoke": 1e-2, "0.5m": 2e-3, "1.5m": 2e-3, "4m": 1.5e-3}
GRADIENT_CLIP = 1.0
TIMELINE = (400.0, 480.0)
"""The part of a run, in seconds, for which the result contains the start and end of each round."""


@dataclass(frozen=True)
class RunContext:
    """Folders and device of a run.

    Args:
        data: folder with the text, see :data:`.CORPORA`.
        cache: folder for tokens and warm starts.
        accelerator: ``"cpu"`` or ``"gpu"``. The real processes of table F always use the CPU.

    """

    data: Path
    cache: Path
    accelerator: Literal["cpu", "gpu"] = "cpu"


def _commit() -> str:
    """Return the current commit, with a plus sign if files of the package or of the study are modified."""
    git = ["git", "-C", str(text.ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "src", "benchmarks/study"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


COMMIT = _commit()
"""Read at import, because the repository may change while a process runs for hours."""


def run(cell: Cell, seed: int, context: RunContext) -> dict[str, Any]:
    """Run a cell whose learning rates are known.

    Returns:
        The result for the line of JSON, without the name of the table.

    """
    configure_process()
    if cell.processes:
        return _train_in_processes(cell, seed, context)
    planned = cell
    if cell.seconds is not None:
        cell = replace(cell, steps=steps_in(cell))
    start = make_warm_start(cell, seed, context)
    corpus = load_corpus(cell, context)
    began = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    module = make_module(cell, start)
    curve = LossCurve(cell, corpus)
    with tempfile.TemporaryDirectory(prefix="async_localsgd_study_") as folder:
        train = _train_simulated if cell.workers_apart else _train_single
        result = train(cell, module, corpus, curve, Path(folder), trainer_options(context.accelerator))
    losses = curve.finish(module, result["seconds"])
    return {
        **describe_run(planned, seed, context.accelerator),
        **({} if planned.seconds is None else {"steps": cell.steps}),
        **result,
        **losses,
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


def configure_process() -> None:
    """Use one thread, and print neither log messages nor warnings of Lightning."""
    torch.set_num_threads(1)
    # The optimizer states of rare tokens decay to denormal numbers, which are slow to process.
    torch.set_flush_denormal(True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def load_corpus(cell: Cell, context: RunContext) -> Corpus:
    """Load the text of a cell."""
    return text.load_corpus(cell.corpus, context.data, context.cache, cell.vocabulary, LENGTH)


def make_module(cell: Cell, start: Path | None) -> LanguageModel:
    """Create the module, and load the weights of the warm start."""
    assert cell.inner_lr is not None
    module = LanguageModel(cell.size, cell.vocabulary, LENGTH, cell.inner_lr)
    if start is not None:
        module.load_state_dict(torch.load(start, weights_only=True))
    return module


def make_warm_start(cell: Cell, seed: int, context: RunContext) -> Path | None:
    """Return the file with the initial weights of a cell, and train them if the file does not exist.

    The weights are trained synchronously, with batches as large as those of four workers together and a learning rate
    that is constant after its warm-up.

    Returns:
        The file, or None if the cell starts from random weights.

    """
    if cell.warm_steps == 0:
        return None
    key = (cell.corpus, cell.vocabulary, cell.size, WARM_BATCH, LENGTH, cell.warm_steps, WARM_LR[cell.size], seed)
    path = context.cache / "warm" / f"{'-'.join(map(str, key))}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        # Other processes that need the same file wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        pl.seed_everything(1000 + seed, verbose=False)
        module = LanguageModel(cell.size, cell.vocabulary, LENGTH, WARM_LR[cell.size], decay=False)
        trainer = pl.Trainer(max_steps=cell.warm_steps, logger=False, **trainer_options(context.accelerator))
        trainer.fit(module, text.make_loader(load_corpus(cell, context).mixture, WARM_BATCH))
        text.save_atomically(module.state_dict(), path)
    return path


def describe_run(cell: Cell, seed: int, accelerator: str = "cpu") -> dict[str, Any]:
    """Return cell, seed, commit and machine of a run."""
    device = f"{torch.cuda.get_device_name()}, " if accelerator == "gpu" else ""
    return {
        "cell": cell.as_dict(),
        "seed": seed,
        "batch": [BATCH, LENGTH],
        "commit": COMMIT,
        "machine": f"{device}{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
    }


def _processor() -> str:
    """Return the architecture of the processor, and its name if the system provides it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return platform.machine()


class LossCurve(pl.Callback):
    """Records the validation loss of a run, over local updates of all workers and over the time of the devices.

    Args:
        cell: the cell that is run.
        corpus: the text of the cell.

    """

    def __init__(self, cell: Cell, corpus: Corpus) -> None:
        self._cell = cell
        self._corpus = corpus
        self.windows = corpus.validation_windows(CURVE_WINDOWS)
        self._points: list[tuple[int, float, float]] = []
        self._seconds: Callable[[], float] = lambda: 0.0

    @property
    def loader(self) -> DataLoader[Tensor]:
        """The data loader for the trainer's validations."""
        return DataLoader(Windows(self.windows), 64, collate_fn=text.keep_batch)

    @property
    def interval(self) -> int:
        """The number of the trainer's steps between two validations."""
        return min(self._cell.steps, max(CURVE_STEPS, self._cell.steps // CURVE_POINTS))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        updates = trainer.global_step * self._cell.batches_per_step
        self._points.append((updates, self._seconds(), pl_module.validation_loss))

    def begin(self, module: LanguageModel, seconds: Callable[[], float]) -> None:
        """Start the curve with the loss before training.

        Args:
            module: the module before training.
            seconds: returns the time of the devices since the start of training.

        """
        self._points = [(0, 0.0, evaluate(module, self.windows))]
        self._seconds = seconds

    def finish(self, module: LanguageModel, seconds: float) -> dict[str, Any]:
        """End the curve with the final model, and return the curve and the loss of the final model on more text.

        Args:
            module: the module after training.
            seconds: time of the devices at the end of training.

        """
        end = self._cell.steps * self._cell.batches_per_step
        points = [point for point in self._points if point[0] < end]
        points.append((end, seconds, evaluate(module, self.windows)))
        return {
            "final_loss": round(evaluate(module, self._corpus.validation_windows(FINAL_WINDOWS)), 5),
            "curve": [[updates, round(at, 2), round(loss, 4)] for updates, at, loss in points],
        }


@torch.no_grad()
def evaluate(module: LanguageModel, windows: Tensor) -> float:
    """Compute the mean cross-entropy of a module on windows."""
    module.eval()
    losses = [float(module.loss(batch.long())) * len(batch) for batch in torch.split(windows, 64)]
    return sum(losses) / len(windows)


class MemoryLogger(Logger):
    """Keeps the values logged under some names in memory.

    Args:
        folder: where the strategy writes the summary of the run.
        names: of the values to keep.

    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        super().__init__()
        self._folder = folder
        self._names = names
        self.logged: dict[str, list[tuple[int, float]]] = {name: [] for name in names}

    @property
    def name(self) -> str:
        return "study"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name in self._names:
            if name in metrics:
                self.logged[name].append((step or 0, float(metrics[name])))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters."""


COSINE = "async/momentum_cosine"


def _train_simulated(
    cell: Cell, module: LanguageModel, corpus: Corpus, curve: LossCurve, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Train on the simulated cluster."""
    parts = [text.make_loader(part, BATCH) for part in corpus.train]
    strategy = SimulatedAsyncLocalSGDStrategy(
        seconds_per_step=cell.seconds_per_step,
        exchange_seconds=link_of(cell, sum(parameter.numel() for parameter in module.parameters())),
        upload=cell.upload,
        download=cell.download,
        overlap=cell.overlap,
        worker_data=None if cell.iid else parts.__getitem__,
        **strategy_options(cell),
    )
    logger = MemoryLogger(folder, (COSINE,))
    callback = AsyncLocalSGDCallback(table=False, ledger=folder / "ledger.jsonl")
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=cell.steps,
        val_check_interval=curve.interval,
        logger=logger,
        callbacks=[curve, callback],
        **options,
    )
    follow_progress(strategy, trainer, cell.early_local_steps)
    curve.begin(module, lambda: (strategy.runtime and strategy.runtime.virtual_seconds) or 0.0)
    trainer.fit(module, text.make_loader(corpus.mixture, BATCH) if cell.iid else None, curve.loader)
    cosine = [[step * cell.workers, round(value, 4)] for step, value in logger.logged[COSINE]]
    return {**read_run_files(cell, folder), "cosine": cosine, "timeline": _timeline(cell, _read_ledger(folder))}


def _train_single(
    cell: Cell, module: LanguageModel, corpus: Corpus, curve: LossCurve, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Train a single model: on the fastest device, with batches of one worker or of all of them, or as DDP does."""
    trainer = pl.Trainer(
        max_steps=cell.steps,
        val_check_interval=curve.interval,
        logger=False,
        callbacks=[curve],
        **options,
    )
    if cell.method == "ddp":
        step_seconds = max(cell.seconds_per_step) + 2.0 * cell.exchange_seconds
    else:
        step_seconds = min(cell.seconds_per_step) * cell.batches_per_step
    curve.begin(module, lambda: trainer.global_step * step_seconds)
    trainer.fit(module, text.make_loader(corpus.mixture, BATCH * cell.batches_per_step), curve.loader)
    return {"seconds": cell.steps * step_seconds}


def trainer_options(accelerator: str = "cpu") -> dict[str, Any]:
    """Return the options that all trainers of the study have in common."""
    return {
        "accelerator": accelerator,
        "devices": 1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 25,
        "gradient_clip_val": GRADIENT_CLIP,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }


def read_run_files(cell: Cell, folder: Path, time_scale: float = 1.0) -> dict[str, Any]:
    """Read time, bytes, staleness of the pushes, and waiting times of the workers from the files of a run.

    Args:
        cell: the cell that was run.
        folder: contains the summary and the ledger.
        time_scale: seconds in these files per second of the devices.

    """
    summary = json.loads((folder / "async_localsgd_summary.json").read_text())
    staleness = [push["staleness"] for push in _read_ledger(folder) if push["refused"] is None]
    waited, exchanged = (
        sum(worker[name] for worker in summary["workers"]) / (cell.workers * summary["seconds"])
        for name in ("wait_seconds", "exchange_seconds")
    )
    return {
        "seconds": round(summary["seconds"] / time_scale, 2),
        "pushes": len(staleness),
        "refused": summary["refusals"],
        "staleness": {
            "mean": round(statistics.fmean(staleness), 3),
            "max": max(staleness),
            "histogram": {str(versions): count for versions, count in sorted(Counter(staleness).items())},
        },
        "waiting_share": round(waited, 4),
        "exchange_share": round(exchanged, 4),
        "bytes": summary["bytes_sent"] + summary["bytes_received"],
        "steps_by_worker": [worker["steps"] for worker in summary["workers"]],
    }


def _read_ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def _timeline(cell: Cell, pushes: list[dict[str, Any]]) -> list[list[float]]:
    """Return worker, start and end of each round in the part :data:`TIMELINE` of the run."""
    merged_at = dict.fromkeys(range(cell.workers), 0.0)
    spans = []
    for push in pushes:
        worker, seconds = push["worker"], push["steps"] * cell.seconds_per_step[push["worker"]]
        # With a quorum, a push is merged when the last push of the group arrives. Then the next round starts.
        merged_at_once = strategy_quorum(cell) == 1
        begin = push["seconds"] - seconds if merged_at_once else merged_at[worker]
        merged_at[worker] = push["seconds"]
        if begin < TIMELINE[1] and begin + seconds > TIMELINE[0]:
            spans.append([worker, round(begin, 2), round(begin + seconds, 2)])
    return spans


def _train_in_processes(cell: Cell, seed: int, context: RunContext) -> dict[str, Any]:
    """Train in real processes, one for each worker. The script ``live.py`` starts them."""
    make_warm_start(cell, seed, context)
    with tempfile.TemporaryDirectory(prefix="async_localsgd_study_") as folder:
        output = Path(folder) / "run.json"
        command = [sys.executable, "-m", "benchmarks.study.live", json.dumps(cell.as_dict()), "--seed", str(seed)]
        command += ["--data", str(context.data), "--cache", str(context.cache), "--output", str(output)]
        subprocess.run(command, cwd=text.ROOT, check=True)
        result: dict[str, Any] = json.loads(output.read_text())
    return result
