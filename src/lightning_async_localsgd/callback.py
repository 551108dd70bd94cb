"""What an asynchronous run shows of itself: metrics, a progress bar over the whole budget, and a table at the end."""

from __future__ import annotations

import json
import statistics
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_async_localsgd.events import Event, fingerprint
from lightning_async_localsgd.hyperparameters import switch
from lightning_async_localsgd.ledger import Ledger
from lightning_async_localsgd.records import FORMER

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.phase_base import Phase
    from lightning_async_localsgd.records import View
    from lightning_async_localsgd.training import AsyncTraining

SUMMARY_FILE = "async_localsgd_summary.json"

_PER_WORKER = ("staleness", "local_steps", "wait_seconds", "exchange_seconds", "steps_per_second")


class AsyncLocalSGDCallback(Callback):
    """Logs the run's metrics on rank 0, for every worker and as means, and sums the run up at its end.

    The strategy adds one if there is none. Metrics go through ``self.log`` to the trainer's loggers, every
    ``log_every_n_steps`` steps of rank 0:

    * for every worker n (``async/staleness/worker_n``) and as the mean over workers (``async/staleness``):
      ``staleness`` (versions), ``local_steps`` (of the current round), ``wait_seconds`` (before the last dispatch),
      ``exchange_seconds`` (the last exchange, without the waiting), ``steps_per_second`` (of computing);
    * for the run: ``async/version`` (pushes applied), ``async/alive_workers``, ``async/merging_workers`` (whose pushes
      were among the latest), ``async/update_norm`` (of the last pseudo-gradient), ``async/momentum_cosine`` (between it
      and the outer momentum), ``async/refused_pushes`` and, for each kind that there was, how many of that kind
      (``async/refused_pushes/not_finite``), ``async/bytes_sent`` and ``async/bytes_received`` (by the server, over the
      network or sockets); in a simulated run ``async/virtual_seconds`` (since the start of training).

    At the end a table of the workers is printed, and the same numbers are written to ``async_localsgd_summary.json``
    in the trainer's log directory (with ``logger=False`` there is none).

    Args:
        table: whether the table is printed at the end.
        ledger: file to which rank 0 appends a line of JSON for every push that was applied or refused, with the fields
            of :class:`.Settled`; None for no such file. It is made, with its folder, if it is not there.
        events: file to which rank 0 writes everything that happens to the server, as lines of JSON with the fields of
            :class:`.Event`; None for no such file. :class:`.SimulatedAsyncLocalSGDStrategy` plays it again.

    Raises:
        ValueError: ``ledger`` or ``events`` is no path of a file, or both are the same one.

    Example::

        import lightning as L
        from lightning_async_localsgd import AsyncLocalSGDCallback

        trainer = L.Trainer(strategy="async_localsgd", devices=4, callbacks=[AsyncLocalSGDCallback(table=False)])

    """

    def __init__(
        self,
        table: bool = True,
        ledger: str | PathLike[str] | None = None,
        events: str | PathLike[str] | None = None,
    ) -> None:
        if ledger is not None and (not str(ledger) or Path(ledger).is_dir()):
            raise ValueError(f"ledger must be the path of a file, or None for no ledger, got {ledger!r}")
        if events is not None and (not str(events) or Path(events).is_dir()):
            raise ValueError(f"events must be the path of a file, or None for no log of events, got {events!r}")
        if ledger is not None and events is not None and Path(ledger).absolute() == Path(events).absolute():
            raise ValueError(f"ledger and events are both {str(ledger)!r}; give each a file of its own")
        self.table = switch("table", table)
        self.ledger = None if ledger is None else Path(ledger)
        self.events = None if events is None else Path(events)
        self._bar: _GlobalProgress | None = None
        self._open_ledger: Ledger | None = None
        self._open_events: Ledger | None = None

    def on_async_phase_start(self, trainer: pl.Trainer, phase: Phase) -> None:
        """Called by the strategy, on every rank, when the asynchronous phase has begun and before its first epoch."""
        if phase.server is not None:
            self._bar = _take_over(trainer.progress_bar_callback, phase)
            if self.ledger is not None:
                self._open_ledger = Ledger(self.ledger)
            phase.server.record(None if self._open_ledger is None else self._open_ledger.write)
            if self.events is not None:
                self._open_events = Ledger(self.events, "event log", "events")
            phase.server.record_events(None if self._open_events is None else self._open_events.write)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (training := _training_of(trainer)) is not None:
            training.before_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (training := _training_of(trainer)) is not None:
            training.before_batch()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training = _training_of(trainer)
        if training is None:
            return
        training.after_batch()
        if training.phase.server is None or not trainer.loggers:
            return
        # Only where the loggers will take it: with many workers this is many values.
        if trainer._logger_connector.should_update_logs:
            for name, value in run_metrics(training.phase).items():
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        training = _training_of(trainer)
        if training is None:
            return
        training.end_epoch()
        empty = trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0
        # Of leased data a slow rank may get nothing in an epoch that the others have used up.
        if empty and not training.global_epochs and not trainer.should_stop:
            raise RuntimeError(
                f"the training data of rank {trainer.global_rank} gave no batch in epoch {trainer.current_epoch}, and "
                "the budget is not met: data that can be read only once, or has fewer shards than there are ranks, "
                "cannot fill a run; make it iterable again, or lower max_steps"
            )
        # A loop that ends by itself has everybody hand in what they have before checkpoints are saved.
        if (trainer.should_stop and trainer.fit_loop._can_stop_early) or training.ends_with_this_epoch:
            training.finish()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._give_back_bar()
        self._close_files()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close_files()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        training = _training_of(trainer)
        if training is not None:
            training.finish()
        self._give_back_bar()
        if training is None or training.phase.server is None:
            return
        if self._open_events is not None:
            self._open_events.write(_end_of(training.phase))
        summary = run_summary(training.phase)
        # Without a logger there is no log directory, only the working directory: nothing is written there unasked.
        if trainer.loggers and trainer.log_dir is not None:
            path = Path(trainer.log_dir) / SUMMARY_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary, indent=2) + "\n")
        if self.table:
            rank_zero_info("\n" + format_table(summary))
        if summary["held_back"]:
            rank_zero_warn(_held_back(summary))

    def _close_files(self) -> None:
        for file in (self._open_ledger, self._open_events):
            if file is not None:
                file.close()
        self._open_ledger = self._open_events = None

    def _give_back_bar(self) -> None:
        if self._bar is not None:
            self._bar.give_back()
            self._bar = None


def run_metrics(phase: Phase) -> dict[str, float]:
    """The metrics of the run at this moment, by the names they are logged under. For rank 0."""
    assert phase.server is not None
    view: View = phase.server.view
    metrics: dict[str, float] = {
        "async/version": view.version,
        "async/alive_workers": view.alive_workers,
        "async/merging_workers": view.merging_workers,
        "async/refused_pushes": view.refused_pushes,
        "async/bytes_sent": phase.bytes_sent,
        "async/bytes_received": phase.bytes_received,
        **{f"async/refused_pushes/{kind}": count for kind, count in view.refusals.items()},
    }
    if phase.virtual_seconds is not None:
        metrics["async/virtual_seconds"] = phase.virtual_seconds
    if view.update_norm is not None:
        metrics["async/update_norm"] = view.update_norm
    if view.momentum_cosine is not None:
        metrics["async/momentum_cosine"] = view.momentum_cosine
    for name in _PER_WORKER:
        values = {n: getattr(worker, name) for n, worker in view.workers.items() if getattr(worker, name) is not None}
        metrics.update({f"async/{name}/worker_{worker}": float(value) for worker, value in sorted(values.items())})
        if values:
            metrics[f"async/{name}"] = statistics.fmean(values.values())
    return metrics


def run_summary(phase: Phase) -> dict[str, Any]:
    """What the run came to, in plain values: for the run and for each worker. For rank 0."""
    assert phase.server is not None
    totals = phase.totals()
    all_steps = sum(worker.steps for worker in totals.values())
    view = phase.server.view
    present = phase.survivors()
    return {
        "workers": [
            {
                "worker": number,
                "steps": worker.steps,
                "rounds": worker.rounds,
                "samples": worker.samples,
                "mean_local_steps": worker.steps / worker.rounds if worker.rounds else 0.0,
                "mean_staleness": worker.staleness / worker.rounds if worker.rounds else 0.0,
                "wait_seconds": worker.wait_seconds,
                "compute_seconds": worker.compute_seconds,
                "exchange_seconds": worker.exchange_seconds,
                "share": worker.steps / all_steps if all_steps else 0.0,
                "refused": worker.refused,
                "sessions": worker.sessions,
                "departures": worker.departures,
                "present": number in present,
                "quarantined": number in view.quarantined,
            }
            for number, worker in sorted(totals.items())
        ],
        "steps": all_steps,
        "steps_before": phase.steps_before,
        "budget": view.total,
        "version": view.version,
        "refused_pushes": view.refused_pushes,
        "refusals": dict(view.refusals),
        "held_back": view.held_back,
        "lost": [{"worker": worker, "seconds": when, "reason": why} for worker, when, why in phase.lost_workers],
        "seconds": phase.seconds,
        "virtual": phase.virtual_seconds is not None,
        "bytes_sent": phase.bytes_sent,
        "bytes_received": phase.bytes_received,
    }


def _end_of(phase: Phase) -> Event:
    """The last event of a run, by which a replay is compared with it. For rank 0."""
    assert phase.server is not None
    theta = torch.empty(phase.binding.layout.numel, dtype=torch.float32)
    version = phase.server.copy_model(theta)
    return Event("end", None, {"version": version, "theta": fingerprint(theta)})


def format_table(summary: dict[str, Any]) -> str:
    """The summary's workers as a table for a terminal."""
    columns = ("worker", "steps", "rounds", "mean H", "mean staleness", "waiting s", "exchange s", "share")
    rows = [
        (
            "former" if worker["worker"] == FORMER else str(worker["worker"]),
            str(worker["steps"]),
            str(worker["rounds"]),
            f"{worker['mean_local_steps']:.1f}",
            f"{worker['mean_staleness']:.2f}",
            f"{worker['wait_seconds']:.1f}",
            f"{worker['exchange_seconds']:.1f}",
            f"{worker['share']:.1%}",
        )
        for worker in summary["workers"]
    ]
    widths = [max(len(row[at]) for row in (columns, *rows)) for at in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    lines.insert(1, "-" * len(lines[0]))
    kinds = sorted(summary["refusals"].items())
    lines.append(
        f"{summary['steps']} local steps of all workers{_begun(summary)} in {summary['seconds']:.1f} "
        f"{'virtual ' if summary['virtual'] else ''}s, "
        f"{summary['version']} pushes merged, {summary['refused_pushes']} refused"
        + (f" ({', '.join(f'{count} {kind}' for kind, count in kinds)})" if kinds else "")
    )
    lines += [text for worker in summary["workers"] if (text := _fate(worker, summary["lost"]))]
    return "\n".join(lines)


def _held_back(summary: dict[str, Any]) -> str:
    """Of a run whose outer optimizer waits for more pushes than came."""
    held, version = summary["held_back"], summary["version"]
    nothing = "; no push has ever been applied, and the model is the one that training began with"
    return (
        f"{held} of {version} pushes are not in the model: the outer optimizer was still collecting a period's when "
        f"training ended{nothing if held >= version else ''}. A shorter period wastes fewer"
    )


def _begun(summary: dict[str, Any]) -> str:
    """Of a run that has gone on from a checkpoint: how many steps the seconds are those of."""
    before = summary["steps_before"]
    return f", {summary['steps'] - before} of them since it went on," if before else ""


def _fate(worker: dict[str, Any], lost: list[dict[str, Any]]) -> str:
    """What has happened to a worker, in a sentence; empty if it was there all the time."""
    number = worker["worker"]
    if number == FORMER:
        return ""
    if worker["quarantined"]:
        return f"worker {number} was refused for the rest of the run, after {worker['refused']} refused pushes"
    if not worker["departures"]:
        return ""
    times = ", ".join(f"{one['seconds']:.1f} s ({one['reason']})" for one in lost if one["worker"] == number)
    again = worker["sessions"] - 1
    return (
        f"worker {number} was lost {worker['departures']} time(s){', after ' if times else ''}{times}; it joined again "
        f"{again} time(s) and was {'' if worker['present'] else 'not '}there at the end"
    )


def _training_of(trainer: pl.Trainer) -> AsyncTraining | None:
    return getattr(trainer.strategy, "training", None)


class _GlobalProgress:
    """Mixed into the class of the trainer's progress bar while ranks run asynchronously.

    Total and position are those of the budget of all workers, not of rank 0's batches.
    """

    _phase: Phase
    _own_class: type[ProgressBar]

    @property
    def total_train_batches(self) -> float:
        """Local steps of all workers."""
        total = self._phase.budget.total
        return float("inf") if total is None else total

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """An epoch of rank 0 is none of the run's: position and speed go on."""
        super().on_train_epoch_start(trainer, *args)  # type: ignore[misc]
        bar = getattr(self, "train_progress_bar", None)
        if bar is not None and hasattr(bar, "initial"):  # tqdm computes its rate from here.
            bar.initial = self._position

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The position is the progress of all workers."""
        super().on_train_batch_end(trainer, module, outputs, batch, self._position - 1)  # type: ignore[misc]

    @property
    def _position(self) -> int:
        return round(self._phase.progress * self._phase.workers)

    def give_back(self) -> None:
        """The bar is an ordinary one again."""
        self.__class__ = self._own_class  # type: ignore[assignment]
        del self._phase, self._own_class


def _take_over(bar: ProgressBar | None, phase: Phase) -> _GlobalProgress | None:
    """Makes the trainer's progress bar show the whole run's progress. Its settings and its looks stay."""
    if bar is None:
        return None
    own = type(bar)
    bar.__class__ = type(own.__name__, (_GlobalProgress, own), {"__module__": own.__module__})
    bar._own_class = own  # type: ignore[attr-defined]
    bar._phase = phase  # type: ignore[attr-defined]
    return bar  # type: ignore[return-value]
