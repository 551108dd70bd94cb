"""Checkpoints: what they hold, and how runs resume from them, also with other strategies and other numbers of ranks."""

from __future__ import annotations

import json
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
from lightning_async_localsgd.runtime.durable import verified
from tests.lightning_contract import checkpoints_job as job
from tests.lightning_models import WEIGHTS_ONLY, EMAWeightAveraging, loader, same_tensors
from tests.processes import jobs

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the job and return its folder."""
    out = tmp_path_factory.mktemp("checkpoints")
    trainer = job.trainer_of(out, strategy="auto", devices=1, max_steps=6)
    trainer.fit(job.Module(), loader())
    trainer.save_checkpoint(out / "single.ckpt")
    with jobs() as started:
        started.run(job.__file__, out, timeout=240)
    return out


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Ranks]:
    """Return the notes of both ranks by case. A step of rank 1 takes five times as long."""
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys() == job.CASES.keys()
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def saved(path: Path) -> dict[str, Any]:
    """Load a checkpoint without executing pickled code."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


# ------------------------------------------------------------------------------- saving


def test_all_ranks_evaluate_any_checkpoint_with_the_same_result(seen: dict[str, Ranks]) -> None:
    first, second = seen["saved"]
    assert first["paths"] == second["paths"]
    for name in ("best", "last", "path"):
        assert first["results"][name][:2] == second["results"][name][:2]


def test_checkpoint_saved_after_training_holds_the_final_model_of_all_ranks(seen: dict[str, Ranks]) -> None:
    assert all(rank["after_is_final"] for rank in seen["saved"])


def test_checkpoint_within_a_run_is_consistent(folder: Path) -> None:
    checkpoint = saved(folder / "mid.ckpt")
    server = checkpoint["async_localsgd"]
    assert 0 < server["budget"]["done"] < 48
    assert sum(worker["steps"] for worker in server["workers"].values()) == server["budget"]["done"]
    assert sum(worker["rounds"] for worker in server["workers"].values()) == server["model"]["version"]
    names = list(dict(job.Module().named_parameters()))
    assert list(server["model"]["moments"]) == [f"{name}:second_moment" for name in names]
    assert list(server["model"]["shapes"])[: len(names)] == names
    # The weights are stored once, unless a push was merged between the two snapshots.
    theta = server["model"].get("theta", {})
    assert all(tensor.shape == checkpoint["state_dict"][name].shape for name, tensor in theta.items())
    assert "theta" not in saved(folder / "after.ckpt")["async_localsgd"]["model"]


def test_weights_only_checkpoint_has_no_server_state(folder: Path) -> None:
    checkpoint = saved(folder / "weights.ckpt")
    assert "async_localsgd" not in checkpoint
    assert same_tensors(checkpoint["state_dict"], saved(folder / "after.ckpt")["state_dict"])


def test_saved_tensors_do_not_share_memory(folder: Path) -> None:
    for name in ("mid.ckpt", "after.ckpt"):
        tensors = saved(folder / name)["state_dict"].values()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_checkpoint_that_is_written_later_does_not_change(seen: dict[str, Ranks]) -> None:
    for plugin in ("own", "async"):
        assert seen["written_later"][0][plugin] == [1, True]
        assert seen["written_later"][1][plugin][0] == 0, "only rank 0 writes"


def test_optimizer_states_of_workers_are_kept_with_the_checkpoints_that_name_them(folder: Path) -> None:
    kept = list((folder / "beside").glob("*.ckpt"))
    assert len(kept) == 3, "the best two, and the last"
    for path in kept:
        server = saved(path)["async_localsgd"]
        [name] = server["optimizer_files"].values()
        [found] = Path(server["worker_folder"]).iterdir()
        # The newest state when the checkpoint was written, or the one saved later on request.
        assert found.name[:15] >= name[:15] == f"worker-1-{int(name[9:15]):06d}"
        assert verified(found)
    assert len(list((folder / "beside").glob("async_localsgd/*/workers/*"))) == 3, "states of removed ones are removed"
    beside = {path.name for path in (folder / "beside").iterdir()}
    assert beside == {*(path.name for path in kept), "async_localsgd"}, "nothing else is beside a user's checkpoints"


# ------------------------------------------------------------------------------ resuming


def of(path: Path) -> dict[str, Any]:
    """Return the counters in a checkpoint."""
    return job.counters(saved(path)["async_localsgd"])


def assert_begins_with(start: dict[str, Any], counters: dict[str, Any]) -> None:
    """Check that a run starts with these counters. Other ranks may have pushed a first round already."""
    for total, by_worker in (("version", "rounds"), ("done", "steps")):
        more = {n: count - counters[by_worker].get(n, 0) for n, count in start[by_worker].items()}
        assert min(more.values(), default=0) >= 0
        assert start[total] - counters[total] == sum(more.values())
    assert start["version"] - counters["version"] <= 3


def rate(steps: float) -> float:
    """Return the schedule's learning rate after a number of global steps."""
    return float(1e-2 * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * steps / 60))))


def test_resumed_run_restores_all_counters(folder: Path, seen: dict[str, Ranks]) -> None:
    first, second = seen["resumed"]
    assert first["same_start"]
    assert second["same_start"]
    assert_begins_with(first["start"], of(folder / "after.ckpt"))
    assert of(folder / "after.ckpt")["done"] == 48
    assert first["start"]["speeds"].keys() == {"0", "1"}
    # Budget and schedule continue after 24 steps of each rank.
    assert first["steps"] + second["steps"] == 2 * 48 - 48
    assert first["rates"][0] == second["rates"][0] == pytest.approx(rate(24))
    end = of(folder / "resumed.ckpt")
    assert end["done"] == sum(end["steps"].values()) == 96
    assert end["version"] == sum(end["rounds"].values()) > first["start"]["version"]


def test_run_resumes_from_the_last_checkpoint(seen: dict[str, Ranks]) -> None:
    first = seen["resumed_from_last"][0]
    assert_begins_with(first["start"], first["last"])


def test_unfinished_rounds_are_repeated(folder: Path, seen: dict[str, Ranks]) -> None:
    start = seen["resumed_in_mid_run"][0]["start"]
    assert_begins_with(start, of(folder / "mid.ckpt"))
    end = of(folder / "completed.ckpt")
    assert end["done"] == sum(end["steps"].values()) == 48


def test_run_resumes_from_a_single_device_checkpoint(folder: Path, seen: dict[str, Ranks]) -> None:
    first, second = seen["from_a_single_device"]
    assert first["same_start"]
    assert second["same_start"]
    # Six steps of one device count as six steps of each rank.
    assert_begins_with(first["start"], {"version": 0, "done": 12, "rounds": {}, "steps": {}})
    assert first["steps"] + second["steps"] == 48 - 12
    assert first["rates"][0] == second["rates"][0] == pytest.approx(rate(6))
    assert any("the global model starts from its weights, and the outer optimizer starts fresh" in text
               for text in first["messages"])  # fmt: skip


def test_ddp_resumes_our_checkpoint_and_we_resume_that_of_ddp(seen: dict[str, Ranks]) -> None:
    first, second = seen["through_ddp"]
    for rank in (first, second):
        assert rank["same_for_ddp"]
        assert rank["same_for_us"]
        assert rank["began_at"] == 24
        assert rank["rates"][0] == pytest.approx(rate(30))
    assert first["start"]["done"] >= 2 * 30
    assert first["steps"] + second["steps"] == 2 * (40 - 30)


def test_model_that_saves_only_its_adapters_is_restored_completely(seen: dict[str, Ranks]) -> None:
    assert all(rank["same_start"] for rank in seen["adapters_alone"])
    assert seen["adapters_alone"][0]["start"]["done"] >= 24


@pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has no EMAWeightAveraging")
def test_weight_averaging_is_resumed_beside_the_global_model(folder: Path, seen: dict[str, Ranks]) -> None:
    assert all(rank["same_start"] for rank in seen["averaged"])
    checkpoint = saved(folder / "averaged" / "last.ckpt")
    assert not same_tensors(checkpoint["state_dict"], checkpoint["current_model_state"])
    # Other strategies load the average, so the global model is saved in addition.
    theta = checkpoint["async_localsgd"]["model"]["theta"]
    assert all(torch.equal(theta[name], checkpoint["current_model_state"][name]) for name in theta)
    assert seen["averaged"][0]["updates"] > int(checkpoint["averaging_state"]["n_averaged"])


def test_single_device_resumes_our_checkpoint(folder: Path) -> None:
    watch = job.Watch()
    trainer = job.trainer_of(folder, watch, strategy="auto", devices=1, max_steps=30)
    trainer.fit(job.Module(), loader(), ckpt_path=folder / "after.ckpt", **WEIGHTS_ONLY)
    assert same_tensors(watch.start, saved(folder / "after.ckpt")["state_dict"])
    assert watch.batches == 30 - 24


def test_run_resumed_with_another_number_of_ranks_keeps_its_relative_progress(folder: Path) -> None:
    watch = job.Watch()
    trainer = job.trainer_of(folder, watch, devices=1, max_steps=30)
    trainer.fit(job.Module(), loader(), ckpt_path=folder / "after.ckpt", **WEIGHTS_ONLY)
    before = of(folder / "after.ckpt")
    assert watch.server["budget"]["done"] == 24, "24 of 30 steps, like 48 of 60"
    assert watch.server["model"]["version"] == before["version"]
    assert watch.batches == 6


def test_other_outer_optimizer_is_rejected(folder: Path) -> None:
    strategy = AsyncLocalSGDStrategy(outer_optimizer=partial(torch.optim.SGD, lr=0.5))
    trainer = job.trainer_of(folder, strategy=strategy, devices=1)
    with pytest.raises(ValueError, match=r"outer_optimizer=DelayedNesterov, this run has TorchOptimizer"):
        trainer.fit(job.Module(), loader(), ckpt_path=folder / "after.ckpt")


def test_other_trained_parameters_are_rejected(folder: Path) -> None:
    class All(job.Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module = All()
    module.net[0].requires_grad_(False)
    trainer = job.trainer_of(folder, devices=1)
    with pytest.raises(ValueError, match=r"'net.0.weight'.*trains other parameters.*loads the checkpoint's weights"):
        trainer.fit(module, loader(), ckpt_path=folder / "after.ckpt")


def test_checkpoint_without_a_layer_loads_if_strict_is_false(folder: Path) -> None:
    loaded = job.Module.load_from_checkpoint(folder / "after.ckpt", extra=True, strict=False)
    assert torch.equal(loaded.net[0].weight, saved(folder / "after.ckpt")["state_dict"]["net.0.weight"])
    module = job.Module(extra=True)
    module.strict_loading = False
    trainer = job.trainer_of(folder, devices=1)
    valid = loader(32, shuffle=False)
    found = trainer.validate(module, valid, ckpt_path=folder / "after.ckpt", verbose=False)
    plain = trainer.validate(job.Module(), valid, ckpt_path=folder / "after.ckpt", verbose=False)
    assert found == plain


# --------------------------------------------------------- one worker, bit for bit


class Numbered(job.Module):
    """Makes its data from the step, so that a resumed run trains on the same data as an uninterrupted one."""

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
def test_interrupted_run_of_one_worker_equals_an_uninterrupted_one_bit_for_bit(
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
        trainer.fit(module, loader(512), loader(32), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return job.copied(module), saved(tmp_path / f"{name}.ckpt")

    whole, state = run("whole", 17)
    run("first", 11)
    # Neither step 5 nor step 10 is the end of a round of four.
    found = sorted((tmp_path / "first").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))
    rest, resumed = run("rest", 17, found[0])
    assert same_tensors(whole, rest)
    assert state["async_localsgd"]["model"]["version"] == resumed["async_localsgd"]["model"]["version"]
    assert state["async_localsgd"]["budget"] == resumed["async_localsgd"]["budget"]
    assert state["lr_schedulers"] == resumed["lr_schedulers"]
    for group, other in zip(state["optimizer_states"], resumed["optimizer_states"], strict=True):
        for index, values in group["state"].items():
            assert same_tensors(values, other["state"][index])
