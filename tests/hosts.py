"""Two hosts on one machine: network namespaces with a cable between them, which can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Hosts:
    """Both hosts.

    Attributes:
        enter: for each, what is put in front of a command to run it there.
        address: of the first.
        device: the cable's end at each.

    """

    enter: tuple[list[str], list[str]]
    address: str = "10.99.0.1"
    device: str = "eth0"

    def cut(self) -> None:
        """Pull the cable: all packets on their way are lost, without any notice."""
        self._set("down")

    def restore(self) -> None:
        """Plugs it in again."""
        self._set("up")

    def _set(self, state: str) -> None:
        subprocess.run([*self.enter[0], "ip", "link", "set", self.device, state], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Makes them, and takes them down again; skips the test where that is not possible."""
    ip = shutil.which("ip")
    if ip is None:
        pytest.skip("needs iproute2")
    names = [f"als{os.getpid()}{side}" for side in "ab"]
    hosts = Hosts(([ip, "netns", "exec", names[0]], [ip, "netns", "exec", names[1]]))

    def run(line: str) -> None:
        subprocess.run([ip, *line.split()], check=True, capture_output=True)

    try:
        try:
            for name in names:
                run(f"netns add {name}")
            run(f"-n {names[0]} link add {hosts.device} type veth peer name {hosts.device} netns {names[1]}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        for number, name in enumerate(names, 1):
            run(f"-n {name} addr add 10.99.0.{number}/24 dev {hosts.device}")
            for device in ("lo", hosts.device):
                run(f"-n {name} link set {device} up")
        yield hosts
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)
