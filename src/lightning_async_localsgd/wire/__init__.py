"""Between a worker and the server: messages, peers, bulk tensors, authentication. Algorithms are not known here."""

from lightning_async_localsgd.wire.auth import Endpoints
from lightning_async_localsgd.wire.client import WireExchange
from lightning_async_localsgd.wire.protocol import Outlet, ServerPort
from lightning_async_localsgd.wire.server import WireServer

__all__ = ["Endpoints", "Outlet", "ServerPort", "WireExchange", "WireServer"]
