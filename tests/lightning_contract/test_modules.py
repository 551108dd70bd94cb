"""Every kind of module trains on two ranks of unequal speed and ends as one model, or is refused by name."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from tests.lightning_contract import modules_job
from tests.processes import jobs

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """What each of the two ranks noted in each case of the job; rank 1 takes six times as long for a step."""
    folder = tmp_path_factory.mktemp("modules")
    with jobs() as started:
        code, text = started.finish(started.start([sys.executable, modules_job.__file__, folder]), timeout=240)
    assert code == 0, text[-6000:]
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys() == modules_job.CASES.keys()
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("case", modules_job.CASES)
def test_all_ranks_end_with_one_model_and_the_budget_is_met(seen: dict[str, Ranks], case: str) -> None:
    ranks = seen[case]
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert all(rank["finite"] for rank in ranks)
    assert all(rank["steps"] > 0 for rank in ranks)
    epochs = {"finetuning": 3, "averaged_by_epochs": 4}
    expected = epochs[case] * 128 // 8 if case in epochs else 2 * modules_job.STEPS
    assert sum(rank["steps"] for rank in ranks) == expected


def test_models_with_adapters_exchange_what_trains(seen: dict[str, Ranks]) -> None:
    first, second = seen["adapters"]
    assert first["exchanged"] == ["net.down.weight", "net.up.weight", "net.head.weight", "net.head.bias"]
    # Frozen parts were different on every rank; all have those of rank 0 now.
    assert first["frozen_before"] != second["frozen_before"]
    assert first["frozen_before"] == first["frozen_after"] == second["frozen_after"]
    assert first["adapter_moved"]
    # Buffers that are not saved are each rank's own.
    assert first["scratch_kept"]
    assert second["scratch_kept"]


def test_tied_parameters_are_exchanged_once_and_stay_tied(seen: dict[str, Ranks]) -> None:
    for rank in seen["tied_and_unused"]:
        assert "net.first.weight" in rank["exchanged"]
        assert "net.second.weight" not in rank["exchanged"]
        assert rank["still_tied"]


def test_unused_parameters_are_rank_0s_on_all_ranks_and_never_move(seen: dict[str, Ranks]) -> None:
    first, second = seen["tied_and_unused"]
    assert first["unused_before"] != second["unused_before"]
    assert first["unused_before"] == first["unused_after"] == second["unused_after"]


def test_what_a_finetuning_callback_unfreezes_later_is_exchanged(seen: dict[str, Ranks]) -> None:
    for rank in seen["finetuning"]:
        assert "net.0.weight" in rank["exchanged"]
        assert rank["backbone_moved"]


def test_integers_are_rank_0s_and_statistics_are_merged(seen: dict[str, Ranks]) -> None:
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
        # Every fourth batch overflows: its step is none of the budget's.
        assert rank["batches"] > rank["steps"]


def test_players_are_trainable_again_after_their_steps(seen: dict[str, Ranks]) -> None:
    assert all(rank["trainable"] for rank in seen["adversarial"])
    assert any("discriminator" in name for name in seen["adversarial"][0]["exchanged"])


def test_lbfgs_counts_a_step_for_each_call_and_gets_better(seen: dict[str, Ranks]) -> None:
    for rank in seen["lbfgs"]:
        assert rank["calls"] > rank["steps"], "a step evaluates its closure several times"
        assert rank["after"] < rank["before"]


def test_gradients_are_clipped(seen: dict[str, Ranks]) -> None:
    assert all(0.49 < rank["norm"] < 0.51 for rank in seen["clipped_by_norm"])
    assert all(0.24 < rank["value"] < 0.26 for rank in seen["clipped_by_value"])


def test_a_compiled_module_keeps_its_names(seen: dict[str, Ranks]) -> None:
    assert seen["compiled"][0]["keys"] == ["net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]
    assert "net._orig_mod.0.weight" in seen["compiled_part"][0]["exchanged"]


def test_hooks_are_called_as_on_a_single_device(seen: dict[str, Ranks]) -> None:
    calls: list[str] = []
    module, callback = modules_job.recording(calls)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=modules_job.STEPS, limit_val_batches=0, callbacks=[callback],
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, modules_job.loader(), modules_job.loader(32))
    step = modules_job.hooks_of_a_step(calls)
    assert step.index("module.on_before_zero_grad") < step.index("module.backward")
    for rank in seen["hooks"]:
        assert rank["step"] == step
        assert rank["around"] == modules_job.hooks_around(calls)


def test_averages_are_of_the_global_model_and_end_on_all_ranks(seen: dict[str, Ranks]) -> None:
    first, second = seen["averaged"]
    # As long as nobody had handed in a round the average was what training started from, whatever rank 0 had learned.
    assert first["early"] == first["start"]
    assert first["average"] == first["at_end"] == second["at_end"]
    assert first["updates"] == modules_job.STEPS
    assert second["updates"] == 0, "the other ranks leave averaging to rank 0"


def test_averages_by_epochs_are_of_the_global_model_and_have_their_own_learning_rate(seen: dict[str, Ranks]) -> None:
    first, second = seen["averaged_by_epochs"]
    assert first["average"] == first["at_end"] == second["at_end"]
    assert first["averages"] == 4
    assert first["rates"] == second["rates"] == pytest.approx([0.03, 0.01, 0.01, 0.01])
    # BatchNorm's statistics are averaged like the weights, instead of being measured in one more epoch.
    assert first["statistics"] == first["averaged_statistics"] == second["statistics"]


def test_validation_in_mid_round_gives_the_local_weights_back(seen: dict[str, Ranks]) -> None:
    states = seen["validated_in_mid_round"][0]["states"]
    shown = [index for index, (kind, _) in enumerate(states) if kind == "shown"]
    hidden = [index for index in shown[:-1] if states[index][1] != states[index - 1][1]]
    assert hidden, "at the second of five steps the local weights are not the global model's"
    for index in hidden:
        before, after = states[index - 1], states[index + 1]
        assert (before[0], after[0]) == ("before", "after")
        assert before[1] == after[1]
    assert all(kind == "after" for kind, _ in seen["validated_in_mid_round"][1]["states"])


# ---------------------------------------------------------------------------- refused


def quiet(strategy: AsyncLocalSGDStrategy | str, **options: Any) -> L.Trainer:
    return L.Trainer(
        strategy=strategy, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0, **{"devices": 1, "max_steps": 12, **options},
    )  # fmt: skip


class Unfreezing(modules_job.Module):
    """Unfreezes a layer in the midst of training."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 5:
            self.net[0].requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})


def test_unfreezing_what_is_not_exchanged_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"'net.0.weight' was frozen.*ExchangeOptions\(frozen=True\)"):
        quiet(AsyncLocalSGDStrategy(local_steps=4)).fit(Unfreezing(), modules_job.loader())


def test_unfreezing_works_where_frozen_parameters_are_exchanged() -> None:
    module = Unfreezing()
    before = module.net[0].weight.detach().clone()
    strategy = AsyncLocalSGDStrategy(local_steps=4, exchange=ExchangeOptions(frozen=True))
    quiet(strategy).fit(module, modules_job.loader())
    assert not torch.equal(module.net[0].weight, before)


def test_a_model_on_the_meta_device_is_refused_by_name() -> None:
    module = modules_job.Module(nn.Linear(8, 1, device="meta"))
    with pytest.raises(ValueError, match=r"'net.weight' is on the meta device"):
        quiet(AsyncLocalSGDStrategy()).fit(module, modules_job.loader())


def test_averaging_by_epochs_that_are_each_ranks_own_is_refused_by_name() -> None:
    trainer = quiet(
        AsyncLocalSGDStrategy(start_method="spawn", start_timeout=60.0), devices=2, use_distributed_sampler=False,
        callbacks=[StochasticWeightAveraging(swa_lrs=0.01)], max_steps=-1, max_epochs=2,
    )  # fmt: skip
    with pytest.raises(Exception, match=r"StochasticWeightAveraging averages at the ends of epochs.*WeightAveraging"):
        trainer.fit(modules_job.Module(), modules_job.loader())


def test_a_single_worker_with_lbfgs_is_plain_training_bit_for_bit() -> None:
    """Where an exchange changes nothing the curvature that it has seen stays valid."""
    weights = []
    plain = partial(torch.optim.SGD, lr=1.0)
    for strategy in ("auto", AsyncLocalSGDStrategy(local_steps=3, outer_optimizer=plain)):
        torch.manual_seed(2)
        module = modules_job.Closures()
        quiet(strategy).fit(module, modules_job.loader(shuffle=False))
        weights.append(module.net.weight)
    assert torch.equal(*weights)
