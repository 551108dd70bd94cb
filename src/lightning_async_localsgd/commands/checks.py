"""The checks of ``doctor``, each of which says what it has found and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from lightning_async_localsgd.commands.errors import CommandError
from lightning_async_localsgd.commands.sources import ServerSource, server_token
from lightning_async_localsgd.launch.run_name import RUN_ENV
from lightning_async_localsgd.server.journal import package_version

DISTRIBUTION = "lightning-async-localsgd"
ROOTS = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}
"""Lightning's two packages, and the distributions that have them."""

_FEW_FILES = 1024
"""Open files that a process should be allowed. A worker needs two sockets, and loaders need several each."""

_LITTLE_SHARED_MEMORY = 256 << 20
"""Bytes that should be free in /dev/shm: loaders hand their batches over there."""

_CLOCK_SECONDS = 5.0
"""Difference of two clocks from which times in logs of several machines confuse."""

_IMPORT_SECONDS = 180.0

_LIBRARIES = """
import json, importlib
import torch
found = {"cuda": torch.version.cuda, "devices": []}
for number in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(number)
    found["devices"].append([torch.cuda.get_device_name(number), free, total])
found["registered"] = {}
for root in ROOTS:
    registry = importlib.import_module(root + ".strategies").StrategyRegistry
    found["registered"][root] = "async_localsgd" in registry.available_strategies()
print("found:" + json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Args:
        check: name of the check.
        status: ``"ok"``; ``"warning"``, if a run may work nevertheless; or ``"problem"``.
        text: what was found.
        remedy: what to do about it; "" if there is nothing to do.

    """

    check: str
    status: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""


def check_versions() -> Iterator[Finding]:
    """Check Python, and the packages that this one needs."""
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {DISTRIBUTION} {package_version()}")
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "versions", "problem", f"{DISTRIBUTION} is not installed, only on the path",
            "install it: pip install -c constraints.txt -e . in the checkout",
        )  # fmt: skip
        return
    from packaging.requirements import Requirement

    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", "problem", f"{requirement.name} is missing", f"pip install '{requirement}'")
            continue
        good = requirement.specifier.contains(found, prereleases=True)
        yield Finding(
            "versions", "ok" if good else "problem", f"{requirement.name} {found}",
            "" if good else f"pip install '{requirement.name}{requirement.specifier}'",
        )  # fmt: skip


def check_libraries() -> Iterator[Finding]:
    """Check in a process of its own that Lightning knows the strategy by name, and which GPUs there are."""
    roots = [root for root, name in ROOTS.items() if _is_installed(name)]
    program = f"ROOTS = {roots!r}\n{_LIBRARIES}"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        yield Finding(
            "registration", "problem", f"importing torch and Lightning takes longer than {_IMPORT_SECONDS:g} s",
            "see whether the disk or the network file system with the environment is slow",
        )  # fmt: skip
        return
    answer = re.search(r"^found:(.*)$", done.stdout, re.MULTILINE)
    if answer is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "registration", "problem", f"torch and Lightning cannot be imported: {last}",
            "mend the environment until `python -c 'import torch, lightning'` works",
        )  # fmt: skip
        return
    found = json.loads(answer[1])
    for root, registered in found["registered"].items():
        yield Finding(
            "registration", "ok" if registered else "problem",
            f'{root} {"knows" if registered else "does not know"} strategy="async_localsgd"',
            "" if registered else "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or import lightning_async_localsgd first",
        )  # fmt: skip
    yield from _gpu_findings(found)


def check_encryption() -> Iterator[Finding]:
    """Check whether traffic between hosts can be encrypted."""
    import zmq

    if zmq.has("curve"):
        yield Finding("encryption", "ok", f"libzmq {zmq.zmq_version()} can encrypt")
    else:
        yield Finding(
            "encryption", "problem", f"libzmq {zmq.zmq_version()} was built without CURVE",
            "install pyzmq from a wheel: pip install --force-reinstall --only-binary :all: pyzmq",
        )  # fmt: skip


def check_limits() -> Iterator[Finding]:
    """Check how many files a process may open, and how much shared memory there is."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _FEW_FILES
    yield Finding(
        "open files", "warning" if few else "ok", f"a process may open {soft} files",
        f"ulimit -n {min(4096, hard) if hard > 0 else 4096}" if few else "",
    )  # fmt: skip
    memory = Path("/dev/shm")
    if not memory.is_dir():
        return
    free = shutil.disk_usage(memory).free
    little = free < _LITTLE_SHARED_MEMORY
    yield Finding(
        "shared memory", "warning" if little else "ok", f"{free / 1e6:.0f} MB are free in {memory}",
        "give the container more (docker run --shm-size=1g), or use DataLoader(num_workers=0)" if little else "",
    )  # fmt: skip


def check_processes() -> Iterator[Finding]:
    """Look for ranks whose launcher is gone."""
    proc = Path("/proc")
    if not (proc / "self" / "environ").exists():
        yield Finding("processes", "ok", "not checked: this system does not show the environment of processes")
        return
    left, running, first = [], 0, _program(1)
    for folder in proc.glob("[0-9]*"):
        try:
            variables = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
            )
            parent = int(re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)[1])  # type: ignore[index]
        except (OSError, UnicodeDecodeError, TypeError):  # Of another user, or it has ended.
            continue
        if RUN_ENV not in variables or int(folder.name) == os.getpid():
            continue
        running += 1
        # In a container, the launcher itself may be process 1.
        orphan = parent == 1 and _program(int(folder.name)) != first
        if orphan and variables.get("LOCAL_RANK", "0") != "0":
            left.append((int(folder.name), variables[RUN_ENV]))
    for process, run in sorted(left):
        yield Finding(
            "processes", "warning", f"process {process} is a rank of run {run}, and its launcher has ended",
            f"if it does not end by itself within a minute: kill {process}",
        )  # fmt: skip
    if not left:
        yield Finding("processes", "ok", f"no leftover rank; {running} processes of runs have a launcher")


def check_server(address: str, encrypted: bool, timeout: float) -> Iterator[Finding]:
    """Check whether a server can be reached, knows the token, and has the version and the time of this machine."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        begin = time.monotonic()
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except (OSError, UnicodeError) as error:  # A name with an empty part is no Unicode.
        yield Finding(
            "reachability", "problem", f"no connection to {host}:{port}: {error}",
            "check the name, that rank 0 is running with that port (exchange.port), and that no firewall blocks it",
        )  # fmt: skip
        return
    seconds = time.monotonic() - begin
    yield Finding("reachability", "ok", f"{host}:{port} accepts connections, after {1000 * seconds:.1f} ms")
    source = None
    try:
        source = ServerSource(address, server_token(), encrypted, timeout)
        asked = time.time()
        state = source.state()
        now = (asked + time.time()) / 2
    except CommandError as error:
        yield Finding(
            "token", "problem", str(error),
            "start both sides with the same ASYNC_LOCALSGD_TOKEN, exchange.encrypt and version of this package",
        )  # fmt: skip
        return
    finally:
        if source is not None:
            source.close()
    how = "encrypted" if encrypted else "not encrypted"
    yield Finding("token", "ok", f"the server of run {state['run_name'] or '-'} knows the token; traffic is {how}")
    same = state["package"] == package_version()
    yield Finding(
        "versions", "ok" if same else "warning", f"the server has {DISTRIBUTION} {state['package']}",
        "" if same else "install the same version on every machine",
    )  # fmt: skip
    apart = state["time"] - now
    wrong = abs(apart) > _CLOCK_SECONDS
    yield Finding(
        "clocks", "warning" if wrong else "ok", f"the server's clock differs by {apart:+.1f} s",
        "synchronize the clocks (NTP); training does not depend on them, but the times in logs do" if wrong else "",
    )  # fmt: skip


def _gpu_findings(found: dict[str, object]) -> Iterator[Finding]:
    devices = found["devices"]
    assert isinstance(devices, list)
    for number, (name, free, total) in enumerate(devices):
        busy = free < 0.5 * total
        yield Finding(
            "GPUs", "warning" if busy else "ok", f"{name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free",
            f"see who uses it: nvidia-smi -i {number}" if busy else "",
        )  # fmt: skip
    if devices:
        return
    if shutil.which("nvidia-smi") is not None and found["cuda"] is None:
        yield Finding(
            "GPUs", "problem", "there is an NVIDIA driver, and torch was built without CUDA",
            "install torch with CUDA, see https://pytorch.org/get-started",
        )  # fmt: skip
    else:
        yield Finding("GPUs", "ok", "torch sees no CUDA device; the workers train on the CPU or on another accelerator")


def _program(process: int) -> str | None:
    try:
        return os.readlink(f"/proc/{process}/exe")
    except OSError:
        return None


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
