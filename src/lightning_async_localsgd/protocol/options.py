"""Options of the exchange between workers and the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_async_localsgd.protocol.checks import check_bool, check_seconds

Transport = Literal["auto", "ipc", "tcp"]

Upload = Literal["fp32", "bf16", "int8", "int4"]
"""How the parameters of pushes travel."""

Download = Literal["fp32", "bf16", "int8"]
"""How the parameters of models travel."""


MIN_TOKEN_LENGTH = 16
"""Fewest characters of a token that a user has chosen."""


@dataclass(frozen=True)
class ExchangeOptions:
    """How workers reach the server on rank 0.

    Args:
        transport: ``"ipc"`` (a Unix socket, one host only), ``"tcp"`` (one port for all workers), or ``"auto"``:
            ``ipc`` for workers on rank 0's host and ``tcp`` for all others.
        port: TCP port of rank 0. 0 takes a free port.
        encrypt: whether ``tcp`` traffic is encrypted and authenticated with CURVE. ``None`` encrypts if more than one
            host takes part.
        insecure: whether several hosts may exchange models without encryption. Anyone who can read that network's
            traffic can then read the model, and anyone who can change it can change the model.
        frozen: whether parameters with ``requires_grad=False`` are exchanged like trainable ones, which is needed if
            they are unfrozen during training. ``"auto"`` exchanges them if the trainer has a ``BaseFinetuning``
            callback, and averages those that the module moves itself, such as a teacher, like buffers.
        overlap: whether workers go on training while their pushes are in flight. When the new global model arrives,
            what a worker has learned meanwhile is moved onto it. The option of rank 0 counts.
        upload: how the parameters of pushes travel. ``"bf16"`` needs half of the bytes of ``"fp32"``, ``"int8"`` 25.4 %
            and ``"int4"`` 12.9 %. What rounding leaves over is added to the worker's next push. All ranks need the same
            value.
        download: how the parameters of global models travel. ``"bf16"`` rounds the model. ``"int8"`` sends the
            difference to the model that the worker holds, for which rank 0 keeps a copy of the model for each worker,
            at most 16 GiB in all. The final model is never rounded. All ranks need the same value.
        start_timeout: seconds that rank 0 waits for the other ranks at the start, and they for rank 0.
        silence_timeout: seconds without a sign of life after which a worker, or the server, counts as lost. If a peer
            recovers from a longer silence, its timeout grows to three times that silence.
        pause_timeout: seconds that training may be paused because fewer than ``min_workers`` take part. Then the run
            ends with an error, and rank 0 saves a checkpoint. The option of rank 0 counts.
        token: secret of the run, at least 16 characters. With a token, machines that know it may join while training
            runs. ``None`` takes the environment variable ``ASYNC_LOCALSGD_TOKEN``; without that variable, the ranks
            agree on a random token among themselves.

    Raises:
        ValueError: An option is outside its range, or ``encrypt=True`` is combined with ``"ipc"``.
        TypeError: ``token`` is not a string.

    Example::

        >>> from lightning_async_localsgd import ExchangeOptions
        >>> ExchangeOptions(transport="tcp", port=29600).port
        29600

    """

    transport: Transport = "auto"
    port: int = 0
    encrypt: bool | None = None
    frozen: bool | Literal["auto"] = "auto"
    insecure: bool = False
    overlap: bool = False
    upload: Upload = "fp32"
    download: Download = "fp32"
    start_timeout: float = 1800.0
    silence_timeout: float = 60.0
    pause_timeout: float = 1800.0
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.transport not in get_args(Transport):
            raise ValueError(f"exchange.transport={self.transport!r} is unknown; use one of {get_args(Transport)}")
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ValueError(f"exchange.port={self.port!r} is not a TCP port; use 1 to 65535, or 0 for a free port")
        if self.transport == "ipc" and self.encrypt:
            raise ValueError(
                "exchange.encrypt=True needs a network transport, but exchange.transport='ipc' never leaves the host; "
                "use transport='tcp', or leave encrypt out"
            )
        if self.encrypt is not None:
            check_bool("exchange.encrypt", self.encrypt)
        check_bool("exchange.insecure", self.insecure)
        check_bool("exchange.overlap", self.overlap)
        for name, value, allowed in (
            ("upload", self.upload, get_args(Upload)),
            ("download", self.download, get_args(Download)),
        ):
            if value not in allowed:
                raise ValueError(f"exchange.{name}={value!r} is unknown; use one of {allowed}")
        if not isinstance(self.frozen, bool) and self.frozen != "auto":
            raise ValueError(
                f"exchange.frozen={self.frozen!r} is unknown; use True (exchange frozen parameters), False (do not), "
                "or 'auto' (exchange them if a callback may unfreeze them)"
            )
        check_seconds("exchange.start_timeout", self.start_timeout)
        check_seconds("exchange.silence_timeout", self.silence_timeout)
        check_seconds("exchange.pause_timeout", self.pause_timeout)
        if self.token is not None:
            check_token(self.token, "exchange.token")

    @property
    def exact(self) -> bool:
        """Whether pushes and models travel without rounding."""
        return self.upload == self.download == "fp32"


def checked_options(exchange: object) -> ExchangeOptions:
    """Return a strategy's option ``exchange``, or the defaults for ``None``.

    Raises:
        TypeError: ``exchange`` is of another type.

    """
    if exchange is None:
        return ExchangeOptions()
    if not isinstance(exchange, ExchangeOptions):
        raise TypeError(f"exchange={exchange!r} must be an ExchangeOptions, or None for its defaults")
    return exchange


def check_token(token: object, source: str) -> str:
    """Return ``token`` if it may be used as a run's secret.

    Args:
        token: chosen by a user.
        source: the option or environment variable that holds the token.

    Raises:
        TypeError: the token is not a string.
        ValueError: the token is too short, or has white space around it. The text does not show the token.

    """
    advice = 'use the output of `python -c "import secrets; print(secrets.token_hex(32))"`'
    if not isinstance(token, str):
        raise TypeError(f"{source} must be a string, got {type(token).__name__}; {advice}")
    if len(token) < MIN_TOKEN_LENGTH:
        raise ValueError(
            f"{source} has {len(token)} characters. Passwords and keys are derived from it, so it needs at least "
            f"{MIN_TOKEN_LENGTH} characters that cannot be guessed; {advice}"
        )
    if token != token.strip() or not token.isprintable():
        raise ValueError(f"{source} has surrounding white space or unprintable characters; {advice}")
    return token
