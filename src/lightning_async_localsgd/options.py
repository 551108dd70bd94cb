"""Options of the strategy that are grouped into an object of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Transport = Literal["auto", "ipc", "tcp"]


@dataclass(frozen=True)
class ExchangeOptions:
    """How the workers reach the server in rank 0.

    Args:
        transport: ``"ipc"`` (a Unix socket, one host only), ``"tcp"`` (one port for all workers), or ``"auto"``: each
            worker on rank 0's host by ``ipc``, the others by ``tcp``.
        port: the TCP port that rank 0 listens on where ``tcp`` is used; 0 takes a free one.
        encrypt: whether ``tcp`` traffic is encrypted and authenticated with CURVE; ``None`` does so exactly where
            more than one host takes part.
        insecure: more than one host may take part though traffic between them cannot be encrypted, or is not to be.
            Whoever can listen on the network can then read the model, and whoever can change its traffic can change
            the model.
        frozen: whether parameters with ``requires_grad=False`` are exchanged like the others. They have to be where
            they may be unfrozen while training runs; ``"auto"`` does so exactly where the trainer has a
            ``BaseFinetuning`` callback.

    Example::

        >>> from lightning_async_localsgd import ExchangeOptions
        >>> ExchangeOptions(transport="tcp", port=29600).port
        29600

    Raises:
        ValueError: an unknown transport, a port outside 0..65535, ``encrypt=True`` together with ``"ipc"``, or another
            ``frozen`` or ``insecure`` than those.

    """

    transport: Transport = "auto"
    port: int = 0
    encrypt: bool | None = None
    frozen: bool | Literal["auto"] = "auto"
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.transport not in get_args(Transport):
            raise ValueError(f"exchange.transport={self.transport!r} is unknown; use one of {get_args(Transport)}")
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ValueError(f"exchange.port={self.port!r} is no TCP port; use 1 to 65535, or 0 to take a free one")
        if self.transport == "ipc" and self.encrypt:
            raise ValueError(
                "exchange.encrypt=True needs a network transport: exchange.transport='ipc' never leaves the host; "
                "use transport='tcp' or leave encrypt unset"
            )
        if type(self.insecure) is not bool:
            raise ValueError(f"exchange.insecure={self.insecure!r} is neither True nor False")
        if not isinstance(self.frozen, bool) and self.frozen != "auto":
            raise ValueError(
                f"exchange.frozen={self.frozen!r} is unknown; use True (frozen parameters are exchanged), False (they "
                "are not) or 'auto' (exactly where a callback may unfreeze them)"
            )
