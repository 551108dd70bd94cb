"""What an exchange costs: time against bare memory passes and plain sockets, memory, four at once, one that stalls.

Everything runs in processes of its own on this machine, one torch thread each, and every ratio compares things that
were measured in turn within the same run, so that a noisy machine slows both alike. Run it as::

    python benchmarks/exchange.py                       # 1 M, 10 M and 100 M parameters, a few minutes
    python benchmarks/exchange.py --sizes 1e6 --repeats 5

It prints a table, then one JSON line for each measurement and each ratio. The bars hold for 100 M parameters; its exit
code is 1 if one of them is missed. Needs Linux, for /proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.buffers import BufferLease, BufferPool
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Hello, Push, Reply
from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.server import Server
from lightning_async_localsgd.wire import Endpoints, Outlet, WireExchange, WireServer
from lightning_async_localsgd.wire.link import Link
from lightning_async_localsgd.worker import Worker

WORKERS = 4
SILENCE_SECONDS = 60.0
BARRED_SIZE = 100_000_000
PASSES = (
    "form g; copy it to the server's buffer; look for NaN and take its norm; Delayed Nesterov; copy the model to a "
    "snapshot; copy that to the worker; load it into the module"
)


class Model(nn.Module):
    """Eight equal tensors, as a layer of a transformer has a handful of large ones."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(torch.linspace(-1.0, 1.0, len(part))) for part in torch.empty(numel).chunk(8)
        )


# --------------------------------------------------------------------- processes


class Process:
    """A function in a process of its own, spoken to with (command, arguments) and answers."""

    def __init__(self, main: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, *command: Any) -> None:
        self._pipe.send(command)

    def answer(self) -> Any:
        if not self._pipe.poll(600):
            raise RuntimeError(f"process {self._process.pid} does not answer")
        return self._pipe.recv()

    def ask(self, *command: Any) -> Any:
        self.begin(*command)
        return self.answer()

    def close(self) -> None:
        with suppress(OSError):
            self.begin("end")
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


@contextmanager
def process(main: Callable[..., None], *args: Any) -> Iterator[Process]:
    running = Process(main, *args)
    try:
        yield running
    finally:
        running.close()


def obey(pipe: Connection, **commands: Callable[..., Any]) -> None:
    """Carries out what comes over ``pipe`` until it says "end"."""
    while (command := pipe.recv())[0] != "end":
        pipe.send(commands[command[0]](*command[1:]))


def resident_peak() -> int:
    """Most memory that this process has ever had resident, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def seconds_of(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def host(pipe: Connection, numel: int) -> None:
    """The real server, with Delayed Nesterov, for as many workers as take part."""
    torch.set_num_threads(1)
    before = resident_peak()
    layout = layout_of(numel)
    model = GlobalModel(layout, DelayedNesterov(), WORKERS)
    model.load(torch.zeros(1).expand(numel))
    coordinator = Coordinator(model, SpeedAwareSteps(1), GraceWindow(0.0), Budget(None), WORKERS, "benchmark")
    server = Server(coordinator, BufferPool(numel, most=WORKERS + 2))
    wire = WireServer(server, ipc=True, silence_timeout=SILENCE_SECONDS)

    def merge() -> float:
        """A bare outer step with the look at the push before it, where it always happens: in the owner thread."""
        gradient = torch.full((numel,), 1e-6)

        def timed(coordinator: Coordinator) -> float:
            def step() -> None:
                coordinator.model.inspect(gradient)
                coordinator.model.apply(gradient)

            return sum(seconds_of(step) for _ in range(WORKERS)) / WORKERS

        return server.ask(timed)

    obey(
        pipe,
        endpoints=lambda: wire.local_endpoints,
        memory=lambda: (resident_peak() - before, server.buffers.allocated),
        merge=merge,
    )
    server.close()
    wire.close()


def worker(pipe: Connection, number: int, numel: int) -> None:
    """A real worker; each of its rounds is one step that changes nothing."""
    torch.set_num_threads(1)
    module = Model(numel)
    layout = Layout.of(module)
    state: dict[str, Worker] = {}

    def join(endpoints: Endpoints) -> None:
        exchange = WireExchange(endpoints, layout, silence_timeout=SILENCE_SECONDS, connect_timeout=60.0)
        state["worker"] = Worker(number, Binding(layout, module), exchange)
        state["worker"].join()

    def exchange(at: float = 0.0) -> tuple[float, float]:
        """One exchange, begun at a moment of the clock that all processes share."""
        state["worker"].count_step()
        time.sleep(max(0.0, at - time.monotonic()))
        began = time.monotonic()
        state["worker"].end_round()
        return began, time.monotonic()

    def many(seconds: float) -> list[float]:
        until = time.monotonic() + seconds
        took = []
        while time.monotonic() < until:
            began, ended = exchange()
            took.append(ended - began)
        return took

    def stall(seconds: float) -> tuple[float, float]:
        """An exchange whose upload stops for a while when a third of it is sent."""
        send, sent = Link.send_bulk, 0

        def stalling(self: Link, header: bytes, part: memoryview) -> bool:
            nonlocal sent
            before, sent = sent, sent + len(part)
            if before < 4 * numel / 3 <= sent:
                time.sleep(seconds)
            done = send(self, header, part)
            if not done:
                sent = before
            return done

        Link.send_bulk = stalling  # type: ignore[method-assign]
        try:
            return exchange()
        finally:
            Link.send_bulk = send  # type: ignore[method-assign]

    obey(pipe, join=join, exchange=exchange, many=many, stall=stall)
    state["worker"].exchange.close()


def passes(pipe: Connection, numel: int) -> None:
    """The memory passes of one exchange, done in one process by the same code; nothing crosses anything."""
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

    # An average over a period of Delayed Nesterov, whose last push costs more than the others.
    obey(pipe, exchange=lambda: sum(exchange() for _ in range(WORKERS)) / WORKERS)


class Echo:
    """A server that sends every push straight back: what is left is the wire."""

    incarnation = "benchmark"
    wanted: dict[int, int] = {}  # noqa: RUF012

    def __init__(self, numel: int) -> None:
        self.layout = layout_of(numel)
        self.buffers = BufferPool(numel)

    def join(self, hello: Hello, outlet: Outlet) -> None:
        lease = self.buffers.try_acquire()
        assert lease is not None
        lease.tensor.zero_()
        self._answer(0, lease, outlet)

    def push(self, push: Push, lease: BufferLease | None, outlet: Outlet) -> None:
        assert lease is not None
        self._answer(push.sequence, lease, outlet)

    def lost(self, worker: int, session: str, reason: str) -> None:
        pass

    def _answer(self, sequence: int, lease: BufferLease, outlet: Outlet) -> None:
        outlet.dispatch(Reply(self.incarnation, sequence, 0, 0, 1, 0.0, 1.0, 0.0, False, None), lease)


def far_end(pipe: Connection, numel: int) -> None:
    """Receives and sends back, over each kind of wire and over a plain socket."""
    torch.set_num_threads(1)
    echo = Echo(numel)
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


def near_end(pipe: Connection, numel: int, addresses: dict[str, Any]) -> None:
    """Sends and receives back; times both together."""
    torch.set_num_threads(1)
    layout = layout_of(numel)
    gradient, model = torch.zeros(numel), torch.zeros(numel)
    connection = socket.create_connection(addresses["plain"])
    ends: dict[str, tuple[WireExchange, list[int]]] = {}
    for number, kind in enumerate(("ipc", "tcp", "curve"), start=1):
        exchange = WireExchange(addresses[kind], layout, silence_timeout=SILENCE_SECONDS, connect_timeout=60.0)
        exchange.join(Hello(PROTOCOL_VERSION, number, kind, layout.fingerprint), model)
        ends[kind] = (exchange, [number, 0])

    def plain() -> float:
        def there_and_back() -> None:
            connection.sendall(bytes_of(gradient))
            receive_all(connection, bytes_of(model))

        return seconds_of(there_and_back)

    def wire(kind: str) -> float:
        exchange, count = ends[kind]
        count[1] += 1
        push = Push(count[0], kind, count[1], "benchmark", 0, 1, 1, 0, 0.0, 0.0, False, False)
        return seconds_of(lambda: exchange.push(push, gradient, model))

    obey(pipe, plain=plain, wire=wire)
    connection.close()
    for exchange, _ in ends.values():
        exchange.close()


def layout_of(numel: int) -> Layout:
    """Of a :class:`Model`, without the memory that one takes."""
    with torch.device("meta"):
        sizes = [len(part) for part in torch.empty(numel).chunk(8)]
    return Layout.from_description(
        [[f"parts.{index}", [size], "torch.float32", "parameter"] for index, size in enumerate(sizes)]
    )


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")


def receive_all(connection: socket.socket, memory: memoryview) -> bool:
    """Fills ``memory``; False if the other side has hung up."""
    received = 0
    while received < len(memory):
        size = connection.recv_into(memory[received:])
        if size == 0:
            return False
        received += size
    return True


# ------------------------------------------------------------------ measurements


@dataclass(frozen=True)
class Measurement:
    """Seconds (or bytes) of one thing, repeated."""

    parameters: int
    name: str
    unit: str
    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Ratio:
    """One thing against another: the median over the repeats in which both were measured in turn."""

    parameters: int
    name: str
    ratio: float
    low: float
    high: float
    bar: float | None
    passed: bool | None


class Report:
    """Collects measurements and ratios of one model size."""

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.rows: list[Measurement | Ratio] = []

    def measured(self, name: str, values: list[float], unit: str = "s") -> None:
        low, median, high = quartiles(values)
        self.rows.append(Measurement(self.numel, name, unit, median, low, high, len(values)))

    def compared(self, name: str, ratios: list[float], bar: float | None = None) -> None:
        low, median, high = quartiles(ratios)
        passed = None if bar is None or self.numel != BARRED_SIZE else median <= bar
        self.rows.append(Ratio(self.numel, name, median, low, high, bar, passed))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def divided(numerators: list[float], denominators: list[float]) -> list[float]:
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def in_turn(repeats: int, *actions: Callable[[], float]) -> list[list[float]]:
    """Each action once per repeat, after one unmeasured repeat; one list per action."""
    for action in actions:
        action()
    columns: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for column, action in zip(columns, actions, strict=True):
            column.append(action())
    return columns


def measure_wire(report: Report, repeats: int) -> None:
    """There and back over each kind of wire, against a plain socket."""
    with process(far_end, report.numel) as far:
        addresses = far.answer()
        with process(near_end, report.numel, addresses) as near:
            plain, tcp, curve, ipc = in_turn(
                repeats,
                lambda: near.ask("plain"),
                lambda: near.ask("wire", "tcp"),
                lambda: near.ask("wire", "curve"),
                lambda: near.ask("wire", "ipc"),
            )
    report.measured("plain TCP socket, there and back", plain)
    report.measured("wire over tcp", tcp)
    report.measured("wire over tcp with CURVE", curve)
    report.measured("wire over ipc", ipc)
    report.compared("tcp / plain socket", divided(tcp, plain), bar=1.3)
    report.compared("tcp with CURVE / plain socket", divided(curve, plain), bar=4.0)
    report.compared("ipc / plain socket", divided(ipc, plain))


def measure_exchange(report: Report, repeats: int, stall_seconds: float) -> None:
    """Whole exchanges with the real server: alone, four at once, beside one that stalls; and its memory."""
    with ExitStack() as stack:
        server = stack.enter_context(process(host, report.numel))
        endpoints = server.ask("endpoints")
        workers = [stack.enter_context(process(worker, number, report.numel)) for number in range(WORKERS)]
        for peer in workers:
            peer.begin("join", endpoints)
        for peer in workers:
            peer.answer()

        def alone(peer: Process) -> float:
            began, ended = peer.ask("exchange")
            return float(ended - began)

        def together() -> float:
            at = time.monotonic() + 0.05
            for peer in workers:
                peer.begin("exchange", at)
            times = [peer.answer() for peer in workers]
            return float(max(ended for _, ended in times) - min(began for began, _ in times))

        def each_alone() -> float:
            return sum(alone(peer) for peer in workers)

        summed, at_once = in_turn(repeats, each_alone, together)
        peak, buffers = server.ask("memory")
        measure_stall(report, workers, max(2, repeats // 3), stall_seconds)
        bare = stack.enter_context(process(passes, report.numel))
        whole, memory_passes, steps = in_turn(
            repeats, lambda: alone(workers[0]), lambda: bare.ask("exchange"), lambda: server.ask("merge")
        )
    report.measured("whole exchange over ipc, alone", whole)
    report.measured("its memory passes in one process", memory_passes)
    report.measured("one outer step, with the look at the push", steps)
    report.compared("whole exchange / memory passes", divided(whole, memory_passes), bar=3.0)
    report.measured("four exchanges, one after the other", summed)
    report.measured("four exchanges at once", at_once)
    report.compared("four at once / four alone", divided(at_once, summed), bar=1.5)
    report.compared("four at once / four bare outer steps", divided(at_once, [WORKERS * step for step in steps]))
    report.measured("peak memory of the server, without its imports", [peak], "bytes")
    report.measured("whole-model buffers of the server", [buffers], "buffers")
    report.compared("peak memory of the server / model", [peak / (4 * report.numel)], bar=5.0)


def measure_stall(report: Report, workers: list[Process], repeats: int, stall_seconds: float) -> None:
    """Exchanges of one worker while another stalls in mid-upload, and while it does not."""
    victim, other = workers[0], workers[1]
    quiet: list[float] = []
    beside: list[float] = []
    ratios = []
    for _ in range(repeats):
        usual = other.ask("many", 0.8 * stall_seconds)
        victim.begin("stall", stall_seconds)
        time.sleep(0.1 * stall_seconds)
        stalled = other.ask("many", 0.8 * stall_seconds)
        victim.answer()
        quiet += usual
        beside += stalled
        ratios.append(statistics.median(stalled) / statistics.median(usual))
    report.measured("exchange, nobody stalls", quiet)
    report.measured("exchange beside a stalled upload", beside)
    report.compared("beside a stalled upload / nobody stalls", ratios, bar=1.2)


# ------------------------------------------------------------------------ output


def shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    return f"{value:.0f}" if unit == "buffers" else f"{value:.4f} {unit}"


def table(rows: list[Measurement | Ratio]) -> str:
    lines = [f"{'':46} {'median':>10} {'quartiles':>22} {'bar':>6}"]
    size = None
    for row in rows:
        if row.parameters != size:
            size = row.parameters
            lines += ["", f"{size / 1e6:g} M parameters, {4 * size / 1e6:g} MB"]
        if isinstance(row, Measurement):
            spread = f"{shown(row.low, row.unit)} .. {shown(row.high, row.unit)}"
            lines.append(f"  {row.name:46} {shown(row.median, row.unit):>10} {spread:>22}")
        else:
            bar = "" if row.bar is None else f"{row.bar:>5}x"
            verdict = "" if row.passed is None else "  passed" if row.passed else "  MISSED"
            spread = f"{row.low:.2f} .. {row.high:.2f}"
            lines.append(f"  = {row.name:44} {row.ratio:>9.2f}x {spread:>22} {bar}{verdict}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="parameters of the model")
    parser.add_argument("--repeats", type=int, default=9, help="measured repeats of everything")
    parser.add_argument("--stall-seconds", type=float, default=5.0, help="length of the stall in mid-upload")
    options = parser.parse_args()
    rows: list[Measurement | Ratio] = []
    for size in options.sizes:
        report = Report(int(size))
        measure_wire(report, options.repeats)
        measure_exchange(report, options.repeats, options.stall_seconds)
        rows += report.rows
        print(f"{size / 1e6:g} M parameters done", file=sys.stderr, flush=True)
    print(table(rows))
    print(f"\nMemory passes: {PASSES}.")
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with one thread a process, {options.repeats} repeats.\n")
    for row in rows:
        print(json.dumps({"kind": type(row).__name__.lower(), **asdict(row)}))
    return int(any(isinstance(row, Ratio) and row.passed is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
