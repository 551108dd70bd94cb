"""Modules of many kinds on two ranks of unequal speed: one final model, or an error that names the module's part."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.lightning_contract import modules_job
from tests.lightning_contract.hook_order import hooks_around, hooks_of_a_step, recording
from tests.lightning_models import EMAWeightAveraging, Regression, loader, quiet_trainer
from tests.processes import jobs

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """Run the job and return the notes of both ranks by case. A step of rank 1 takes six times as long."""
    folder = tmp_path_factory.mktemp("modules")
    with jobs() as started:
        started.run(modules_job.__file__, folder, timeout=240)
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys() == modules_job.CASES.keys()
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("case", modules_job.CASES)
def test_ranks_end_with_the_same_model_and_meet_the_budget(seen: dict[str, Ranks], case: str) -> None:
    ranks = seen[case]
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert all(rank["finite"] for rank in ranks)
    assert all(rank["steps"] > 0 for rank in ranks)
    epochs = {"finetuning": 3, "averaged_by_epochs": 4}
    steps = {"schedule_free": 100, "validated_within_a_round": 80}
    expected = epochs[case] * 128 // 8 if case in epochs else 2 * steps.get(case, modules_job.STEPS)
    assert sum(rank["steps"] for rank in ranks) == expected


def test_only_trained_parameters_of_a_model_with_adapters_are_exchanged(seen: dict[str, Ranks]) -> None:
    first, second = seen["adapters"]
    assert first["exchanged"] == ["net.down.weight", "net.up.weight", "net.head.weight", "net.head.bias"]
    # The frozen parts differed between ranks. Now all ranks have those of rank 0.
    assert first["frozen_before"] != second["frozen_before"]
    assert first["frozen_before"] == first["frozen_after"] == second["frozen_after"]
    assert first["shared"] == second["shared"] == [], "they have not changed in training"
    assert first["adapter_moved"]
    # Buffers that are not saved stay as they are on each rank.
    assert first["scratch_kept"]
    assert second["scratch_kept"]


def test_tied_parameters_are_exchanged_once_and_stay_tied(seen: dict[str, Ranks]) -> None:
    for rank in seen["tied_and_unused"]:
        assert "net.first.weight" in rank["exchanged"]
        assert "net.second.weight" not in rank["exchanged"]
        assert rank["still_tied"]


def test_unused_parameters_are_copied_from_rank_0_and_never_change(seen: dict[str, Ranks]) -> None:
    first, second = seen["tied_and_unused"]
    assert first["unused_before"] != second["unused_before"]
    assert first["unused_before"] == first["unused_after"] == second["unused_after"]


def test_layer_that_a_finetuning_callback_unfreezes_is_exchanged(seen: dict[str, Ranks]) -> None:
    for rank in seen["finetuning"]:
        assert "net.0.weight" in rank["exchanged"]
        assert rank["backbone_moved"]


def test_integers_are_copied_from_rank_0_and_statistics_are_merged(seen: dict[str, Ranks]) -> None:
    first, second = seen["dtypes_and_buffers"]
    assert "net.order" not in first["exchanged"]
    assert first["order_before"] != second["order_before"]
    assert first["order_before"] == first["order_after"] == second["order_after"]
    assert {"net.norm.running_mean", "net.norm.running_var"} <= set(first["exchanged"])
    assert first["batches"] == second["batches"] == first["steps"]
    assert first["variance"] == second["variance"] > 0
    assert first["scale"] == "torch.bfloat16"


def test_memory_formats_are_kept(seen: dict[str, Ranks]) -> None:
    assert all(rank["kept"] for rank in seen["channels_last"])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", "float32"),
        ("bf16-mixed", "float32"),
        ("bf16-true", "bfloat16"),
        ("16-true", "float16"),
        ("64-true", "float64"),
    ],
)
def test_parameters_have_the_dtype_of_the_precision(seen: dict[str, Ranks], precision: str, dtype: str) -> None:
    for rank in seen[precision]:
        assert rank["dtype"] == f"torch.{dtype}"
    warned = [text for text in seen[precision][0]["warned"] if "kept in fp32" in text]
    assert len(warned) == (precision == "64-true")


def test_steps_that_the_scaler_skips_do_not_count(seen: dict[str, Ranks]) -> None:
    for rank in seen["scaled"]:
        # The loss of every fourth batch overflows, and its step is skipped.
        assert rank["batches"] > rank["steps"]


def test_toggled_parameters_are_trainable_again_after_training(seen: dict[str, Ranks]) -> None:
    assert all(rank["trainable"] for rank in seen["adversarial"])
    assert any("discriminator" in name for name in seen["adversarial"][0]["exchanged"])


def test_lbfgs_step_counts_once_and_reduces_the_loss(seen: dict[str, Ranks]) -> None:
    for rank in seen["lbfgs"]:
        assert rank["calls"] > rank["steps"], "a step evaluates its closure several times"
        assert rank["after"] < rank["before"]


def test_gradients_are_clipped(seen: dict[str, Ranks]) -> None:
    assert all(0.49 < rank["norm"] < 0.51 for rank in seen["clipped_by_norm"])
    assert all(0.24 < rank["value"] < 0.26 for rank in seen["clipped_by_value"])


def test_compiled_module_keeps_its_parameter_names(seen: dict[str, Ranks]) -> None:
    assert seen["compiled"][0]["keys"] == ["net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]
    assert "net._orig_mod.0.weight" in seen["compiled_part"][0]["exchanged"]


def test_hooks_are_called_as_on_a_single_device(seen: dict[str, Ranks]) -> None:
    calls: list[str] = []
    module, callback = recording(calls)
    trainer = quiet_trainer("auto", max_steps=modules_job.STEPS, limit_val_batches=0, callbacks=[callback])
    trainer.fit(module, loader(), loader(32))
    step = hooks_of_a_step(calls)
    assert step.index("module.on_before_zero_grad") < step.index("module.backward")
    for rank in seen["hooks"]:
        assert rank["step"] == step
        assert rank["around"] == hooks_around(calls)


def test_teacher_that_follows_the_module_is_exchanged_validated_and_saved(seen: dict[str, Ranks]) -> None:
    first, second = seen["teacher"]
    names = [f"teacher.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")]
    assert first["shared"] == second["shared"] == names, "the backbone does not change"
    assert first["moved"]
    assert first["teacher"] == second["teacher"]
    assert first["saved"], "the last checkpoint has the final teacher"
    assert first["validated"]
    assert all(first["validated"]), "the teacher of the run is validated"


def test_weights_that_a_schedule_free_optimizer_shows_are_validated_and_left(seen: dict[str, Ranks]) -> None:
    first, _ = seen["schedule_free"]
    assert len(first["validated"]) >= 2
    assert all(first["validated"]), "the optimizer's eval() must not move the global model"
    assert first["after"] < 0.6 * first["before"]


def test_memory_bank_that_grows_is_each_ranks_own_and_that_of_rank_0_at_the_end(seen: dict[str, Ranks]) -> None:
    first, second = seen["memory_bank"]
    assert first["rows"] == second["rows"] == 8 * (first["steps"] - 2)
    assert first["fitted"] == second["fitted"]
    assert first["saved"], "checkpoints have what rank 0 had until then"
    assert first["periodic"], "so have the run's own"


@pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has no EMAWeightAveraging")
def test_weights_are_averaged_over_the_global_model_and_the_average_reaches_all_ranks(seen: dict[str, Ranks]) -> None:
    first, second = seen["averaged"]
    # Before the first push is merged, the average is the initial model, whatever rank 0 has learned locally.
    assert first["early"] == first["start"]
    assert first["average"] == first["at_end"] == second["at_end"]
    assert first["updates"] == modules_job.STEPS
    assert second["updates"] == 0, "only rank 0 averages"


def test_averaging_by_epochs_uses_the_global_model_and_its_own_learning_rate(seen: dict[str, Ranks]) -> None:
    first, second = seen["averaged_by_epochs"]
    assert first["average"] == first["at_end"] == second["at_end"]
    assert first["averages"] == 4
    assert first["rates"] == second["rates"] == pytest.approx([0.03, 0.01, 0.01, 0.01])
    # Statistics of BatchNorm are averaged like weights. No additional epoch measures them.
    assert first["statistics"] == first["averaged_statistics"] == second["statistics"]


def test_validation_within_a_round_restores_the_local_weights(seen: dict[str, Ranks]) -> None:
    first, second = (rank["states"] for rank in seen["validated_within_a_round"])
    validated = [index for index, (moment, *_) in enumerate(first) if moment == "validated"]
    within = [index for index in validated if index + 1 < len(first) and first[index - 1][2] == first[index + 1][2]]
    replaced = [index for index in within if first[index][1] != first[index - 1][1]]
    assert replaced, "within a round, the local weights differ from the global model"
    for index in replaced:
        before, after = first[index - 1], first[index + 1]
        assert (before[0], after[0]) == ("before", "after")
        assert before[1] == after[1]
    assert all(moment == "after" for moment, *_ in second), "rank 1 does not validate"


@pytest.mark.parametrize(
    "strategy", [partial(AsyncLocalSGDStrategy, local_steps=4), partial(Simulated, [0.1, 0.2], local_steps=4)]
)
def test_run_with_a_memory_bank_resumes(strategy: Any, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    module = modules_job.Remembering()
    trainer = quiet_trainer(strategy(), max_steps=8, limit_val_batches=0)
    trainer.fit(module, loader())
    trainer.save_checkpoint(path)
    rows = len(module.bank)
    resumed = modules_job.Remembering()
    trainer = quiet_trainer(strategy(), max_steps=12, limit_val_batches=0)
    trainer.fit(resumed, loader(), ckpt_path=path)
    assert torch.equal(resumed.bank[:rows], module.bank)
    assert len(resumed.bank) > rows


# ---------------------------------------------------------------------------- rejections


def fit(module: Regression, strategy: AsyncLocalSGDStrategy | str, **options: Any) -> None:
    trainer = quiet_trainer(strategy, limit_val_batches=0, **{"max_steps": 12, **options})
    trainer.fit(module, loader(shuffle=False))


class Unfreezing(modules_job.Module):
    """Unfreezes a layer during training."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 5:
            self.net[0].requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})


def test_unfreezing_a_parameter_that_is_not_exchanged_is_rejected_with_its_name() -> None:
    with pytest.raises(RuntimeError, match=r"'net.0.weight' was frozen.*ExchangeOptions\(frozen=True\)"):
        fit(Unfreezing(), AsyncLocalSGDStrategy(local_steps=4))


def test_unfreezing_works_if_frozen_parameters_are_exchanged() -> None:
    module = Unfreezing()
    before = module.net[0].weight.detach().clone()
    fit(module, AsyncLocalSGDStrategy(local_steps=4, exchange=ExchangeOptions(frozen=True)))
    assert not torch.equal(module.net[0].weight, before)


def test_model_on_the_meta_device_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"'net.weight' is on the meta device"):
        fit(Regression(nn.Linear(8, 1, device="meta")), AsyncLocalSGDStrategy())


def test_averaging_by_epochs_is_rejected_if_each_rank_has_its_own_epochs() -> None:
    strategy = AsyncLocalSGDStrategy(start_method="spawn", exchange=ExchangeOptions(start_timeout=60.0))
    averaging = StochasticWeightAveraging(swa_lrs=0.01)
    options = {"devices": 2, "use_distributed_sampler": False, "max_steps": -1, "max_epochs": 2}
    with pytest.raises(Exception, match=r"StochasticWeightAveraging averages at the ends of epochs.*WeightAveraging"):
        fit(Regression(), strategy, callbacks=[averaging], **options)


def test_single_worker_with_lbfgs_equals_plain_training_bit_for_bit() -> None:
    """An exchange that changes nothing keeps the curvature that L-BFGS has estimated."""
    weights = []
    plain = partial(torch.optim.SGD, lr=1.0)
    for strategy in ("auto", AsyncLocalSGDStrategy(local_steps=3, outer_optimizer=plain)):
        torch.manual_seed(2)
        module = modules_job.Closures()
        fit(module, strategy)
        weights.append(module.net.weight)
    assert torch.equal(*weights)
