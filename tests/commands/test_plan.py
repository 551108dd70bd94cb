"""``plan``: forecasts by the live server's policies, which a live run confirms."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from lightning_async_localsgd.commands.plan import LinkOption, Setup
from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.server.event_file import find_event_file, read_pushes
from lightning_async_localsgd.simulation.forecast import forecast
from tests.commands.conftest import Command, LiveRun

PAPER = ".58,.75,1.51,3.33"
MACHINES = (0.58, 0.75, 1.51, 3.33)


def plan(command: Command, *arguments: object) -> dict[str, Any]:
    code, output, errors = command("plan", "--seconds-per-step", PAPER, *arguments, "--json")
    assert code == 0, errors
    result: dict[str, Any] = json.loads(output)
    return result


def method(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(method for method in result["methods"] if method["method"] == name)


def test_without_exchange_all_methods_are_as_fast_as_the_machines_allow(command: Command) -> None:
    result = plan(command, "--params", "1e6", "--local-steps", 50)
    everyone = sum(1 / seconds for seconds in MACHINES)
    assert method(result, "this strategy")["steps_per_second"] == pytest.approx(everyone, rel=0.05)
    assert method(result, "synchronous DiLoCo")["steps_per_second"] == pytest.approx(4 / 3.33)
    assert method(result, "DDP")["steps_per_second"] == pytest.approx(4 / 3.33)
    assert method(result, "the fastest device alone")["steps_per_second"] == pytest.approx(1 / 0.58)
    assert [round(worker["local_steps"]) for worker in result["workers"]] == [50, 38, 19, 8]
    assert sum(worker["share"] for worker in result["workers"]) == pytest.approx(1.0)
    waiting = [(3.33 - seconds) / 3.33 for seconds in MACHINES]
    assert method(result, "DDP")["waiting"] == pytest.approx(statistics.fmean(waiting))
    assert result["advice"] == []


@pytest.mark.slow
def test_slow_link_gets_fewer_bits_and_then_overlap(command: Command) -> None:
    fast = plan(command, "--params", "1e6", "--link", "10Gbit,50us")
    assert fast["recommended"]["upload"] == "fp32"
    slow = plan(command, "--params", "1e8", "--link", "1Gbit,20ms")
    assert (slow["recommended"]["upload"], slow["recommended"]["overlap"]) == ("int8", False)
    assert slow["recommended"]["local_steps"] > 20
    large = plan(command, "--params", "1.1e9", "--link", "1Gbit,20ms")
    assert large["recommended"]["overlap"]
    assert large["recommended"]["download"] == "bf16", "copies of the model would need too much memory"
    assert large["rank_0"]["link_use"] > 0.5
    assert any("rank 0's link is busy" in line for line in large["advice"])
    own = plan(command, "--params", "1e8", "--link", "1Gbit,20ms", "--upload", "bf16", "--local-steps", 40)
    assert own["recommended"]["upload"] == "bf16"
    assert own["workers"][0]["local_steps"] == pytest.approx(40)
    assert own["workers"][1]["exchanging"] > slow["workers"][1]["exchanging"]


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("encoding", ["fp32", "bf16", "int8", "int4"])
def test_bytes_are_those_of_the_exchange(encoding: Any, moments: bool) -> None:
    tensors = [["weight", [256 * 7 + 4], "torch.float32", "parameter"]]
    if moments:
        tensors.append(["weight.moment", [256 * 7 + 4], "torch.float32", "moment"])
    layout = Layout.from_description(tensors)
    codec = codec_of(layout, encoding)
    setup = Setup((1.0,), (), 256 * 7 + 4, moments, 1, 0.0, encoding, "fp32", False, None)
    expected = 4 * layout.numel if codec is None else codec.nbytes
    assert setup.bytes_of(encoding) == pytest.approx(expected, abs=256), "the last block is padded"


def test_transfers_that_share_rank_0s_link_take_longer() -> None:
    link = LinkOption.parse("100Mbit,1ms")
    assert (link.bytes_per_second, link.latency) == (12.5e6, 0.001)
    alone = Setup((0.1, 0.1), (link,), 10**6, False, 10, 0.0, "fp32", "fp32", False, None).shared()
    assert alone.sharing == pytest.approx(1.0)
    many = Setup((0.1,) * 9, (link,) * 8, 10**6, False, 10, 0.0, "fp32", "fp32", False, None).shared()
    assert 2.0 < many.sharing < 8.0
    assert many.exchange_seconds[1] > 2 * alone.exchange_seconds[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seconds-per-step", "1,x", "--params", "1"], "'x' is not a number"),
        (["--seconds-per-step", "1,0", "--params", "1"], "must be a finite number > 0"),
        (["--seconds-per-step", "1", "--params", "1.5"], "1.5 must be a whole number"),
        (["--seconds-per-step", "1,1", "--params", "1", "--link", "fast"], "'fast' is not a link; use BANDWIDTH"),
        (["--seconds-per-step", "1,1", "--params", "1", "--link", "1Gbit,20"], "is not a link"),
        (["--seconds-per-step", "1,1", "--params", "1", "--upload", "int2"], "invalid choice: 'int2'"),
    ],
)  # fmt: skip
def test_wrong_value_is_named(arguments: list[str], text: str, command: Command) -> None:
    code, _, errors = command("plan", *arguments)
    assert code == 2
    assert text in errors


def test_links_must_be_one_or_one_for_each_machine(command: Command) -> None:
    link = ["--link", "1Gbit"]
    code, _, errors = command("plan", "--seconds-per-step", "1,1,1,1", "--params", "1", *link, *link)
    assert code == 1
    assert "--link is given 2 times, and there are 3 machines beside that of rank 0" in errors


@pytest.mark.slow
def test_live_run_of_emulated_devices_agrees_within_5_percent(live_run: Callable[..., LiveRun]) -> None:
    """The forecast gets the speeds that the live run has measured, so a busy machine changes both."""
    options = {"local_steps": 10, "grace": 0.0}
    run = live_run(seconds_per_step=[0.06, 0.1, 0.25], strategy=options, trainer={"max_steps": 130})
    code, text = run._started.finish(run.process)
    assert code == 0, text
    pushes = [push for push in read_pushes(find_event_file(run.out)) if push["refused"] is None and push["steps"]]
    seconds, exchanges, live_speeds, live_staleness = [], [], [], []
    for worker in range(3):
        own = [push for push in pushes if push["worker"] == worker][2:-1]
        assert len(own) > 10
        seconds.append(sum(push["compute_seconds"] for push in own) / sum(push["timed_steps"] for push in own))
        exchanges.append(statistics.fmean(push["exchange_seconds"] for push in own))
        live_speeds.append(sum(push["steps"] for push in own[1:]) / (own[-1]["seconds"] - own[0]["seconds"]))
        live_staleness += [push["staleness"] for push in own]
    predicted = forecast(seconds, exchanges, local_steps=10, grace=0.0)
    assert predicted.steps_per_second == pytest.approx(sum(live_speeds), rel=0.05)
    for worker, speed in zip(predicted.workers, live_speeds, strict=True):
        assert worker.steps_per_second == pytest.approx(speed, rel=0.05)
        assert worker.share == pytest.approx(speed / sum(live_speeds), rel=0.05)
    assert predicted.staleness == pytest.approx(statistics.fmean(live_staleness), rel=0.1)


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_run_that_is_over_before_it_settles_is_forecast(steps: int, command: Command) -> None:
    words = ["--seconds-per-step", "1,2,50", "--params", "1e6", "--link", "1Gbit", "--max-steps", steps, "--json"]
    code, output, errors = command("plan", *words)
    assert code == 0, errors
    found = json.loads(output)
    assert len(found["workers"]) == 3
    assert sum(worker["share"] for worker in found["workers"]) == pytest.approx(1.0)
    assert 0.05 < method(found, "this strategy")["steps_per_second"] < 1.5


@pytest.mark.parametrize("words", [["1e-6,1e6", "--params", "1"], ["1,2", "--params", "1e30", "--link", "1kbit"]])
def test_machine_that_hardly_takes_part_is_named(words: list[str], command: Command) -> None:
    code, _, errors = command("plan", "--seconds-per-step", *words)
    assert code == 1
    assert "worker 1 takes part only once in more than" in errors
