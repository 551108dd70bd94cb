"""Asynchronous local SGD against DDP and one device, on emulated devices of unequal speed.

Runs ``examples/language_model`` once for each configuration, all on the same budget of samples and one after the other,
and prints one JSON line for each run, one for the comparison, and a table::

    python benchmarks/heterogeneous.py                  # the example's own budget, about 20 minutes on two cores
    python benchmarks/heterogeneous.py --max-steps 200  # a quarter of it

What is measured:

* local steps per second of all ranks in the steady state, counted at the torch optimizers of all ranks between 20 % and
  90 % of the time in which all ranks train, against the ceiling ``sum(1 / seconds_per_step)``. Everything counts
  against the run: exchange, waiting, validation, logging. Beside it stands the same without the time that ranks spent
  in validation (under DDP that includes their waiting there for the slowest);
* final loss: that of the final model on the validation windows;
* time to DDP's final loss: from the start of training to the start of the first validation that is at or below it (the
  end of training counts as one, with the final loss). Validations are rare, so this errs against the faster run;
* CPU time for each step, validation left out: the emulation is honest only while the real work fits on the machine's
  cores. ``cores`` is the number of cores that the work of all ranks takes at their emulated speeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "language_model"
RUNS = ("async", "ddp", "single")
STEADY_STATE = (0.2, 0.9)
REQUIRED_SHARE = 0.95
EMULATION = "lightning_async_localsgd.emulation.EmulatedDevices"


@dataclass(frozen=True)
class Measurement:
    """What one run gave. Times are in seconds since the first rank began to train."""

    run: str
    ranks: int
    local_steps: int
    local_steps_by_rank: list[int]
    train_seconds: float
    ceiling_steps_per_second: float
    steps_per_second: float
    share_of_ceiling: float
    share_without_validation: float
    final_loss: float
    losses: list[list[float]]  # [seconds, loss] of each validation, the final one included
    cpu_seconds_per_step: float
    cores: float
    summary: dict[str, Any] | None  # async_localsgd_summary.json

    def seconds_to(self, loss: float) -> float | None:
        """Returns when a validation was first at or below ``loss``."""
        return next((seconds for seconds, found in self.losses if found <= loss), None)


def measure(run: str, records: list[dict[str, Any]], seconds_per_step: list[float], summary: Any) -> Measurement:
    """Works out one run's figures from the timelines of all its ranks, in order of rank."""
    speeds = [1.0 / seconds for seconds in seconds_per_step[: len(records)]]
    begin = min(record["start"] for record in records)
    everybody = max(record["start"] for record in records), min(record["steps"][-1] for record in records)
    low, high = (everybody[0] + share * (everybody[1] - everybody[0]) for share in STEADY_STATE)
    steps = sum(low < moment <= high for record in records for moment in record["steps"])
    training = [high - low - _validating(record, low, high) for record in records]
    possible = sum(speed * seconds for speed, seconds in zip(speeds, training, strict=True))
    end = max(record["end"] for record in records)
    final_loss = records[0]["final_loss"]
    losses = [[started - begin, loss] for started, _, loss in records[0]["validations"]]
    costs = [record["cpu_seconds"] / len(record["steps"]) for record in records]
    return Measurement(
        run=run,
        ranks=len(records),
        local_steps=sum(len(record["steps"]) for record in records),
        local_steps_by_rank=[len(record["steps"]) for record in records],
        train_seconds=end - begin,
        ceiling_steps_per_second=sum(speeds),
        steps_per_second=steps / (high - low),
        share_of_ceiling=steps / (high - low) / sum(speeds),
        share_without_validation=steps / possible,
        final_loss=final_loss,
        losses=[*losses, [end - begin, final_loss]],
        cpu_seconds_per_step=statistics.fmean(costs),
        cores=sum(speed * cost for speed, cost in zip(speeds, costs, strict=True)),
        summary=summary,
    )


def _validating(record: dict[str, Any], low: float, high: float) -> float:
    spans = ((max(low, start), min(high, end)) for start, end, _ in record["validations"])
    return float(sum(max(0.0, end - start) for start, end in spans))


def launch(run: str, max_steps: int | None, directory: Path, timeout: float) -> Measurement:
    """Runs the example with one configuration in a process of its own.

    Args:
        run: name of the configuration.
        max_steps: steps of each rank under DDP; ``None`` takes the configurations' own budgets.
        directory: for logs, checkpoints and timelines.
        timeout: seconds after which the run is killed.

    Raises:
        RuntimeError: the run failed, took too long, or a rank left no timeline.

    """
    path = EXAMPLE / "configs" / f"{run}.yaml"
    config = yaml.safe_load(path.read_text())
    ranks = config["trainer"]["devices"]
    seconds_per_step = next(
        callback["init_args"]["seconds_per_step"]
        for callback in config["trainer"]["callbacks"]
        if callback["class_path"] == EMULATION
    )
    timelines = directory / run / "timelines"
    timelines.mkdir(parents=True)
    command = [sys.executable, str(EXAMPLE / "train.py"), "fit", "--config", str(path)]
    command += ["--trainer.logger.init_args.save_dir", str(directory / run)]
    command += ["--trainer.callbacks+=step_timeline.StepTimeline", f"--trainer.callbacks.directory={timelines}"]
    command += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    if max_steps is not None:
        steps = max_steps if ranks > 1 else max_steps * _ranks_of_ddp()
        interval = min(config["trainer"]["val_check_interval"], max(1, steps // 2))
        command += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={interval}"]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")) if part
    )
    environment.setdefault("OMP_NUM_THREADS", "1")
    with (directory / run / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{run} took longer than {timeout:.0f} s; see {output.name}") from None
        finally:
            # The ranks are in the same process group: none may outlive the run and disturb the next one.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        tail = "\n".join(Path(output.name).read_text().splitlines()[-15:])
        raise RuntimeError(f"{run} ended with status {code}:\n{tail}")
    files = [timelines / f"rank_{rank}.json" for rank in range(ranks)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise RuntimeError(f"{run} left no {', '.join(missing)}; see {output.name}")
    summaries = sorted((directory / run).rglob("async_localsgd_summary.json"))
    summary = json.loads(summaries[-1].read_text()) if summaries else None
    return measure(run, [json.loads(file.read_text()) for file in files], seconds_per_step, summary)


def _ranks_of_ddp() -> int:
    ranks: int = yaml.safe_load((EXAMPLE / "configs" / "ddp.yaml").read_text())["trainer"]["devices"]
    return ranks


def compare(measurements: list[Measurement]) -> dict[str, Any]:
    """Sets the runs against DDP, and the asynchronous one against the required share of the ceiling."""
    by_run = {measurement.run: measurement for measurement in measurements}
    result: dict[str, Any] = {"comparison": list(by_run), "cpus": os.cpu_count()}
    if "async" in by_run:
        result["async_share_of_ceiling"] = by_run["async"].share_of_ceiling
        result["required_share"] = REQUIRED_SHARE
        result["passed"] = by_run["async"].share_of_ceiling >= REQUIRED_SHARE
    if "ddp" in by_run:
        target = by_run["ddp"].final_loss
        result["ddp_final_loss"] = target
        result["seconds_to_ddp_final_loss"] = {run: found.seconds_to(target) for run, found in by_run.items()}
    return result


def table(measurements: list[Measurement], comparison: dict[str, Any]) -> str:
    """Returns the figures as text."""
    lines = [
        f"{'run':8}{'local steps':>13}{'train s':>9}{'steps/s':>9}{'ceiling':>9}{'share':>8}{'w/o val.':>10}"
        f"{'final loss':>12}{'s to DDP loss':>15}{'cores':>7}"
    ]
    reached = comparison.get("seconds_to_ddp_final_loss", {})
    for found in measurements:
        seconds = reached.get(found.run)
        lines.append(
            f"{found.run:8}{found.local_steps:13,}{found.train_seconds:9.1f}{found.steps_per_second:9.2f}"
            f"{found.ceiling_steps_per_second:9.2f}{found.share_of_ceiling:8.1%}{found.share_without_validation:10.1%}"
            f"{found.final_loss:12.4f}{'-' if seconds is None else f'{seconds:.1f}':>15}{found.cores:7.2f}"
        )
    if "passed" in comparison:
        verdict = "passed" if comparison["passed"] else "FAILED"
        lines.append(
            f"async: {comparison['async_share_of_ceiling']:.1%} of the ceiling, "
            f"required {REQUIRED_SHARE:.0%}: {verdict}"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs the benchmark; returns 1 if the asynchronous run stays below the required share of the ceiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="configurations to run")
    parser.add_argument("--max-steps", type=int, help="steps of each rank under DDP (default: the configurations')")
    parser.add_argument("--directory", type=Path, help="where logs go (default: a new temporary directory)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds after which one run is killed")
    arguments = parser.parse_args()
    if arguments.max_steps is not None and arguments.max_steps < 1:
        parser.error(f"--max-steps {arguments.max_steps} must be at least 1")
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="async_localsgd_heterogeneous_"))
    print(f"logs in {directory}", file=sys.stderr, flush=True)
    measurements = []
    for run in arguments.runs:
        measurements.append(launch(run, arguments.max_steps, directory, arguments.timeout))
        print(json.dumps(asdict(measurements[-1])), flush=True)
    comparison = compare(measurements)
    print(json.dumps(comparison), flush=True)
    print(table(measurements, comparison), flush=True)
    return 0 if comparison.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
