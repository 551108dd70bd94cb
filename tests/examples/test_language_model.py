"""The transformer, the sizes, the schedule and the LightningModule of the example."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from model import SIZES, LanguageModel, RotaryEmbedding, Shape, SizeName, Transformer, warmup_cosine
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

SMALL = Shape(layers=2, width=32, heads=2, head_size=16)


def _trainer(tmp_path: Path, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **arguments,
    )


@pytest.mark.parametrize(
    ("size", "vocabulary_size", "layers", "width", "heads", "parameters"),
    [
        ("tiny", 2048, 4, 128, 2, 1_049_728),
        ("20m", 32_000, 6, 256, 4, 21_105_920),
        ("60m", 32_000, 3, 896, 16, 58_955_904),
        ("150m", 32_000, 12, 896, 16, 149_804_928),
    ],
)
def test_sizes(size: SizeName, vocabulary_size: int, layers: int, width: int, heads: int, parameters: int) -> None:
    with torch.device("meta"):
        transformer = Transformer(SIZES[size], vocabulary_size, 256)
    assert (len(transformer.blocks), transformer.embedding.embedding_dim) == (layers, width)
    assert transformer.blocks[0].attention.qkv.weight.shape == (3 * heads * 64, width)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters
    assert all(parameter.is_contiguous() for parameter in transformer.parameters())


def test_attention_is_causal() -> None:
    torch.manual_seed(0)
    transformer = Transformer(SMALL, 50, 12)
    tokens = torch.randint(50, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = transformer(tokens), transformer(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_shorter_sequence_gives_the_same_logits_and_longer_sequence_is_rejected() -> None:
    transformer = Transformer(SMALL, 50, 12)
    tokens = torch.randint(50, (1, 12))
    torch.testing.assert_close(transformer(tokens[:, :5]), transformer(tokens)[:, :5])
    with pytest.raises(ValueError, match="13 tokens is longer than the model's sequence_length=12"):
        transformer(torch.zeros(1, 13, dtype=torch.long))


def test_rotary_scores_depend_only_on_the_distance() -> None:
    rotary = RotaryEmbedding(16, 32)
    q, k = torch.randn(16), torch.randn(16)
    scores = rotary(q.expand(32, 16)) @ rotary(k.expand(32, 16)).T
    torch.testing.assert_close(scores.diagonal(3), scores.diagonal(3)[:1].expand(29))
    torch.testing.assert_close(rotary(q.expand(32, 16)).norm(dim=1), q.norm().expand(32))


def test_tie_embeddings() -> None:
    tied, untied = LanguageModel(vocabulary_size=300), LanguageModel(vocabulary_size=300, tie_embeddings=False)
    assert tied.transformer.head.weight is tied.transformer.embedding.weight
    assert untied.transformer.head.weight is not untied.transformer.embedding.weight
    assert "transformer.rotary.cosine" not in tied.state_dict()


def test_initial_loss_is_that_of_uniform_predictions() -> None:
    torch.manual_seed(0)
    model = LanguageModel(vocabulary_size=500, sequence_length=32)
    batch = torch.randint(500, (4, 33))
    loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert abs(loss.item() - math.log(500)) < 0.1


def test_schedule() -> None:
    shares = [warmup_cosine(step, warmup_steps=10, total_steps=110, floor=0.1) for step in range(200)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1.0
    assert shares[60] == pytest.approx(0.55)
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares[10:]))
    assert shares[110:] == pytest.approx([0.1] * 90)
    assert warmup_cosine(0, warmup_steps=0, total_steps=10, floor=0.1) == 1.0


def test_model_learns_and_perplexity_matches_loss(tmp_path: Path) -> None:
    pl.seed_everything(0)
    batch = torch.randint(300, (8, 17))
    data = DataLoader(TensorDataset(batch), batch_size=8, collate_fn=lambda rows: torch.stack([row[0] for row in rows]))
    model = LanguageModel(vocabulary_size=300, sequence_length=16, lr=3e-3)
    trainer = _trainer(tmp_path, max_steps=80)
    trainer.fit(model, data)
    [result] = trainer.validate(model, data, verbose=False)
    assert result["val/loss"] < 0.5
    assert result["val/perplexity"] == pytest.approx(math.exp(result["val/loss"]), rel=1e-4)
    [group, _] = trainer.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(3e-4, rel=0.05)


def test_each_parameter_is_optimized_once_and_norms_do_not_decay(tmp_path: Path) -> None:
    data = DataLoader(torch.zeros(4, 17, dtype=torch.long), batch_size=2)
    model = LanguageModel(vocabulary_size=300, sequence_length=16)
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(model, data)
    decayed, plain = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() == 1 for parameter in plain["params"])
    chosen = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(chosen) == sorted(id(parameter) for parameter in model.parameters())


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(17, dtype=torch.long)


def test_endless_data_needs_max_steps(tmp_path: Path) -> None:
    model = LanguageModel(vocabulary_size=300, sequence_length=16)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        _trainer(tmp_path, max_epochs=1).fit(model, DataLoader(Endless(), batch_size=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "size='huge' is unknown; choose one of tiny, 20m, 60m, 150m"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"warmup_share": 1.0}, "warmup_share=1.0"),
        ({"final_lr_share": 0.0}, "final_lr_share=0.0"),
        ({"vocabulary_size": 1}, "vocabulary_size=1"),
        ({"sequence_length": 0}, "sequence_length=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(**arguments)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="layers=0"):
        Shape(layers=0, width=8, heads=1)
    with pytest.raises(ValueError, match="head_size=7"):
        Shape(layers=1, width=8, heads=1, head_size=7)
