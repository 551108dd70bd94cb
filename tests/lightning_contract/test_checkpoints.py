"""Checkpoints hold what a run needs to go on, here, under other strategies and with another number of ranks."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_async_localsgd import AsyncLocalSGDStrategy, DelayedNesterov
from lightning_async_localsgd.durable import verified
from tests.lightning_contract import checkpoints_job as job
from tests.processes import jobs

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the job has run."""
    out = tmp_path_factory.mktemp("checkpoints")
    trainer = job.trainer_of(out, strategy="auto", devices=1, max_steps=6)
    trainer.fit(job.Module(), job.loader())
    trainer.save_checkpoint(out / "single.ckpt")
    with jobs() as started:
        code, text = started.finish(started.start([sys.executable, job.__file__, out]), timeout=240)
    assert code == 0, text[-6000:]
    return out


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Ranks]:
    """What each of the two ranks noted in each case; rank 1 takes five times as long for a step."""
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys() == job.CASES.keys()
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def saved(path: Path) -> dict[str, Any]:
    """A checkpoint, read as safely as torch can."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


# ------------------------------------------------------------------------------- saving


def test_any_checkpoint_is_validated_tested_and_predicted_with_on_all_ranks(seen: dict[str, Ranks]) -> None:
    first, second = seen["saved"]
    assert first["paths"] == second["paths"]
    for name in ("best", "last", "path"):
        assert first["results"][name][:2] == second["results"][name][:2]


def test_what_is_saved_after_training_is_what_all_ranks_hold(seen: dict[str, Ranks]) -> None:
    assert all(rank["after_is_final"] for rank in seen["saved"])


def test_a_checkpoint_of_the_middle_of_a_run_holds_one_moment_of_the_server(
    folder: Path, seen: dict[str, Ranks]
) -> None:
    checkpoint = saved(folder / "mid.ckpt")
    server = checkpoint["async_localsgd"]
    assert 0 < server["budget"]["done"] < 48
    assert sum(worker["steps"] for worker in server["workers"].values()) == server["budget"]["done"]
    assert sum(worker["rounds"] for worker in server["workers"].values()) == server["model"]["version"]
    assert server["model"]["outer"]["momentum"].keys() == dict(job.Module().named_parameters()).keys()
    # The weights are the checkpoint's own; they are there a second time only if a push came between the two looks.
    theta = server["model"].get("theta", {})
    assert all(tensor.shape == checkpoint["state_dict"][name].shape for name, tensor in theta.items())
    assert "theta" not in saved(folder / "after.ckpt")["async_localsgd"]["model"]


def test_weights_alone_are_weights_alone(folder: Path) -> None:
    checkpoint = saved(folder / "weights.ckpt")
    assert "async_localsgd" not in checkpoint
    assert job.same(checkpoint["state_dict"], saved(folder / "after.ckpt")["state_dict"])


def test_a_saved_tensor_has_memory_of_its_own(folder: Path) -> None:
    for name in ("mid.ckpt", "after.ckpt"):
        tensors = saved(folder / name)["state_dict"].values()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_what_is_written_later_has_not_changed_meanwhile(seen: dict[str, Ranks]) -> None:
    for plugin in ("own", "async"):
        assert seen["written_later"][0][plugin] == [1, True]
        assert seen["written_later"][1][plugin][0] == 0, "rank 0 alone writes"


def test_workers_states_are_kept_beside_the_checkpoints_that_name_them(folder: Path) -> None:
    kept = list((folder / "beside").glob("*.ckpt"))
    assert len(kept) == 3, "two, and the last"
    for path in kept:
        [name] = saved(path)["async_localsgd"]["inner_states"].values()
        [found] = Path(f"{path}.workers").iterdir()
        # What the worker had saved last when the checkpoint was written, or has saved when it was asked to afterwards.
        assert found.name[:15] >= name[:15] == f"worker-1-{int(name[9:15]):06d}"
        assert verified(found)
    assert len(list((folder / "beside").glob("*.workers"))) == 3, "those of removed checkpoints went with them"


# ------------------------------------------------------------------------------ resuming


def of(path: Path) -> dict[str, Any]:
    """The counters in a checkpoint."""
    return job.counters(saved(path)["async_localsgd"])


def assert_begins_with(start: dict[str, Any], counters: dict[str, Any]) -> None:
    """Others may have handed in a first round by the time rank 0 looks at the run's counters."""
    for total, by_worker in (("version", "rounds"), ("done", "steps")):
        more = {n: count - counters[by_worker].get(n, 0) for n, count in start[by_worker].items()}
        assert min(more.values(), default=0) >= 0
        assert start[total] - counters[total] == sum(more.values())
    assert start["version"] - counters["version"] <= 3


def rate(steps: float) -> float:
    """The schedule's learning rate after ``steps`` of global progress."""
    return float(1e-2 * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * steps / 60))))


def test_a_resumed_run_goes_on_with_all_counters(folder: Path, seen: dict[str, Ranks]) -> None:
    first, second = seen["resumed"]
    assert first["same_start"]
    assert second["same_start"]
    assert_begins_with(first["start"], of(folder / "after.ckpt"))
    assert of(folder / "after.ckpt")["done"] == 48
    assert first["start"]["speeds"].keys() == {"0", "1"}
    # The rest of the budget, and of the schedule: both begin where 24 steps of each rank have led.
    assert first["steps"] + second["steps"] == 2 * 48 - 48
    assert first["rates"][0] == second["rates"][0] == pytest.approx(rate(24))
    end = of(folder / "resumed.ckpt")
    assert end["done"] == sum(end["steps"].values()) == 96
    assert end["version"] == sum(end["rounds"].values()) > first["start"]["version"]


def test_the_last_checkpoint_is_found_by_its_name(seen: dict[str, Ranks]) -> None:
    first = seen["resumed_from_last"][0]
    assert_begins_with(first["start"], first["last"])


def test_rounds_that_were_under_way_are_taken_again(folder: Path, seen: dict[str, Ranks]) -> None:
    start = seen["resumed_in_mid_run"][0]["start"]
    assert_begins_with(start, of(folder / "mid.ckpt"))
    end = of(folder / "completed.ckpt")
    assert end["done"] == sum(end["steps"].values()) == 48


def test_a_single_device_checkpoint_is_a_starting_point(folder: Path, seen: dict[str, Ranks]) -> None:
    first, second = seen["from_a_single_device"]
    assert first["same_start"]
    assert second["same_start"]
    # Six steps of one device stand for six steps of every rank.
    assert_begins_with(first["start"], {"version": 0, "done": 12, "rounds": {}, "steps": {}})
    assert first["steps"] + second["steps"] == 48 - 12
    assert first["rates"][0] == second["rates"][0] == pytest.approx(rate(6))
    assert any("the global model starts from its weights, the outer optimizer from scratch" in text
               for text in first["messages"])  # fmt: skip


def test_checkpoints_go_to_ddp_and_come_back(seen: dict[str, Ranks]) -> None:
    first, second = seen["through_ddp"]
    for rank in (first, second):
        assert rank["same_for_ddp"]
        assert rank["same_for_us"]
        assert rank["began_at"] == 24
        assert rank["rates"][0] == pytest.approx(rate(30))
    assert first["start"]["done"] >= 2 * 30
    assert first["steps"] + second["steps"] == 2 * (40 - 30)


def test_models_that_save_their_adapters_alone_are_restored_whole(seen: dict[str, Ranks]) -> None:
    assert all(rank["same_start"] for rank in seen["adapters_alone"])
    assert seen["adapters_alone"][0]["start"]["done"] >= 24


def test_averaging_goes_on_beside_the_global_model(folder: Path, seen: dict[str, Ranks]) -> None:
    assert all(rank["same_start"] for rank in seen["averaged"])
    checkpoint = saved(folder / "averaged" / "last.ckpt")
    assert not job.same(checkpoint["state_dict"], checkpoint["current_model_state"])
    # The state that others load is the average, so the global model is there besides.
    theta = checkpoint["async_localsgd"]["model"]["theta"]
    assert all(torch.equal(theta[name], checkpoint["current_model_state"][name]) for name in theta)
    assert seen["averaged"][0]["updates"] > int(checkpoint["averaging_state"]["n_averaged"])


def test_a_single_device_goes_on_from_our_checkpoint(folder: Path) -> None:
    watch = job.Watch()
    trainer = job.trainer_of(folder, watch, strategy="auto", devices=1, max_steps=30)
    trainer.fit(job.Module(), job.loader(), ckpt_path=folder / "after.ckpt", weights_only=True)
    assert job.same(watch.start, saved(folder / "after.ckpt")["state_dict"])
    assert watch.steps == 30 - 24


def test_another_number_of_ranks_keeps_the_share_of_the_run(folder: Path) -> None:
    watch = job.Watch()
    trainer = job.trainer_of(folder, watch, devices=1, max_steps=30)
    trainer.fit(job.Module(), job.loader(), ckpt_path=folder / "after.ckpt", weights_only=True)
    before = of(folder / "after.ckpt")
    assert watch.server["budget"]["done"] == 24, "of 30, as it was 48 of 60"
    assert watch.server["model"]["version"] == before["version"]
    assert watch.steps == 6


def test_another_outer_optimizer_is_refused_by_name(folder: Path) -> None:
    strategy = AsyncLocalSGDStrategy(outer_optimizer=partial(torch.optim.SGD, lr=0.5))
    trainer = job.trainer_of(folder, strategy=strategy, devices=1)
    with pytest.raises(ValueError, match=r"outer_optimizer=DelayedNesterov, this run has TorchOptimizer"):
        trainer.fit(job.Module(), job.loader(), ckpt_path=folder / "after.ckpt")


def test_another_set_of_trained_parameters_is_refused_by_name(folder: Path) -> None:
    class All(job.Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module = All()
    module.net[0].requires_grad_(False)
    trainer = job.trainer_of(folder, devices=1)
    with pytest.raises(ValueError, match=r"'net.0.weight'.*trains other parameters.*loads its weights"):
        trainer.fit(module, job.loader(), ckpt_path=folder / "after.ckpt")


def test_a_checkpoint_that_lacks_a_layer_loads_where_that_is_allowed(folder: Path) -> None:
    loaded = job.Module.load_from_checkpoint(folder / "after.ckpt", extra=True, strict=False)
    assert torch.equal(loaded.net[0].weight, saved(folder / "after.ckpt")["state_dict"]["net.0.weight"])
    module = job.Module(extra=True)
    module.strict_loading = False
    trainer = job.trainer_of(folder, devices=1)
    valid = job.loader(32, shuffle=False)
    found = trainer.validate(module, valid, ckpt_path=folder / "after.ckpt", verbose=False)
    plain = trainer.validate(job.Module(), valid, ckpt_path=folder / "after.ckpt", verbose=False)
    assert found == plain


# --------------------------------------------------------- one worker, bit for bit


class Numbered(job.Module):
    """Its data depends on the step alone, so that a run that goes on sees what the whole one would have seen."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.trainer.global_step)
        inputs = torch.randn(8, 8, generator=generator).to(self.dtype)
        return nn.functional.mse_loss(self.net(inputs), inputs[:, :1].sin())


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5))


@pytest.mark.parametrize("by", ["steps", "validation"])
@pytest.mark.parametrize(
    ("outer", "options"),
    [
        (DelayedNesterov(lr=0.7), {}),
        (partial(torch.optim.SGD, lr=1.0), {}),
        (partial(torch.optim.Adam, lr=0.01), {}),
        (DelayedNesterov(lr=0.7), {"precision": "bf16-true"}),
        (DelayedNesterov(lr=0.7), {"plugins": scaled}),
        (DelayedNesterov(lr=0.7), {"accumulate_grad_batches": 2}),
    ],
    ids=["nesterov", "plain", "adam", "bf16-true", "scaled", "accumulated"],
)
def test_an_interrupted_run_of_one_worker_equals_a_whole_one_bit_for_bit(
    tmp_path: Path, by: str, outer: Any, options: dict[str, Any]
) -> None:
    options = {name: [value()] if name == "plugins" else value for name, value in options.items()}

    def run(name: str, steps: int, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        L.seed_everything(1, verbose=False)
        every = {"every_n_train_steps": 5} if by == "steps" else {"monitor": "val_loss"}
        keep = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, **every)
        strategy = AsyncLocalSGDStrategy(local_steps=4, outer_optimizer=outer)
        validation = {"limit_val_batches": 0} if by == "steps" else {"limit_val_batches": 1, "val_check_interval": 5}
        trainer = job.trainer_of(
            tmp_path, keep, strategy=strategy, devices=1, max_steps=steps, **{**validation, **options}
        )
        module = Numbered()
        trainer.fit(module, job.loader(512), job.loader(32), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return job.copied(module), saved(tmp_path / f"{name}.ckpt")

    whole, state = run("whole", 17)
    run("first", 11)
    # The sixth, or the tenth, step is in the midst of a round of four.
    found = sorted((tmp_path / "first").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))
    rest, resumed = run("rest", 17, found[0])
    assert job.same(whole, rest)
    assert state["async_localsgd"]["model"]["version"] == resumed["async_localsgd"]["model"]["version"]
    assert state["async_localsgd"]["budget"] == resumed["async_localsgd"]["budget"]
    assert state["lr_schedulers"] == resumed["lr_schedulers"]
    for group, other in zip(state["optimizer_states"], resumed["optimizer_states"], strict=True):
        for index, values in group["state"].items():
            assert job.same(values, other["state"][index])
