"""Checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the checkpoint that ``trainer.save_checkpoint`` would write. The hooks for saving are called."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint
