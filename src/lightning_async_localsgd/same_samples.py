"""A look at whether ranks that share no leases train on the same samples without meaning to.

Iterable datasets, and data for which ``use_distributed_sampler=False`` was given, are the user's to split among ranks.
Forgetting it is not an error that anything else would show: training works, and every sample is used by every rank.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    from lightning_async_localsgd.rendezvous import Rendezvous

_NOTE = "first batch"
_LOOK_EVERY = 20
"""Batches of rank 0 between two looks at what the others have begun with."""


class SameSamples:
    """Compares the first batches of all ranks, and warns once on rank 0 if two of them are equal.

    Args:
        rendezvous: where ranks leave a digest of their first batch.

    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._batches = 0
        self._settled = False

    def see_batch(self, batch: Any) -> None:
        """A batch is about to be trained on."""
        if self._batches == 0:
            self._rendezvous.post(_NOTE, _digest(batch))
        elif self._batches % _LOOK_EVERY == 0:
            self.look()
        self._batches += 1

    def look(self) -> None:
        """On rank 0: compares what there is by now."""
        if self._settled or self._rendezvous.rank > 0:
            return
        seen: dict[str, int] = {}
        found = self._rendezvous.posted(_NOTE)
        self._settled = len(found) == self._rendezvous.world_size
        for rank, digest in found.items():
            if digest in seen:
                self._settled = True
                rank_zero_warn(
                    f"Ranks {seen[digest]} and {rank} began with the same samples. Iterable datasets, and data with "
                    "use_distributed_sampler=False, are not split among ranks: do it in the dataset, by "
                    "trainer.global_rank and trainer.world_size (datasets.distributed.split_dataset_by_node for "
                    "Hugging Face datasets), or every rank trains on the same data."
                )
                return
            seen[digest] = rank


def _digest(batch: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> Any:
        if isinstance(value, Tensor):
            digest.update(repr(value.shape).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(value.encode())
        return value

    apply_to_collection(batch, (Tensor, str), add)
    return digest.hexdigest()
