"""One run: a cell with a seed, from its warm start to what is known of it at the end."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.study import text
from benchmarks.study.cells import Cell, strategy_options, strategy_quorum
from benchmarks.study.model import LanguageModel
from benchmarks.study.text import Corpus, Windows
from lightning_async_localsgd import AsyncLocalSGDCallback, SimulatedAsyncLocalSGDStrategy

LENGTH = 32
BATCH = 4
WARM_BATCH = 16
CURVE_POINTS = 20
CURVE_STEPS = 100
"""Steps between two points of a curve, at least."""
CURVE_WINDOWS = 256
FINAL_WINDOWS = 2048
WARM_LR = {"smoke": 1e-2, "0.5m": 2e-3, "1.5m": 2e-3, "4m": 1.5e-3}
GRADIENT_CLIP = 1.0
TIMELINE = (400.0, 480.0)
"""Seconds of a run of which it is kept who computed when."""


@dataclass(frozen=True)
class Places:
    """Where things are.

    Args:
        data: the text, see :data:`.CORPORA`.
        cache: tokens and warm starts.
        accelerator: what computes, ``"cpu"`` or ``"gpu"``; the real processes of table F are on the CPU in any case.

    """

    data: Path
    cache: Path
    accelerator: Literal["cpu", "gpu"] = "cpu"


def _commit() -> str:
    """Of the repository, with a plus where files of the package or of the study differ from it."""
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
"""Read when the code is, for a process may run for hours."""


def run(cell: Cell, seed: int, places: Places) -> dict[str, Any]:
    """Runs a cell whose learning rates are known.

    Returns:
        The line of JSON, without the name of the table.

    """
    quiet()
    if cell.processes:
        return _processes(cell, seed, places)
    start = warm_start(cell, seed, places)
    corpus = load(cell, places)
    began = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    module = prepare(cell, start)
    curve = Curve(cell, corpus)
    with tempfile.TemporaryDirectory(prefix="async_localsgd_study_") as folder:
        train = _alone if cell.method == "single" else _simulated
        found = train(cell, module, corpus, curve, Path(folder), trainer_options(places.accelerator))
    end = curve.finish(module, found["seconds"])
    return {
        **header(cell, seed, places.accelerator),
        **found,
        **end,
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


def quiet() -> None:
    """One thread, and nothing on the screen."""
    torch.set_num_threads(1)
    # Optimizer states of rare tokens fade to numbers that the processor handles slowly.
    torch.set_flush_denormal(True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def load(cell: Cell, places: Places) -> Corpus:
    """The text of a cell."""
    return text.load(cell.corpus, places.data, places.cache, cell.vocabulary, LENGTH)


def prepare(cell: Cell, start: Path | None) -> LanguageModel:
    """The module, with the weights of its warm start."""
    assert cell.inner_lr is not None
    module = LanguageModel(cell.size, cell.vocabulary, LENGTH, cell.inner_lr)
    if start is not None:
        module.load_state_dict(torch.load(start, weights_only=True))
    return module


def warm_start(cell: Cell, seed: int, places: Places) -> Path | None:
    """The file with the weights that a cell starts from; makes it if it is not there yet.

    They were trained synchronously, with batches of four workers' size and a learning rate that is constant after its
    warm-up.
    """
    if cell.warm_steps == 0:
        return None
    made = (cell.corpus, cell.vocabulary, cell.size, WARM_BATCH, LENGTH, cell.warm_steps, WARM_LR[cell.size], seed)
    path = places.cache / "warm" / f"{'-'.join(map(str, made))}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        # Whoever else needs it waits for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        pl.seed_everything(1000 + seed, verbose=False)
        module = LanguageModel(cell.size, cell.vocabulary, LENGTH, WARM_LR[cell.size], decay=False)
        trainer = pl.Trainer(max_steps=cell.warm_steps, logger=False, **trainer_options(places.accelerator))
        trainer.fit(module, text.loader(load(cell, places).mixture, WARM_BATCH))
        text.save(module.state_dict(), path)
    return path


def header(cell: Cell, seed: int, accelerator: str = "cpu") -> dict[str, Any]:
    """What was run, of which version and where."""
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
    """Its architecture, and its name where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return platform.machine()


class Curve(pl.Callback):
    """The validation loss along a run, over local updates of all workers and over the run's own time.

    Args:
        cell: what is run.
        corpus: its text.

    """

    def __init__(self, cell: Cell, corpus: Corpus) -> None:
        self._cell = cell
        self._corpus = corpus
        self.windows = corpus.validation_windows(CURVE_WINDOWS)
        self._points: list[tuple[int, float, float]] = []
        self._seconds: Callable[[], float] = lambda: 0.0

    @property
    def loader(self) -> DataLoader[Tensor]:
        """For the trainer's validations."""
        return DataLoader(Windows(self.windows), 64, collate_fn=text.as_it_is)

    @property
    def interval(self) -> int:
        """Steps of the trainer between two validations."""
        return min(self._cell.steps, max(CURVE_STEPS, self._cell.steps // CURVE_POINTS))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        done = trainer.global_step * self._cell.workers
        self._points.append((done, self._seconds(), pl_module.validation_loss))

    def begin(self, module: LanguageModel, seconds: Callable[[], float]) -> None:
        """The curve's first point is the loss before training; ``seconds`` tells the run's time from then on."""
        self._points = [(0, 0.0, evaluate(module, self.windows))]
        self._seconds = seconds

    def finish(self, module: LanguageModel, seconds: float) -> dict[str, Any]:
        """The curve, which ends with the final model after so many seconds, and its loss on more of the text."""
        end = self._cell.steps * self._cell.workers
        points = [point for point in self._points if point[0] < end]
        points.append((end, seconds, evaluate(module, self.windows)))
        return {
            "final_loss": round(evaluate(module, self._corpus.validation_windows(FINAL_WINDOWS)), 5),
            "curve": [[done, round(at, 2), round(loss, 4)] for done, at, loss in points],
        }


@torch.no_grad()
def evaluate(module: LanguageModel, windows: Tensor) -> float:
    """Mean cross-entropy of a module on windows."""
    module.eval()
    losses = [float(module.loss(batch.long())) * len(batch) for batch in torch.split(windows, 64)]
    return sum(losses) / len(windows)


class MemoryLogger(Logger):
    """Keeps what is logged under some names; the folder is where the run's summary is written."""

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
        """Nothing is done with them."""


COSINE = "async/momentum_cosine"


def _simulated(
    cell: Cell, module: LanguageModel, corpus: Corpus, curve: Curve, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Trains on the simulated cluster."""
    parts = [text.loader(part, BATCH) for part in corpus.train]
    strategy = SimulatedAsyncLocalSGDStrategy(
        seconds_per_step=cell.seconds_per_step,
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
    curve.begin(module, lambda: (strategy.phase and strategy.phase.virtual_seconds) or 0.0)
    trainer.fit(module, text.loader(corpus.mixture, BATCH) if cell.iid else None, curve.loader)
    cosine = [[step * cell.workers, round(value, 4)] for step, value in logger.logged[COSINE]]
    return {**of_the_run(cell, folder), "cosine": cosine, "timeline": _timeline(cell, _pushes(folder))}


def _alone(
    cell: Cell, module: LanguageModel, corpus: Corpus, curve: Curve, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Trains one worker, on the fastest device, with batches as large as those of all workers together."""
    trainer = pl.Trainer(
        max_steps=cell.steps,
        val_check_interval=curve.interval,
        logger=False,
        callbacks=[curve],
        **options,
    )
    step_seconds = min(cell.seconds_per_step) * cell.workers
    curve.begin(module, lambda: trainer.global_step * step_seconds)
    trainer.fit(module, text.loader(corpus.mixture, BATCH * cell.workers), curve.loader)
    return {"seconds": cell.steps * step_seconds}


def trainer_options(accelerator: str = "cpu") -> dict[str, Any]:
    """What every trainer of the study is told."""
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


def of_the_run(cell: Cell, folder: Path, time_scale: float = 1.0) -> dict[str, Any]:
    """What the run's own files say of it: its time, the age of its pushes and how long workers waited.

    Args:
        cell: what was run.
        folder: with the summary and the ledger.
        time_scale: seconds in them for a second of the devices.

    """
    summary = json.loads((folder / "async_localsgd_summary.json").read_text())
    ages = [push["staleness"] for push in _pushes(folder) if push["refused"] is None]
    waited = sum(worker["wait_seconds"] for worker in summary["workers"])
    return {
        "seconds": round(summary["seconds"] / time_scale, 2),
        "pushes": len(ages),
        "refused": summary["refusals"],
        "staleness": {
            "mean": round(statistics.fmean(ages), 3),
            "max": max(ages),
            "histogram": {str(age): count for age, count in sorted(Counter(ages).items())},
        },
        "waiting_share": round(waited / (cell.workers * summary["seconds"]), 4),
        "steps_by_worker": [worker["steps"] for worker in summary["workers"]],
    }


def _pushes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def _timeline(cell: Cell, pushes: list[dict[str, Any]]) -> list[list[float]]:
    """Who computed when: worker, begin and end of its rounds."""
    merged_at = dict.fromkeys(range(cell.workers), 0.0)
    spans = []
    for push in pushes:
        worker, seconds = push["worker"], push["steps"] * cell.seconds_per_step[push["worker"]]
        # What waits for others is merged, and the next round begun, when the last one has come.
        alone = strategy_quorum(cell) == 1
        begin = push["seconds"] - seconds if alone else merged_at[worker]
        merged_at[worker] = push["seconds"]
        if begin < TIMELINE[1] and begin + seconds > TIMELINE[0]:
            spans.append([worker, round(begin, 2), round(begin + seconds, 2)])
    return spans


def _processes(cell: Cell, seed: int, places: Places) -> dict[str, Any]:
    """Trains in real processes, one for each worker, which a script of their own starts."""
    warm_start(cell, seed, places)
    with tempfile.TemporaryDirectory(prefix="async_localsgd_study_") as folder:
        output = Path(folder) / "run.json"
        command = [sys.executable, "-m", "benchmarks.study.live", json.dumps(cell.as_dict()), "--seed", str(seed)]
        command += ["--data", str(places.data), "--cache", str(places.cache), "--output", str(output)]
        subprocess.run(command, cwd=text.ROOT, check=True)
        found: dict[str, Any] = json.loads(output.read_text())
    return found
