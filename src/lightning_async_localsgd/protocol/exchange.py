"""The interface through which a worker reaches the server, in the same process or across a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.messages import Hello, Push, Reply, Share


class ExchangeError(RuntimeError):
    """The server is gone, or has refused this worker for good. The text says what to do."""


class TooFewWorkersError(ExchangeError):
    """The run ends because too few workers took part for too long. What was merged can be saved."""


class Exchange(ABC):
    """A worker's end of the exchange. Calls block until they are answered. One call runs at a time.

    :meth:`push` may run in another thread than the rest. While it runs, :attr:`recalled_version` may be read,
    :meth:`check` does less, and :meth:`close` makes it end with an error.

    Attributes:
        sends_packed: whether pushes that travel packed are sent as their packed bytes. Otherwise, their
            pseudo-gradients are read.
        bytes_sent: bytes that this worker has sent so far, headers and heartbeats included (0 within a process).
        bytes_received: bytes that this worker has received so far.

    """

    sends_packed: bool = False
    bytes_sent: int = 0
    bytes_received: int = 0

    @abstractmethod
    def join(self, hello: Hello, model: Tensor) -> Reply:
        """Introduce this worker to the server and wait for its first dispatch.

        Args:
            hello: who this worker is.
            model: flat fp32 tensor that receives the global model.

        Raises:
            ExchangeError: the server refused this worker, or cannot be reached.

        """

    @abstractmethod
    def push(self, push: Push, gradient: Tensor, model: Tensor, packed: Tensor | None = None) -> Reply:
        """Send a pseudo-gradient, or what else the header names, and wait for the next dispatch.

        A refused push raises no error: the reply has the reason in ``refused`` and comes with a fresh model. In the
        synchronous beginning, the reply comes with the mean of all workers' gradients instead.

        Args:
            push: the header.
            gradient: flat fp32 pseudo-gradient. It is not changed, and may be reused when this returns. Without
                :attr:`.Push.has_data`, it is not read.
            model: flat fp32 tensor that receives the global model, or the mean; must not share memory with
                ``gradient``. If models travel as differences, it holds what the call before has written.
            packed: the bytes that ``gradient`` is unpacked from, if it travels packed, see :class:`.Codec`. An exchange
                that sends them does not read ``gradient``, see :attr:`sends_packed`.

        Raises:
            ExchangeError: the server is gone, or a newer session has replaced this one.

        """

    @abstractmethod
    def share(self, share: Share, values: Tensor) -> Reply:
        """Send values of frozen parameters that have changed, and replace them by the run's values.

        Args:
            share: the header.
            values: flat fp32 values of the parameters that the header names.

        Raises:
            ExchangeError: see :meth:`push`.

        """

    @property
    @abstractmethod
    def recalled_version(self) -> int:
        """Version of the dispatch whose round the server wants at the next step, or -1 if it recalls no round.

        The server recalls rounds when training ends, and when it does not know the worker's speed yet. The value may be
        older than the last dispatch; it then names an earlier version, and must be ignored.
        """

    @abstractmethod
    def check(self) -> None:
        """Check the connection. Cheap, and called at every local step.

        Raises:
            ExchangeError: the server is gone, or has been silent for too long.

        """

    @abstractmethod
    def close(self, reason: str = "") -> None:
        """Say goodbye to the server and free everything. May be called twice, and after an error.

        Args:
            reason: why this worker leaves, for the server's log.

        """
