"""Compare asynchronous local SGD with what a user would take instead, on emulated devices of unequal speed.

Runs ``examples/language_model`` once for each configuration, one after the other: the strategy's defaults, DDP with the
same and with twice the learning rate, synchronous DiLoCo, and the fastest device alone. Prints one JSON line for each
run, one for the comparison, and a table::

    python benchmarks/heterogeneous.py                       # 230 s of training for each run, half an hour
    python benchmarks/heterogeneous.py --seconds 60 --seeds 0
    python benchmarks/heterogeneous.py --max-steps 400       # the same number of samples for each run instead

Metrics:

* final loss: the loss of the final model on the validation windows. Every run has a schedule of its own that ends with
  its steps;
* local steps per second of all ranks in the steady state, compared with the ceiling ``sum(1 / seconds_per_step)``.
  Steps are counted at the torch optimizers of all ranks, between 20 % and 90 % of the time in which all ranks train.
  Exchange, waiting, validation and logging all count against the run. A second figure leaves out the time that ranks
  spend in validation. Under DDP that includes the time in which fast ranks wait there for the slowest rank;
* time to DDP's final loss: from the start of training to the start of the first validation at or below that loss. The
  end of training counts as a validation with the final loss. Validations are rare, so the figure understates the
  advantage of the faster run;
* CPU time per step, without validation. The emulation is valid only while the real work fits on the machine's cores.
  ``cores`` is the number of cores that all ranks need at their emulated speeds.
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
RUNS = ("async", "ddp", "ddp2", "diloco", "single")
"""The runs. ``ddp2`` is DDP with twice the learning rate."""
STEADY_STATE = (0.2, 0.9)
REQUIRED_SHARE = 0.97
EXPECTED_SHARE = 0.96
"""Share of the ceiling with which the steps of an asynchronous run of a given time are chosen."""
EMULATION = "lightning_async_localsgd.emulation.EmulatedDevices"


@dataclass(frozen=True)
class Measurement:
    """The figures of one run. Times are in seconds since the first rank began to train."""

    run: str
    seed: int
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
        """Return when a validation was first at or below ``loss``, or None."""
        return next((seconds for seconds, measured in self.losses if measured <= loss), None)


def measure(
    run: str, records: list[dict[str, Any]], seconds_per_step: list[float], summary: Any, seed: int = 0
) -> Measurement:
    """Compute the figures of one run from the timelines of all its ranks, in order of rank."""
    speeds = [1.0 / seconds for seconds in seconds_per_step[: len(records)]]
    begin = min(record["start"] for record in records)
    all_training = max(record["start"] for record in records), min(record["steps"][-1] for record in records)
    low, high = (all_training[0] + share * (all_training[1] - all_training[0]) for share in STEADY_STATE)
    steps = sum(low < moment <= high for record in records for moment in record["steps"])
    training = [high - low - _validating(record, low, high) for record in records]
    possible = sum(speed * seconds for speed, seconds in zip(speeds, training, strict=True))
    end = max(record["end"] for record in records)
    final_loss = records[0]["final_loss"]
    losses = [[started - begin, loss] for started, _, loss in records[0]["validations"]]
    costs = [record["cpu_seconds"] / len(record["steps"]) for record in records]
    return Measurement(
        run=run,
        seed=seed,
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


@dataclass(frozen=True)
class Plan:
    """One run of the example.

    Args:
        run: one of :data:`RUNS`.
        seed: seed of the weights and the data.
        seconds: time of training that the number of steps is chosen for; None uses ``max_steps``.
        max_steps: steps of each rank under DDP; None uses the configuration's.

    """

    run: str
    seed: int
    seconds: float | None
    max_steps: int | None

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.run}_{self.seed}"

    @property
    def path(self) -> Path:
        """The configuration file."""
        return EXAMPLE / "configs" / f"{self.run.removesuffix('2')}.yaml"

    @property
    def config(self) -> dict[str, Any]:
        """The configuration."""
        config: dict[str, Any] = yaml.safe_load(self.path.read_text())
        return config

    @property
    def seconds_per_step(self) -> list[float]:
        """Seconds of a local step on the device of each rank."""
        callbacks = self.config["trainer"]["callbacks"]
        found: list[float] = next(
            callback["init_args"]["seconds_per_step"] for callback in callbacks if callback["class_path"] == EMULATION
        )
        return found

    @property
    def steps(self) -> int | None:
        """The trainer's ``max_steps``; None for that of the configuration."""
        ranks, devices = self.config["trainer"]["devices"], self.seconds_per_step
        if self.seconds is None:
            return self.max_steps if self.max_steps is None or ranks > 1 else self.max_steps * _ddp_ranks()
        if self.run == "async":
            return round(self.seconds * EXPECTED_SHARE * sum(1.0 / seconds for seconds in devices) / ranks)
        if self.run == "diloco":
            local_steps = self.config["trainer"]["strategy"]["init_args"]["local_steps"]
            return max(1, int(self.seconds / (local_steps * max(devices)))) * int(local_steps)
        return int(self.seconds / max(devices))


def launch(plan: Plan, directory: Path, timeout: float) -> Measurement:
    """Run the example with one configuration in its own process.

    Args:
        plan: the run.
        directory: for logs, checkpoints and timelines.
        timeout: seconds after which the run is killed.

    Raises:
        RuntimeError: the run failed, took too long, or a rank wrote no timeline.

    """
    run, config = plan.run, plan.config
    ranks = config["trainer"]["devices"]
    timelines = directory / plan.name / "timelines"
    timelines.mkdir(parents=True)
    command = [sys.executable, str(EXAMPLE / "train.py"), "fit", "--config", str(plan.path)]
    command += ["--trainer.logger.init_args.save_dir", str(directory / plan.name), f"--seed_everything={plan.seed}"]
    command += ["--trainer.callbacks+=step_timeline.StepTimeline", f"--trainer.callbacks.directory={timelines}"]
    command += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    if run.endswith("2"):
        command.append(f"--model.lr={2.0 * config['model']['lr']}")
    if (steps := plan.steps) is not None:
        interval = min(config["trainer"]["val_check_interval"], max(1, steps // 2))
        command += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={interval}"]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")) if part
    )
    environment.setdefault("OMP_NUM_THREADS", "1")
    with (directory / plan.name / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"The run {run!r} took longer than --timeout {timeout:.0f} s; see {output.name}"
            ) from None
        finally:
            # The ranks are in the same process group. Kill all of them, so that they cannot disturb the next run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        tail = "\n".join(Path(output.name).read_text().splitlines()[-15:])
        raise RuntimeError(f"The run {run!r} ended with exit code {code}:\n{tail}")
    files = [timelines / f"rank_{rank}.json" for rank in range(ranks)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise RuntimeError(f"The run {run!r} did not write {', '.join(missing)}; see {output.name}")
    summaries = sorted((directory / plan.name).rglob("async_localsgd_summary.json"))
    summary = json.loads(summaries[-1].read_text()) if summaries else None
    records = [json.loads(file.read_text()) for file in files]
    return measure(run, records, plan.seconds_per_step, summary, plan.seed)


def _ddp_ranks() -> int:
    ranks: int = yaml.safe_load((EXAMPLE / "configs" / "ddp.yaml").read_text())["trainer"]["devices"]
    return ranks


def compare(measurements: list[Measurement]) -> dict[str, Any]:
    """Compare the runs with DDP's lowest loss, and the asynchronous runs with the required share of the ceiling."""
    result: dict[str, Any] = {"comparison": [f"{one.run} {one.seed}" for one in measurements], "cpus": os.cpu_count()}
    asynchronous = [one for one in measurements if one.run == "async"]
    if asynchronous:
        share = statistics.fmean(one.share_without_validation for one in asynchronous)
        losses = [one.final_loss for one in asynchronous]
        result["async_share_without_validation"] = share
        result["required_share"] = REQUIRED_SHARE
        result["passed"] = share >= REQUIRED_SHARE
        result["async_loss"] = statistics.fmean(losses)
        result["async_loss_deviation"] = statistics.stdev(losses) if len(losses) > 1 else 0.0
    data_parallel = [one for one in measurements if one.run in ("ddp", "ddp2")]
    if data_parallel:
        target = min(one.final_loss for one in data_parallel)
        result["ddp_final_loss"] = target
        result["seconds_to_ddp_final_loss"] = {f"{one.run} {one.seed}": one.seconds_to(target) for one in measurements}
    return result


def table(measurements: list[Measurement], comparison: dict[str, Any]) -> str:
    """Format the figures as text."""
    lines = [
        f"{'run':8}{'seed':>5}{'local steps':>13}{'train s':>9}{'steps/s':>9}{'ceiling':>9}{'share':>8}{'w/o val.':>10}"
        f"{'final loss':>12}{'s to DDP loss':>15}{'cores':>7}"
    ]
    seconds_by_run = comparison.get("seconds_to_ddp_final_loss", {})
    for run in measurements:
        seconds = seconds_by_run.get(f"{run.run} {run.seed}")
        lines.append(
            f"{run.run:8}{run.seed:5}{run.local_steps:13,}{run.train_seconds:9.1f}{run.steps_per_second:9.2f}"
            f"{run.ceiling_steps_per_second:9.2f}{run.share_of_ceiling:8.1%}{run.share_without_validation:10.1%}"
            f"{run.final_loss:12.4f}{'-' if seconds is None else f'{seconds:.1f}':>15}{run.cores:7.2f}"
        )
    if "passed" in comparison:
        verdict = "passed" if comparison["passed"] else "FAILED"
        lines.append(
            f"async: {comparison['async_share_without_validation']:.1%} of the ceiling without validation, "
            f"required {REQUIRED_SHARE:.0%}: {verdict}; loss {comparison['async_loss']:.4f} ± "
            f"{comparison['async_loss_deviation']:.4f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark, and return 1 if the asynchronous runs miss the required share of the ceiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="configurations to run")
    parser.add_argument("--seconds", type=float, default=230.0, help="time of training of each run (default: 230)")
    parser.add_argument(
        "--max-steps", type=int, help="steps of each rank under DDP; all runs get as many samples, whatever their time"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of async; the others run with the first"
    )
    parser.add_argument("--directory", type=Path, help="for logs (default: a new temporary directory)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds after which one run is killed")
    arguments = parser.parse_args()
    if arguments.max_steps is not None and arguments.max_steps < 1:
        parser.error(f"--max-steps {arguments.max_steps} must be at least 1")
    if arguments.seconds <= 0.0:
        parser.error(f"--seconds {arguments.seconds} must be > 0")
    seconds = arguments.seconds if arguments.max_steps is None else None
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="async_localsgd_heterogeneous_"))
    print(f"logs in {directory}", file=sys.stderr, flush=True)
    measurements = []
    for run in arguments.runs:
        for seed in arguments.seeds if run == "async" else arguments.seeds[:1]:
            plan = Plan(run, seed, seconds, arguments.max_steps)
            measurements.append(launch(plan, directory, arguments.timeout))
            print(json.dumps(asdict(measurements[-1])), flush=True)
    comparison = compare(measurements)
    print(json.dumps(comparison), flush=True)
    print(table(measurements, comparison), flush=True)
    return 0 if comparison.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
