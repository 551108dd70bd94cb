"""Reports of an asynchronous run: metrics, an event file, a recording for replays, and a summary."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_async_localsgd.lightning.lost_workers import lost_text
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of
from lightning_async_localsgd.lightning.trainer_access.metrics import logs_this_step
from lightning_async_localsgd.protocol.checks import check_bool, is_number
from lightning_async_localsgd.protocol.traits import TRAITS, WorkerTraits, differing_traits
from lightning_async_localsgd.server.events import Event, fingerprint
from lightning_async_localsgd.server.line_file import EVENT_FILE, LineFile
from lightning_async_localsgd.server.observers import RunObserver
from lightning_async_localsgd.server.run_stats import FORMER

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.base import Runtime
    from lightning_async_localsgd.server.run_stats import RunSnapshot

_log = logging.getLogger(__name__)

SUMMARY_FILE = "async_localsgd_summary.json"

_MAX_ERROR = 500
"""Characters of an error that the event file keeps."""

_PER_WORKER = ("staleness", "local_steps", "wait_seconds", "exchange_seconds", "steps_per_second")


class AsyncLocalSGDCallback(Callback):
    """Log the run's metrics on rank 0, and summarize the run at its end.

    If the trainer has no such callback, the strategy adds one. A trainer may have several, at any position in its list
    of callbacks. Metrics, summary and table are then logged, written and printed once. Metrics go through ``self.log``
    to the trainer's loggers, every ``log_every_n_steps`` steps of rank 0:

    * as means over workers (``async/staleness/mean``) and, with ``per_worker=True``, for each worker n
      (``async/staleness/worker_n``): ``staleness`` (versions), ``local_steps`` (of the current round), ``wait_seconds``
      (before the last dispatch), ``exchange_seconds`` (of the last exchange, without waiting), ``steps_per_second``
      (while computing);
    * for the run: ``async/version`` (pushes applied), ``async/alive_workers``, ``async/merging_workers`` (workers of
      the latest pushes), ``async/update_norm`` (of the last pseudo-gradient), ``async/momentum_cosine`` (between that
      pseudo-gradient and the outer momentum), ``async/refused_pushes/total`` and, for each kind of refusal that has
      occurred, the number of this kind (``async/refused_pushes/not_finite``), ``async/bytes_sent`` and
      ``async/bytes_received`` (by the server, over the network or sockets); once training has been paused for lack of
      workers ``async/paused_seconds`` (of pauses that are over); in a simulated run ``async/virtual_seconds`` (since
      the start of training).

    No name is the folder of another name, because loggers that write one file per metric could not store both.

    At the end a table of the workers is printed. The same numbers are written to ``async_localsgd_summary.json`` in the
    trainer's log directory, which does not exist with ``logger=False``.

    Args:
        table: whether the table is printed at the end.
        events: file to which rank 0 appends a line of JSON for everything that happens in the run: each push, each
            dispatch, workers that join or are lost, losses and validations. ``watch`` and ``report`` read it. The file
            and its folder are created if necessary. ``"auto"`` is ``async_localsgd_events.jsonl`` in the trainer's log
            directory, if there is one. ``None`` writes no events.
        max_event_megabytes: megabytes (10^6 bytes) that the event file may need, >= 1. When it has half of them, it is
            moved to ``<name>.old.jsonl``, whose predecessor is dropped. ``None`` is no limit.
        recording: file to which rank 0 writes all that the server's decisions depend on, with the fields of
            :class:`.Event`. :class:`.SimulatedAsyncLocalSGDStrategy` can replay the file. ``None`` records nothing.
        per_worker: whether each worker's own values are logged, beside the means over workers. If there are several
            such callbacks, one that asks for the values is enough.

    Raises:
        ValueError: ``events`` or ``recording`` is not the path of a file, both are the same file, or
            ``max_event_megabytes`` is outside its range.

    Example::

        import lightning as L
        from lightning_async_localsgd import AsyncLocalSGDCallback

        trainer = L.Trainer(strategy="async_localsgd", devices=4, callbacks=[AsyncLocalSGDCallback(table=False)])

    """

    def __init__(
        self,
        table: bool = True,
        events: str | PathLike[str] | None = "auto",
        max_event_megabytes: float | None = 256,
        recording: str | PathLike[str] | None = None,
        per_worker: bool = False,
    ) -> None:
        if events is not None and (not str(events) or Path(events).is_dir()):
            raise ValueError(f"events={str(events)!r} must be 'auto', the path of a file, or None for no events")
        if recording is not None and (not str(recording) or Path(recording).is_dir()):
            raise ValueError(f"recording={str(recording)!r} must be the path of a file, or None for no recording")
        if events and recording and Path(events).absolute() == Path(recording).absolute():
            raise ValueError(f"events and recording are both {str(events)!r}; use two files")
        limit = max_event_megabytes
        if limit is not None and not (is_number(limit) and 1 <= limit < math.inf):
            raise ValueError(f"max_event_megabytes={max_event_megabytes!r} must be a number >= 1, or None for no limit")
        self.table = check_bool("table", table)
        self.per_worker = check_bool("per_worker", per_worker)
        self.events = events if events is None or events == "auto" else Path(events)
        self.max_event_megabytes = max_event_megabytes
        self.recording = None if recording is None else Path(recording)
        self._recorder: _Recorder | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The strategy starts the server after this hook, so an observer that is added here sees all events.
        add_observer = getattr(trainer.strategy, "add_observer", None)
        if trainer.is_global_zero and add_observer is not None:
            recorder = _Recorder(self._event_file(trainer), self.recording)
            if recorder.records:
                self._recorder = recorder
                add_observer(recorder)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With many workers there are many values, so log only in steps that reach the loggers.
        runtime = _runtime_of(trainer)
        if runtime is None or runtime.server is None or not logs_this_step(trainer) or not self._is_first(trainer):
            return
        write_values(trainer, runtime, "metrics", outputs)
        if trainer.loggers:
            per_worker = any(callback.per_worker for callback in _own_callbacks(trainer))
            for name, value in run_metrics(runtime, per_worker).items():
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        runtime = _runtime_of(trainer)
        if runtime is None or runtime.server is None or trainer.sanity_checking or not self._is_first(trainer):
            return
        write_values(trainer, runtime, "validation")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        runtime = _runtime_of(trainer)
        if runtime is None or runtime.server is None:
            return
        if self._recorder is not None:
            self._recorder.write_end(runtime)
        summary = run_summary(runtime)
        if self._is_first(trainer):
            runtime.server.write_line("end", {**_run_fields(runtime), "summary": summary})
            # Without a logger the log directory is the working directory, where nothing is written without being asked.
            if trainer.loggers and trainer.log_dir is not None:
                _write_summary(Path(trainer.log_dir) / SUMMARY_FILE, summary)
            if not summary["virtual"] and (lost := lost_text(summary)):
                _log.error("%s", lost)
            if summary["unapplied_pushes"]:
                rank_zero_warn(_unapplied_text(summary))
        if self.table and self._is_first(trainer, with_table=True):
            rank_zero_info("\n" + format_table(summary))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._recorder is not None:
            # The server may have ended, and with it the clock of the other lines.
            text = f"{type(exception).__name__}: {exception}".rstrip(": ").partition("\n")[0][:_MAX_ERROR]
            self._recorder.on_line({"kind": "end", "seconds": None, "error": text})
        self._close_files()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close_files()

    def _is_first(self, trainer: pl.Trainer, with_table: bool = False) -> bool:
        """Return whether this is the first such callback, so that common reports are made once."""
        return next((own for own in _own_callbacks(trainer) if own.table or not with_table), None) is self

    def _event_file(self, trainer: pl.Trainer) -> LineFile | None:
        """Open the event file; None if there is none. Without being asked, training goes on without it."""
        limit = None if self.max_event_megabytes is None else int(1e6 * self.max_event_megabytes)
        if isinstance(self.events, Path):
            return LineFile(self.events, max_bytes=limit)
        folder = None if self.events is None or not self._is_first(trainer) else _log_folder(trainer)
        if folder is None:
            return None
        try:
            return LineFile(folder / EVENT_FILE, max_bytes=limit)
        except OSError as error:
            rank_zero_warn(f"no events are written to {folder / EVENT_FILE}: {error}")
            return None

    def _close_files(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


class _Recorder(RunObserver):
    """Write a run's events to files.

    Args:
        events: event file, or None.
        recording: file for a replay, or None.

    """

    def __init__(self, events: LineFile | None, recording: Path | None) -> None:
        self._events = events
        try:
            self._recording = None if recording is None else LineFile(recording, "recording")
        except OSError:
            if events is not None:
                events.close()
            raise

    @property
    def records(self) -> bool:
        """Whether there is a file."""
        return self._events is not None or self._recording is not None

    @override
    def on_line(self, line: dict[str, Any]) -> None:
        if self._events is not None:
            self._events.write(line)

    @override
    def on_event(self, event: Event) -> None:
        if self._recording is not None:
            self._recording.write(event)

    def write_end(self, runtime: Runtime) -> None:
        """Write the last event of a run, which a replay compares with its own result."""
        if self._recording is not None:
            assert runtime.server is not None
            theta = torch.empty(runtime.binding.layout.numel, dtype=torch.float32)
            version = runtime.server.copy_model(theta)
            self._recording.write(Event("end", None, {"version": version, "theta": fingerprint(theta)}))

    def close(self) -> None:
        """Close the files after everything is written."""
        for file in (self._events, self._recording):
            if file is not None:
                file.close()


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary. A full disk does not make a finished training fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        rank_zero_warn(f"the summary of the run is not written to {path}: {error}")


def _own_callbacks(trainer: pl.Trainer) -> list[AsyncLocalSGDCallback]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, AsyncLocalSGDCallback)]


def _log_folder(trainer: pl.Trainer) -> Path | None:
    """Return ``trainer.log_dir`` on rank 0, without the broadcast of the trainer's property; None without a logger."""
    logger = next(iter(trainer.loggers), None)
    own = isinstance(logger, (TensorBoardLogger, CSVLogger))
    folder = None if logger is None else logger.log_dir if own else logger.save_dir
    return None if not folder or "://" in str(folder) else Path(folder)


def write_values(trainer: pl.Trainer, runtime: Runtime, kind: str, outputs: Any = None) -> None:
    """Add a line with what the module has logged, and with its loss, to the event file.

    Args:
        trainer: the trainer.
        runtime: rank 0's part in the run.
        kind: kind of the line.
        outputs: what the training step has returned.

    """
    values = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("async/")}
    if kind == "validation":
        values = {name: value for name, value in values.items() if "val" in name} or values
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        values = {"loss": loss.detach(), **values}
    fields = {"values": {name: _finite(float(value)) for name, value in values.items()}}
    assert runtime.server is not None
    runtime.server.write_line(kind, {"global_step": trainer.global_step, **fields, **_run_fields(runtime)})


def _run_fields(runtime: Runtime) -> dict[str, Any]:
    """Return what lines of rank 0 say of the run."""
    assert runtime.server is not None
    view: RunSnapshot = runtime.server.snapshot
    return {
        "progress": view.progress,
        "total": view.total,
        "quarantined": sorted(view.quarantined),
        "bytes_sent": runtime.bytes_sent,
        "bytes_received": runtime.bytes_received,
    }


def _finite(value: float) -> float | None:
    """Return the value, or None if JSON has no number for it."""
    return value if math.isfinite(value) else None


def _runtime_of(trainer: pl.Trainer) -> Runtime | None:
    return getattr(trainer.strategy, "runtime", None)


def run_metrics(runtime: Runtime, per_worker: bool) -> dict[str, float]:
    """Return the run's current metrics by their names, on rank 0.

    Args:
        runtime: rank 0's part in the run.
        per_worker: whether each worker's own values are included.

    """
    assert runtime.server is not None
    view: RunSnapshot = runtime.server.snapshot
    metrics: dict[str, float] = {
        "async/version": view.version,
        "async/alive_workers": view.alive_workers,
        "async/merging_workers": view.merging_workers,
        "async/refused_pushes/total": view.refused_pushes,
        "async/bytes_sent": runtime.bytes_sent,
        "async/bytes_received": runtime.bytes_received,
        **{f"async/refused_pushes/{kind}": count for kind, count in view.refusals.items()},
    }
    if runtime.virtual_seconds is not None:
        metrics["async/virtual_seconds"] = runtime.virtual_seconds
    if view.pauses:
        metrics["async/paused_seconds"] = view.paused_seconds
    if view.update_norm is not None:
        metrics["async/update_norm"] = view.update_norm
    if view.momentum_cosine is not None:
        metrics["async/momentum_cosine"] = view.momentum_cosine
    for name in _PER_WORKER:
        values = {n: getattr(worker, name) for n, worker in view.workers.items() if getattr(worker, name) is not None}
        if per_worker:
            metrics.update({f"async/{name}/worker_{worker}": float(value) for worker, value in sorted(values.items())})
        if values:
            metrics[f"async/{name}/mean"] = statistics.fmean(values.values())
    return metrics


def run_summary(runtime: Runtime) -> dict[str, Any]:
    """Return the summary of the run and of each worker in JSON's types, on rank 0."""
    assert runtime.server is not None
    totals = runtime.totals()
    all_steps = sum(worker.steps for worker in totals.values())
    view = runtime.server.snapshot
    present = runtime.present_workers()
    speeds = [worker.steps_per_second for worker in view.workers.values() if worker.steps_per_second]
    steps = all_steps - runtime.steps_before
    all_samples = sum(worker.samples for worker in totals.values()) if runtime.counts_samples else 0
    if all_samples:  # Steps of the fastest worker may be larger or smaller than those of others.
        sizes = {number: worker.samples / worker.steps for number, worker in totals.items() if worker.steps}
        speeds = [(view.workers[n].steps_per_second or 0.0) * sizes.get(n, 0.0) for n in view.workers]
        speeds = [speed * all_steps / all_samples for speed in speeds if speed]
    return {
        "workers": [
            {
                "worker": number,
                **view.traits.get(number, WorkerTraits()).as_dict(),
                "steps": worker.steps,
                "rounds": worker.rounds,
                "samples": worker.samples,
                "samples_per_step": worker.samples / worker.steps if worker.steps else 0.0,
                "mean_local_steps": worker.steps / worker.rounds if worker.rounds else 0.0,
                "mean_staleness": worker.staleness / worker.rounds if worker.rounds else 0.0,
                "wait_seconds": worker.wait_seconds,
                "compute_seconds": worker.compute_seconds,
                "exchange_seconds": worker.exchange_seconds,
                "share": worker.samples / all_samples if all_samples else worker.steps / max(1, all_steps),
                "refused": worker.refused,
                "sessions": worker.sessions,
                "departures": worker.departures,
                "present": number in present,
                "quarantined": number in view.quarantined,
            }
            for number, worker in sorted(totals.items())
        ],
        "counts_samples": runtime.counts_samples,
        "initial_workers": runtime.workers,
        "steps": all_steps,
        "steps_before": runtime.steps_before,
        "budget": view.total,
        "version": view.version,
        "refused_pushes": view.refused_pushes,
        "refusals": dict(view.refusals),
        "unapplied_pushes": view.unapplied_pushes,
        "pauses": view.pauses,
        "paused_seconds": view.paused_seconds,
        "lost": [{"worker": worker, "seconds": when, "reason": why} for worker, when, why in runtime.lost_workers],
        "seconds": runtime.seconds,
        "fastest_worker_seconds": steps / max(speeds) if speeds and len(totals) > 1 else None,
        "virtual": runtime.virtual_seconds is not None,
        "bytes_sent": runtime.bytes_sent,
        "bytes_received": runtime.bytes_received,
    }


def format_table(summary: dict[str, Any]) -> str:
    """Return the table of workers for a terminal, with a line for the run.

    What workers compute with is shown if they differ in it.
    """
    shown = differing_traits([WorkerTraits(*(worker[name] for name in TRAITS)) for worker in summary["workers"]])
    sizes = ("samples/step",) if summary["counts_samples"] else ()
    own = (*shown, *sizes)
    columns = ("worker", *own, "steps", "rounds", "mean H", "mean staleness", "waiting s", "exchange s", "share")
    rows = [
        (
            "former" if worker["worker"] == FORMER else str(worker["worker"]),
            *(worker[name] or "?" for name in shown),
            *(f"{worker['samples_per_step']:.1f}" for _ in sizes),
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
    widths = [max(len(row[column]) for row in (columns, *rows)) for column in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    lines.insert(1, "-" * len(lines[0]))
    kinds = sorted(summary["refusals"].items())
    samples = f" on {sum(worker['samples'] for worker in summary['workers'])} samples" if sizes else ""
    lines.append(
        f"{summary['steps']} local steps{samples} of all workers{_resumed_text(summary)} in {summary['seconds']:.1f} "
        f"{'virtual ' if summary['virtual'] else ''}s, "
        f"{summary['version']} pushes merged, {summary['refused_pushes']} refused"
        + (f" ({', '.join(f'{count} {kind}' for kind, count in kinds)})" if kinds else "")
    )
    if summary["pauses"]:
        lines.append(
            f"training was paused {summary['pauses']} time(s), for {summary['paused_seconds']:.1f} s, because fewer "
            "than min_workers took part"
        )
    alone = summary["fastest_worker_seconds"]
    if alone is not None:
        unit = "samples" if sizes else "steps"
        lines.append(f"at its last speed, the fastest worker alone would need {alone:.1f} s for as many {unit}")
    lines += [text for worker in summary["workers"] if (text := _departures_text(worker, summary["lost"]))]
    return "\n".join(lines)


def _unapplied_text(summary: dict[str, Any]) -> str:
    """Return the warning that the outer optimizer was still collecting pushes when training ended."""
    unapplied, version = summary["unapplied_pushes"], summary["version"]
    nothing = "; no push has ever been applied, and the model has its initial weights" if unapplied >= version else ""
    return (
        f"{unapplied} of {version} pushes are not in the model, because the outer optimizer was still collecting the "
        f"pushes of a period when training ended{nothing}. With a shorter period fewer pushes are lost."
    )


def _resumed_text(summary: dict[str, Any]) -> str:
    """Return how many of a resumed run's steps belong to the given seconds."""
    before = summary["steps_before"]
    return f", {summary['steps'] - before} of them since the run was resumed," if before else ""


def _departures_text(worker: dict[str, Any], lost: list[dict[str, Any]]) -> str:
    """Return a sentence about a worker that was lost or quarantined; empty for any other worker."""
    number = worker["worker"]
    if number == FORMER:
        return ""
    if worker["quarantined"]:
        return f"worker {number} was quarantined for the rest of the run, after {worker['refused']} refused pushes"
    if not worker["departures"]:
        return ""
    times = ", ".join(f"{loss['seconds']:.1f} s ({loss['reason']})" for loss in lost if loss["worker"] == number)
    rejoined = worker["sessions"] - 1
    return (
        f"worker {number} was lost {worker['departures']} time(s){', after ' if times else ''}{times}; it rejoined "
        f"{rejoined} time(s) and was {'' if worker['present'] else 'not '}present at the end"
    )
