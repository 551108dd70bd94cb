"""What a worker computes with: its device, its precision and its software. Workers of one run may differ in it."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from lightning_async_localsgd.protocol.messages import Hello

TRAITS = ("device", "precision", "software", "system")
"""Names of the traits that a table of workers shows, in the order of its columns."""

_MAX_LETTERS = 40
"""Longest value that is kept of what a worker says, because tables show it."""


@dataclass(frozen=True)
class WorkerTraits:
    """What a worker computes with, as it says in its hello. An empty text means that it is not known.

    Args:
        device: name of the device, such as ``"NVIDIA H200"``, or ``"cpu"``.
        precision: precision of training, as in ``Trainer(precision=...)``.
        software: version of torch, such as ``"torch 2.9.0"``.
        system: operating system and machine, such as ``"Linux x86_64"``.
        shuffle: hash of the order in which this version of torch shuffles, see :func:`shuffle_digest`.

    Example::

        >>> WorkerTraits("cpu", "bf16-mixed").precision
        'bf16-mixed'

    """

    device: str = ""
    precision: str = ""
    software: str = ""
    system: str = ""
    shuffle: str = ""

    @classmethod
    def of_this_process(cls, device: torch.device, precision: str) -> WorkerTraits:
        """Return the traits of a worker in this process.

        Args:
            device: the device of the module.
            precision: precision of training.

        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        system = f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
        return cls(name, precision, f"torch {torch.__version__}", f"{system} {platform.machine()}", shuffle_digest())

    @classmethod
    def of(cls, hello: Hello) -> WorkerTraits:
        """Return what a worker says about itself. What cannot be shown in a table is left out."""
        return cls(*(_printable(getattr(hello, name)) for name in (*TRAITS, "shuffle")))

    def as_dict(self) -> dict[str, str]:
        """Return the values of :data:`TRAITS` by name."""
        return {name: getattr(self, name) for name in TRAITS}


@cache
def shuffle_digest() -> str:
    """Return a hash of the order in which torch shuffles with a given seed.

    Each worker computes the order of the training data. With unequal orders, samples would be used twice or never.
    """
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0), device="cpu")
    return hashlib.sha256(order.numpy().tobytes()).hexdigest()[:16]


def differing_traits(traits: Collection[WorkerTraits]) -> list[str]:
    """Return the names of the traits in which workers differ, as far as these are known."""
    return [name for name in TRAITS if len({getattr(worker, name) for worker in traits} - {""}) > 1]


def _printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())[:_MAX_LETTERS]
