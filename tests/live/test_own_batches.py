"""Real ranks with batch sizes of their own: each sample once an epoch, as many samples as without, clear errors."""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.server.events import read_events
from tests.lightning_contract.launching import free_port
from tests.live import own_batches_job
from tests.live.own_batches_job import BATCH, RANKS, SAMPLES
from tests.processes import Jobs, Outcome

SIZES: dict[str, Any] = {"0": 32, "2": [4, 2]}


def start(started: Jobs, out: Path, check: bool = True, **options: Any) -> Outcome:
    out.mkdir(exist_ok=True)
    code, text = started.finish(started.start([sys.executable, own_batches_job.__file__, out, json.dumps(options)]))
    if check and code != 0:
        pytest.fail(f"the job ended with {code}:\n{text[-6000:]}")
    return Outcome(code, text, out)


def samples_of(outcome: Outcome) -> Counter[int]:
    """Return how often the ranks have trained on each sample."""
    return Counter(sample for rank in outcome.ranks for batch in rank["batches"] for sample in batch)


def largest_batches(outcome: Outcome) -> list[int]:
    return [max(map(len, rank["batches"])) for rank in outcome.ranks]


def merged_samples(outcome: Outcome) -> int:
    return sum(int(worker["samples"]) for worker in outcome.summary["workers"])


def test_every_sample_is_used_once_an_epoch(started: Jobs, tmp_path: Path) -> None:
    outcome = start(started, tmp_path, batch_size=SIZES, trainer={"max_epochs": 2})
    assert samples_of(outcome) == Counter(dict.fromkeys(range(SAMPLES), 2))
    assert largest_batches(outcome) == [32, BATCH, 4]
    assert merged_samples(outcome) == 2 * SAMPLES
    for rank in outcome.ranks:
        # 38 batches of 16 samples are 13 for each of three ranks.
        assert (rank["global_step"], rank["epoch"], rank["stepping_batches"]) == (26, 2, 26)
        assert rank["rate"] == pytest.approx(0.0, abs=1e-9), "the schedule ends with the run on every rank"
        assert rank["accumulates"] == 1, "the trainer has its own value again"
        assert rank["steps"] == sorted(rank["steps"])
    assert "samples/step" in outcome.text
    assert "1200 samples of all together (max_epochs=2, 26 steps of 16 samples per worker on average)" in outcome.text


@pytest.mark.parametrize("strategy", [{}, pytest.param({"sync_warmup_steps": 10}, marks=pytest.mark.slow)])
def test_steps_mean_as_many_samples_as_with_equal_sizes(
    started: Jobs, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    outcome = start(started, tmp_path, batch_size=SIZES, strategy=strategy, trainer={"max_steps": 30})
    wanted = 30 * RANKS * BATCH
    assert wanted <= merged_samples(outcome) < wanted + 8
    assert {rank["global_step"] for rank in outcome.ranks} == {30}
    assert largest_batches(outcome) == [32, BATCH, 4]


def test_samples_of_a_dead_worker_go_to_others(started: Jobs, tmp_path: Path) -> None:
    outcome = start(
        started,
        tmp_path,
        batch_size=SIZES,
        victim={"rank": 1, "batch": 4},
        strategy={"max_restarts": 0},
        trainer={"max_epochs": 2},
    )
    assert merged_samples(outcome) == 2 * SAMPLES
    # The victim has written no notes. At most three of its batches were merged.
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("rank_*.json")]
    used = Counter(sample for rank in notes for batch in rank["batches"] for sample in batch)
    assert max(used.values()) == 2, "no sample counts more often than there are epochs"
    assert 2 * SAMPLES - 3 * BATCH <= sum(used.values()) <= 2 * SAMPLES
    assert "worker 1 left the run" in outcome.text


@pytest.mark.slow
def test_sizes_from_memory(started: Jobs, tmp_path: Path) -> None:
    outcome = start(started, tmp_path, batch_size="half_of_it", ranks=2, trainer={"max_steps": 10})
    assert largest_batches(outcome) == [BATCH // 2, BATCH // 2]
    assert merged_samples(outcome) == 10 * 2 * BATCH


def test_largest_sizes_that_fit_are_found_before_training(started: Jobs, tmp_path: Path) -> None:
    outcome = start(
        started, tmp_path, batch_size="auto", ranks=2, largest=40, of_rank={"1": {"largest": 20}},
        trainer={"max_epochs": 2},
    )  # fmt: skip
    assert largest_batches(outcome) == [32, 16]
    assert samples_of(outcome) == Counter(dict.fromkeys(range(SAMPLES), 2)), "trials use up no data"
    for rank in outcome.ranks:
        assert (rank["global_step"], rank["attribute"]) == (38, BATCH), "a step of the script has 16 samples"
    assert not list(tmp_path.glob(".scale_batch_size*"))


@pytest.mark.slow
def test_run_resumes_in_the_middle_of_an_epoch(started: Jobs, tmp_path: Path) -> None:
    first = start(started, tmp_path / "first", batch_size=SIZES, save=9, trainer={"max_steps": 11})
    saved = next((tmp_path / "first").glob("saved*.ckpt"))
    again = start(
        started, tmp_path / "again", batch_size={"0": 8, "1": 24}, ckpt_path=str(saved), trainer={"max_epochs": 2}
    )
    assert merged_samples(first) == 11 * RANKS * BATCH
    # The totals of the checkpoint are those of all pushes that it has.
    assert merged_samples(again) == 2 * SAMPLES
    assert {rank["global_step"] for rank in again.ranks} == {26}


def test_replay_equals_the_live_run_bit_for_bit(started: Jobs, tmp_path: Path) -> None:
    start(started, tmp_path, batch_size=SIZES, trainer={"max_epochs": 2})
    assert {push.samples for push in pushes(tmp_path)} > {0}
    text = started.run(own_batches_job.__file__, tmp_path, json.dumps({"batch_size": SIZES, "replay": True}))
    assert "the global model is equal to that of" in text
    assert "to the last bit" in text


def pushes(out: Path) -> list[Any]:
    return [event.content["push"] for event in read_events(out / "recording.jsonl") if event.kind == "push"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": (
        {"batch_size": {"1": 32}, "of_rank": {"1": {"batch_size": {"1": 8}}}},
        "host HOST has batch_size={1: 8}, but rank 0 on host HOST has batch_size={1: 32}; use the same option on every",
    ),
    "only one host": (
        {"of_rank": {"1": {"batch_size": {"1": 8}}}},
        "host HOST has batch_size={1: 8}, but rank 0 on host HOST has no batch_size; use the same option on every host",
    ),
    "batches of the loader": (
        {"batch_size": {"1": 32}, "of_rank": {"1": {"batch": 8}}},
        "worker 1 on host HOST: it has batch_size={1: 32} and steps of 8 samples in the data loader and the trainer, "
        "but rank 0 on host HOST has batch_size={1: 32} and steps of 16 samples",
    ),
    "larger than an epoch": (
        {"batch_size": {"1": 700}},
        "worker 1 on host HOST: batch_size={1: 700} gives worker 1 batches of 700 samples, but an epoch has only 600",
    ),
    "no hook": (
        {"batch_size": "auto", "passes_loader": True},
        "on host HOST: batch_size='auto' uses Lightning's BatchSizeFinder, which asks for the data loader again",
    ),
    "not one sample": (
        {"batch_size": "auto", "of_rank": {"1": {"largest": 0}}},
        "worker 1 on host HOST: batch_size='auto' found that a step of one sample does not fit into the memory",
    ),
    "too large": (
        {"batch_size": {"1": 32}, "of_rank": {"1": {"largest": 20}}, "trainer": {"max_steps": 100_000}},
        "a batch of 32 samples of worker 1 does not fit into the memory of cpu on host HOST (batch_size={1: 32});",
    ),
    "rank 0 too large": (
        {"batch_size": {"0": 32}, "of_rank": {"0": {"largest": 20}}, "trainer": {"max_steps": 100_000}},
        "a batch of 32 samples of worker 0 does not fit into the memory of cpu on host HOST (batch_size={0: 32});",
    ),
}


QUICK = ("sizes", "not one sample", "too large")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in BAD]
)
def test_bad_input_ends_all_ranks_with_a_text_that_names_the_host(started: Jobs, tmp_path: Path, case: str) -> None:
    options, text = BAD[case]
    outcome = start(started, tmp_path, check=False, ranks=2, **options)
    assert outcome.code != 0
    assert outcome.text.count(text.replace("HOST", socket.gethostname())) >= 2, "both ranks say so"
    assert not list(tmp_path.glob("rank_*"))


@pytest.mark.slow
def test_machine_that_joins_has_batches_of_its_own_and_needs_the_same_option(started: Jobs, tmp_path: Path) -> None:
    port = free_port()
    sizes = {"0": 32, "1": [4, 2], "2": [4, 2]}
    options = {
        "ranks": 1,
        "batch_size": sizes,
        "port": port,
        "strategy": {"expected_workers": 2},
        "trainer": {"max_epochs": 2},
    }
    command = [sys.executable, own_batches_job.__file__, tmp_path]
    token = {"ASYNC_LOCALSGD_TOKEN": "of this test, and of no other"}
    joining = {**token, "ASYNC_LOCALSGD_JOIN": f"tcp://127.0.0.1:{port}"}
    host = started.start([*command, json.dumps(options)], **token)
    # Rank 0 waits for a second worker, so this one comes first whenever it is ready.
    code, text = started.finish(started.start([*command, json.dumps({**options, "batch_size": {"0": 8}})], **joining))
    assert code != 0
    assert f"on host {socket.gethostname()} cannot join: it has batch_size={{0: 8}} and steps of 16 samples" in text
    assert "but the run has batch_size={0: 32, 1: (4, 2), 2: (4, 2)} and steps of 16 samples" in text
    guest = started.start([*command, json.dumps(options)], **joining)
    for process in (guest, host):
        code, text = started.finish(process)
        assert code == 0, text[-6000:]
    outcome = Outcome(0, text, tmp_path)
    assert merged_samples(outcome) == 2 * SAMPLES
    notes = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("rank_*.json")}
    assert {max(map(len, rank["batches"])) for rank in notes.values()} == {32, 4}
    assert sum(len(batch) for rank in notes.values() for batch in rank["batches"]) == 2 * SAMPLES
