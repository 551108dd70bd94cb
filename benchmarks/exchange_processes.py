"""The processes that ``benchmarks/exchange.py`` measures: a server, workers, an echo server and its clients.

Each runs in a process of its own with one torch thread, and carries out commands that arrive over a pipe.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from typing import Any

import torch
from torch import Tensor, nn

from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.policies.budget import Budget
from lightning_async_localsgd.policies.grace import GraceWindow
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.protocol.buffers import BufferPool, PooledBuffer
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello, Push, Reply
from lightning_async_localsgd.runtime.worker import Worker
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.global_model import GlobalModel
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.wire import Endpoints, ReplyChannel, WireExchange, WireServer
from lightning_async_localsgd.wire.connection import Connection

WORKERS = 4
SILENCE_SECONDS = 60.0
MEMORY_PASSES = (
    "form the pseudo-gradient; copy it to the server's buffer; check it for NaN and compute its norm; "
    "Delayed Nesterov; copy the model to a snapshot; copy the snapshot to the worker; load it into the module"
)


class Model(nn.Module):
    """Eight tensors of equal size, similar to the few large tensors of a transformer layer."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(torch.linspace(-1.0, 1.0, len(part))) for part in torch.empty(numel).chunk(8)
        )


def layout_of(numel: int) -> Layout:
    """Return the layout of a :class:`Model` without allocating its memory."""
    with torch.device("meta"):
        sizes = [len(part) for part in torch.empty(numel).chunk(8)]
    return Layout.from_description(
        [[f"parts.{index}", [size], "torch.float32", "parameter"] for index, size in enumerate(sizes)]
    )


# ----------------------------------------------------------------- remote control


class RemoteProcess:
    """A function that runs in its own process and answers commands.

    Args:
        main: the function. It gets one end of a pipe, then ``args``.
        args: further arguments.

    """

    def __init__(self, main: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, remote_end = context.Pipe()
        self._process = context.Process(target=main, args=(remote_end, *args), daemon=True)
        self._process.start()
        remote_end.close()

    def send(self, *command: Any) -> None:
        """Send a command: its name and its arguments."""
        self._pipe.send(command)

    def receive(self) -> Any:
        """Return the answer to the oldest unanswered command."""
        if not self._pipe.poll(600):
            raise RuntimeError(f"Process {self._process.pid} has not answered for 600 s")
        return self._pipe.recv()

    def call(self, *command: Any) -> Any:
        """Send a command and return the answer."""
        self.send(*command)
        return self.receive()

    def close(self) -> None:
        with suppress(OSError):
            self.send("end")
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


@contextmanager
def remote_process(main: Callable[..., None], *args: Any) -> Iterator[RemoteProcess]:
    process = RemoteProcess(main, *args)
    try:
        yield process
    finally:
        process.close()


def serve_commands(pipe: Pipe, **commands: Callable[..., Any]) -> None:
    """Carry out the commands that arrive over ``pipe`` until the command "end" arrives."""
    while (command := pipe.recv())[0] != "end":
        pipe.send(commands[command[0]](*command[1:]))


def peak_resident_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def seconds_of(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


# --------------------------------------------------------- a server and its workers


def server_main(pipe: Pipe, numel: int, workers: int = WORKERS) -> None:
    """Run the real server with Delayed Nesterov for a number of workers."""
    torch.set_num_threads(1)
    before = peak_resident_memory()
    layout = layout_of(numel)
    model = GlobalModel(layout, DelayedNesterov(), workers)
    model.load(torch.zeros(1).expand(numel))
    coordinator = Coordinator(model, SpeedAwareSteps(1), GraceWindow(0.0), Budget(None), workers, "benchmark")
    buffers = BufferPool(numel, 1, workers + 2)
    server = Server(coordinator, buffers)
    wire = WireServer(server, ipc=True, tcp=True, silence_timeout=SILENCE_SECONDS)

    def merge() -> float:
        """Time an outer step and the check of the push before it, in the owner thread as in a real run."""
        gradient = torch.full((numel,), 1e-6)

        def time_steps(coordinator: Coordinator) -> float:
            def step() -> None:
                coordinator.model.inspect(gradient)
                coordinator.model.apply(gradient)

            return sum(seconds_of(step) for _ in range(WORKERS)) / WORKERS

        return server._ask(time_steps)

    serve_commands(
        pipe,
        endpoints=lambda transport="ipc": wire.local_endpoints if transport == "ipc" else wire.endpoints,
        memory=lambda: (peak_resident_memory() - before, buffers.allocated),
        merge=merge,
    )
    server.close()
    wire.close()


def worker_main(pipe: Pipe, number: int, numel: int) -> None:
    """Run a real worker. Each of its rounds is one step that changes nothing."""
    torch.set_num_threads(1)
    module = Model(numel)
    layout = Layout.of(module)
    state: dict[str, Worker] = {}

    def join(endpoints: Endpoints) -> None:
        exchange = WireExchange(endpoints, layout, silence_timeout=SILENCE_SECONDS, connect_timeout=60.0)
        state["worker"] = Worker(number, Binding(layout, module), exchange)
        state["worker"].join()

    def exchange(at: float = 0.0) -> tuple[float, float]:
        """Make one exchange, and return its begin and end on the clock that all processes share.

        Args:
            at: when to begin, on the same clock.

        """
        state["worker"].count_step()
        time.sleep(max(0.0, at - time.monotonic()))
        began = time.monotonic()
        state["worker"].end_round()
        return began, time.monotonic()

    def exchange_for(seconds: float) -> list[float]:
        """Exchange repeatedly for ``seconds``, and return the duration of each exchange."""
        deadline = time.monotonic() + seconds
        durations = []
        while time.monotonic() < deadline:
            began, ended = exchange()
            durations.append(ended - began)
        return durations

    def stall(seconds: float) -> tuple[float, float]:
        """Make one exchange whose upload pauses for ``seconds`` after a third of the data."""
        send, sent = Connection.send_bulk, 0

        def send_with_pause(self: Connection, header: bytes, part: memoryview) -> bool:
            nonlocal sent
            before, sent = sent, sent + len(part)
            if before < 4 * numel / 3 <= sent:
                time.sleep(seconds)
            done = send(self, header, part)
            if not done:
                sent = before
            return done

        Connection.send_bulk = send_with_pause  # type: ignore[method-assign]
        try:
            return exchange()
        finally:
            Connection.send_bulk = send  # type: ignore[method-assign]

    serve_commands(pipe, join=join, exchange=exchange, exchange_for=exchange_for, stall=stall)
    state["worker"].exchange.close()


def workers_main(pipe: Pipe, numbers: list[int], numel: int) -> None:
    """Run several real workers, each in a thread. Each of their rounds is one step that changes nothing."""
    torch.set_num_threads(1)
    layout = layout_of(numel)
    workers: list[Worker] = []

    def join(endpoints: Endpoints) -> None:
        def start(number: int) -> Worker:
            exchange = WireExchange(endpoints, layout, silence_timeout=SILENCE_SECONDS, connect_timeout=60.0)
            worker = Worker(number, Binding(layout, Model(numel)), exchange)
            worker.join()
            return worker

        # In threads, because the server dispatches nobody before all have joined.
        workers.extend(_in_threads(start, numbers))

    def push_for(seconds: float, pause: float) -> list[float]:
        """Let all workers push for ``seconds``, with a pause before each push, and return the seconds of each push."""
        deadline = time.monotonic() + seconds

        def push_until_deadline(worker: Worker) -> list[float]:
            durations = []
            while time.monotonic() < deadline:
                time.sleep(pause)
                worker.count_step()
                durations.append(seconds_of(worker.end_round))
            return durations

        return [duration for durations in _in_threads(push_until_deadline, workers) for duration in durations]

    serve_commands(pipe, join=join, push_for=push_for)
    for worker in workers:
        worker.exchange.close()


def _in_threads(function: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


def memory_passes_main(pipe: Pipe, numel: int) -> None:
    """Make the memory passes of one exchange in one process with the same code, without any transfer."""
    torch.set_num_threads(1)
    module = Model(numel)
    layout = Layout.of(module)
    binding = Binding(layout, module)
    model = GlobalModel(layout, DelayedNesterov(), WORKERS)
    base, gradient, buffer, snapshot = (torch.zeros(numel) for _ in range(4))
    binding.read(base)
    model.load(base)

    def exchange() -> float:
        began = time.perf_counter()
        binding.subtract_from(base, gradient)
        buffer.copy_(gradient)
        model.inspect(buffer)
        model.apply(buffer)
        model.copy_to(snapshot)
        base.copy_(snapshot)
        binding.load(base)
        return time.perf_counter() - began

    # Average over a period of Delayed Nesterov, because the last push of a period costs more than the others.
    serve_commands(pipe, exchange=lambda: sum(exchange() for _ in range(WORKERS)) / WORKERS)


# ------------------------------------------------------------------ the wire alone


class EchoServer:
    """A server that sends every push back, so that only the wire is measured."""

    incarnation = "benchmark"
    recalled: dict[int, int] = {}  # noqa: RUF012

    def __init__(self, numel: int) -> None:
        self.layout = layout_of(numel)
        # A worker joins while the last frames to the one before are still being confirmed.
        self.buffers = BufferPool(numel, max_active=3)

    def join(self, hello: Hello, channel: ReplyChannel) -> None:
        buffer = self.buffers.try_acquire()
        assert buffer is not None
        buffer.tensor.zero_()
        self._answer(0, buffer, channel)

    def push_buffers(self, push: Push) -> BufferPool:
        return self.buffers

    def push(self, push: Push, buffer: PooledBuffer | None, channel: ReplyChannel) -> None:
        assert buffer is not None
        self._answer(push.sequence, buffer, channel)

    def lost(self, worker: int, session: str, reason: str) -> None:
        pass

    def _answer(self, sequence: int, buffer: PooledBuffer, channel: ReplyChannel) -> None:
        channel.dispatch(Reply(self.incarnation, sequence, 0, 0, 1, 0.0, 1.0, 0.0, False, None), buffer)


def echo_main(pipe: Pipe, numel: int) -> None:
    """Receive and send back, over each kind of wire and over a plain socket."""
    torch.set_num_threads(1)
    echo = EchoServer(numel)
    wires = [
        WireServer(echo, ipc=True, tcp=True, silence_timeout=SILENCE_SECONDS),
        WireServer(echo, ipc=False, tcp=True, encrypt=True, silence_timeout=SILENCE_SECONDS),
    ]
    listener = socket.create_server(("127.0.0.1", 0))
    memory = bytes_of(torch.zeros(numel))
    pipe.send(
        {
            "ipc": wires[0].local_endpoints,
            "tcp": wires[0].endpoints,
            "curve": wires[1].endpoints,
            "plain": listener.getsockname(),
        }
    )
    connection, _ = listener.accept()
    while receive_all(connection, memory):
        connection.sendall(memory)
    for wire in wires:
        wire.close()


def client_main(pipe: Pipe, numel: int, addresses: dict[str, Any]) -> None:
    """Send to the echo server and receive the answer, and time both together."""
    torch.set_num_threads(1)
    layout = layout_of(numel)
    gradient, model = torch.zeros(numel), torch.zeros(numel)
    connection = socket.create_connection(addresses["plain"])
    exchanges: dict[str, tuple[WireExchange, list[int]]] = {}
    for number, kind in enumerate(("ipc", "tcp", "curve"), start=1):
        exchange = WireExchange(addresses[kind], layout, silence_timeout=SILENCE_SECONDS, connect_timeout=60.0)
        exchange.join(Hello(PROTOCOL_VERSION, number, kind, layout.fingerprint), model)
        exchanges[kind] = (exchange, [number, 0])

    def plain() -> float:
        def round_trip() -> None:
            connection.sendall(bytes_of(gradient))
            receive_all(connection, bytes_of(model))

        return seconds_of(round_trip)

    def wire(kind: str) -> float:
        exchange, count = exchanges[kind]
        count[1] += 1
        push = Push(count[0], kind, count[1], "benchmark", 0, 1, 1, 0, 0.0, 0.0, False, False)
        return seconds_of(lambda: exchange.push(push, gradient, model))

    serve_commands(pipe, plain=plain, wire=wire)
    connection.close()
    for exchange, _ in exchanges.values():
        exchange.close()


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")


def receive_all(connection: socket.socket, memory: memoryview) -> bool:
    """Fill ``memory``, and return False if the other side has closed the connection."""
    received = 0
    while received < len(memory):
        size = connection.recv_into(memory[received:])
        if size == 0:
            return False
        received += size
    return True
