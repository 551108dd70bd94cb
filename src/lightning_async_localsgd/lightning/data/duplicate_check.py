"""A check that ranks without leased data do not train on the same samples by mistake.

The user splits iterable datasets, and data with ``use_distributed_sampler=False``, among ranks. If the user forgets the
split, training works and nothing else shows that every rank uses every sample.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    from lightning_async_localsgd.launch.rendezvous import Rendezvous

_TOPIC = "first batch"
_BATCHES_BETWEEN = 20
"""Batches of rank 0 between two comparisons."""


class DuplicateCheck:
    """Compare the first batches of all ranks, and warn once on rank 0 if two of them are equal.

    Args:
        rendezvous: where ranks post a digest of their first batch.

    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._batches = 0
        self._done = False

    def add_batch(self, batch: Any) -> None:
        """Post the first batch, and compare ranks every few batches."""
        if self._batches == 0:
            self._rendezvous.post(_TOPIC, _digest(batch))
        elif self._batches % _BATCHES_BETWEEN == 0:
            self.compare()
        self._batches += 1

    def compare(self) -> None:
        """Compare the batches that ranks have posted so far, on rank 0."""
        if self._done or self._rendezvous.rank > 0:
            return
        seen: dict[str, int] = {}
        posted = self._rendezvous.posted(_TOPIC)
        self._done = len(posted) == self._rendezvous.world_size
        for rank, digest in posted.items():
            if digest in seen:
                self._done = True
                rank_zero_warn(
                    f"Ranks {seen[digest]} and {rank} began with the same samples. Iterable datasets, and data with "
                    "use_distributed_sampler=False, are not split among ranks. If the dataset splits itself, make it "
                    "in train_dataloader(), where it can learn its rank. Otherwise split it by the environment "
                    "variables RANK and WORLD_SIZE (Hugging Face datasets with "
                    "datasets.distributed.split_dataset_by_node), or every rank trains on the same data."
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
