"""A decoder-only transformer language model and its LightningModule.

The file does not depend on the strategy. The same module trains on one device, under DDP and under asynchronous local
SGD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

SizeName = Literal["tiny", "20m", "60m", "150m"]


@dataclass(frozen=True)
class Shape:
    """The shape of a transformer.

    ``heads * head_size`` may differ from ``width``. The paper's 60M and 150M models have 16 heads of size 64 and a
    width of 896.

    Args:
        layers: number of layers.
        width: size of the embeddings and of the residual stream.
        heads: number of attention heads.
        head_size: size of each query, key and value.
        tie_embeddings: whether the output layer shares the weights of the embedding.

    """

    layers: int
    width: int
    heads: int
    head_size: int = 64
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_size % 2:
            raise ValueError(
                f"head_size={self.head_size} must be even, because rotary embeddings rotate pairs of values"
            )


# The three larger sizes are those of Liu et al., arXiv 2401.09135. The paper specifies layers, width, heads and a
# key/value size of 64, but not whether the output layer shares the embedding. With a vocabulary of 32,000 the sizes
# match the names only if the smallest model has its own output layer and the others share it.
SIZES: dict[SizeName, Shape] = {
    "tiny": Shape(layers=4, width=128, heads=2),
    "20m": Shape(layers=6, width=256, heads=4, tie_embeddings=False),
    "60m": Shape(layers=3, width=896, heads=16),
    "150m": Shape(layers=12, width=896, heads=16),
}


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864) for queries and keys."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, head_size: int, sequence_length: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        angles = torch.outer(torch.arange(sequence_length, dtype=torch.float32), frequencies)
        # Both tables can be computed from the shape, so they are neither saved nor exchanged between workers.
        self.register_buffer("cosine", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sine", torch.cat((-angles.sin(), angles.sin()), dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x`` of shape ``[..., time, head_size]``."""
        time, half = x.size(-2), x.size(-1) // 2
        cosine, sine = self.cosine[:time].to(x.dtype), self.sine[:time].to(x.dtype)
        return x * cosine + x.roll(half, dims=-1) * sine


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.heads * shape.head_size
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * inner, bias=False)
        self.output = nn.Linear(inner, shape.width, bias=False)

    def forward(self, x: Tensor, rotary: RotaryEmbedding) -> Tensor:
        """Map ``[batch, time, width]`` to the same shape."""
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        out: Tensor = self.output(y.transpose(1, 2).reshape(batch, time, -1))
        return out


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then a GELU network of four times the width."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width, bias=False)
        self.attention = Attention(shape)
        self.feed_forward_norm = nn.LayerNorm(shape.width, bias=False)
        self.expand = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.contract = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, rotary: RotaryEmbedding) -> Tensor:
        """Map ``[batch, time, width]`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotary)
        out: Tensor = x + self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))
        return out


class Transformer(nn.Module):
    """A decoder-only transformer.

    Args:
        shape: layers, width and heads.
        vocabulary_size: number of tokens.
        sequence_length: maximum number of tokens in a sequence.

    """

    def __init__(self, shape: Shape, vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        if vocabulary_size < 2:
            raise ValueError(f"vocabulary_size={vocabulary_size} must be at least 2")
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        self.sequence_length = sequence_length
        self.embedding = nn.Embedding(vocabulary_size, shape.width)
        self.rotary = RotaryEmbedding(shape.head_size, sequence_length)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, vocabulary_size, bias=False)
        self._initialize(shape.layers)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            # Each layer adds two terms to the residual stream. This keeps its variance independent of the depth.
            residual = name.endswith(("attention.output.weight", "contract.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[batch, time, vocabulary]`` of the token after each of ``tokens``."""
        if tokens.size(1) > self.sequence_length:
            raise ValueError(
                f"A sequence of {tokens.size(1)} tokens is longer than the model's sequence_length="
                f"{self.sequence_length}: increase sequence_length or shorten the sequence"
            )
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        logits: Tensor = self.head(self.norm(x))
        return logits


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, floor: float) -> float:
    """Return the learning rate at ``step`` as a share of the peak (equation 3 of arXiv 2401.09135).

    The rate rises linearly during the warm-up, falls along a cosine to ``floor`` at ``total_steps``, and then stays
    constant.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class LanguageModel(pl.LightningModule):
    """Trains a :class:`Transformer` to predict the next token.

    Args:
        size: ``tiny`` (about 1 million parameters), or ``20m``, ``60m`` or ``150m`` of the paper.
        vocabulary_size: number of tokens. The command line uses the value of the data.
        sequence_length: tokens to predict in a sequence. The command line uses the value of the data.
        tie_embeddings: whether the output layer shares the weights of the embedding. The default depends on the size.
        lr: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW, for matrices and embeddings only.
        betas: decay rates of AdamW's averages.
        warmup_share: share of all steps in which the learning rate rises linearly.
        final_lr_share: final learning rate as a share of ``lr``. Must be above 0. Otherwise a worker that still trains
            after the end of the schedule would not change the model.

    Batches are integer tensors ``[batch, sequence_length + 1]``. Each token is the target of the previous position.
    """

    def __init__(
        self,
        size: SizeName = "tiny",
        vocabulary_size: int = 2048,
        sequence_length: int = 256,
        tie_embeddings: bool | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_share: float = 0.05,
        final_lr_share: float = 0.1,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size={size!r} is unknown; choose one of {', '.join(SIZES)}")
        if lr <= 0:
            raise ValueError(f"lr={lr} must be positive")
        if not 0 <= warmup_share < 1:
            raise ValueError(f"warmup_share={warmup_share} must be in [0, 1)")
        if not 0 < final_lr_share <= 1:
            raise ValueError(f"final_lr_share={final_lr_share} must be in (0, 1]")
        self.save_hyperparameters()
        shape = SIZES[size]
        if tie_embeddings is not None:
            shape = replace(shape, tie_embeddings=tie_embeddings)
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_share = warmup_share
        self.final_lr_share = final_lr_share
        self.transformer = Transformer(shape, vocabulary_size, sequence_length)
        self.validation_loss = MeanMetric()
        self.validation_perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token after each of ``tokens``."""
        logits: Tensor = self.transformer(tokens)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of one batch."""
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add one batch to the validation loss and perplexity.

        Both are metric objects, so that their means are over all tokens and, if ranks share the validation, all ranks.
        """
        logits, targets = self(batch[:, :-1]), batch[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.validation_loss.update(loss, weight=targets.numel())
        self.validation_perplexity.update(logits.float(), targets)
        self.log("val/loss", self.validation_loss, prog_bar=True)
        self.log("val/perplexity", self.validation_perplexity)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Create AdamW with warm-up and cosine decay over the whole run."""
        total_steps = self.trainer.estimated_stepping_batches
        # If the run has no end, the value is infinite, or max_steps=-1 if the data has no length.
        if not math.isfinite(total_steps) or total_steps < 1:
            raise ValueError(
                "The learning-rate schedule needs the length of the run, but the data has no end: set trainer.max_steps"
            )
        warmup_steps = int(self.warmup_share * total_steps)
        decayed = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

        def lr_share(step: int) -> float:
            return warmup_cosine(
                step, warmup_steps=warmup_steps, total_steps=int(total_steps), floor=self.final_lr_share
            )

        scheduler = LambdaLR(optimizer, lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
