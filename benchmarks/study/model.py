"""The language model of the study. It is small, so that two cores can train thousands of steps per minute.

A decoder-only transformer like that of ``examples/language_model``, but with learned positions instead of rotary
embeddings, and without metrics or logging in the training step.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

SIZES: dict[str, tuple[int, int, int]] = {
    "smoke": (1, 16, 2),
    "0.5m": (2, 112, 4),
    "1.5m": (3, 176, 4),
    "4m": (4, 272, 4),
}
"""Layers, width and heads.

With 2,048 tokens the last three sizes have 0.53, 1.48 and 4.1 million parameters.
"""

WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.1


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.output(y.transpose(1, 2).reshape(batch, time, width))
        return out


class Block(nn.Module):
    """One pre-norm layer: attention, then a GELU network of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.contract(F.gelu(self.expand(self.feed_forward_norm(x)), approximate="tanh"))
        return out


class Transformer(nn.Module):
    """A decoder-only transformer with learned positions and an output layer that shares the embedding."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Each layer adds two terms to the residual stream. This keeps its variance independent of the depth.
                residual = name.endswith(("attention.output.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[batch, time, vocabulary]`` of the token after each of ``tokens``."""
        x = self.embedding(tokens) + self.positions[: tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class LanguageModel(pl.LightningModule):
    """Trains a :class:`Transformer` to predict the next token with AdamW, after a linear warm-up.

    Args:
        size: one of :data:`SIZES`.
        vocabulary: number of tokens.
        length: tokens to predict in a sequence.
        lr: peak learning rate of AdamW.
        decay: whether the learning rate falls to a tenth along a cosine after the warm-up. Otherwise it is constant.

    Attributes:
        validation_loss: mean cross-entropy of the last validation.

    """

    def __init__(self, size: str, vocabulary: int, length: int, lr: float, decay: bool = True) -> None:
        super().__init__()
        self.lr = lr
        self.decay = decay
        self.transformer = Transformer(*SIZES[size], vocabulary, length)
        self.validation_loss = math.nan
        self._losses: list[tuple[float, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._losses.append((float(self.loss(batch)), len(batch)))

    def on_validation_epoch_end(self) -> None:
        self.validation_loss = sum(loss * n for loss, n in self._losses) / sum(n for _, n in self._losses)
        self._losses.clear()

    def loss(self, batch: Tensor) -> Tensor:
        """Compute the mean cross-entropy of windows ``[batch, length + 1]``."""
        return F.cross_entropy(self.transformer(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        decayed = [parameter for parameter in self.parameters() if parameter.dim() >= 2]
        plain = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.99), fused=True)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(WARMUP_SHARE * total))

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if not self.decay:
                return 1.0
            progress = min(1.0, (step - warmup) / max(1, total - warmup))
            return FINAL_LR_SHARE + (1.0 - FINAL_LR_SHARE) * 0.5 * (1.0 + math.cos(math.pi * progress))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"}}
