"""The ZeroMQ connection between workers and the server: messages, bulk tensors, heartbeats, authentication."""

from lightning_async_localsgd.protocol.ports import ReplyChannel, ServerPort
from lightning_async_localsgd.wire.auth import Endpoints
from lightning_async_localsgd.wire.client import WireExchange
from lightning_async_localsgd.wire.server import WireServer

__all__ = ["Endpoints", "ReplyChannel", "ServerPort", "WireExchange", "WireServer"]
