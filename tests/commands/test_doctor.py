"""``doctor``: every problem is found, and has a remedy."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import zmq

from lightning_async_localsgd.commands import checks
from lightning_async_localsgd.commands.checks import Finding
from tests.commands.conftest import TOKEN, Command, LiveRun


def only(findings: Iterator[Finding], status: str) -> Finding:
    """Return the only finding of a status, which must have a remedy unless it is ok."""
    (found,) = [finding for finding in findings if finding.status == status]
    assert bool(found.remedy) == (status != "ok")
    return found


def test_healthy_machine_has_no_problem(command: Command) -> None:
    code, output, errors = command("doctor", "--json")
    findings = json.loads(output)
    assert code == 0, (output, errors)
    checked = {finding["check"] for finding in findings}
    assert {"versions", "registration", "encryption", "open files", "processes", "GPUs"} <= checked
    assert {finding["status"] for finding in findings if finding["check"] == "registration"} == {"ok"}
    assert all(finding["remedy"] for finding in findings if finding["status"] != "ok")


def test_wrong_and_missing_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "pyzmq":
            raise metadata.PackageNotFoundError(name)
        return "2.6.2" if name == "pytorch-lightning" else real(name)

    monkeypatch.setattr(checks.metadata, "version", version)
    missing, compromised = [finding for finding in checks.check_versions() if finding.status == "problem"][::-1]
    assert (missing.text, missing.remedy) == ("pyzmq is missing", "pip install 'pyzmq>=26.4'")
    assert compromised.text == "pytorch-lightning 2.6.2"
    assert "!=2.6.2" in compromised.remedy


def test_strategy_that_is_not_registered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    problems = [finding for finding in checks.check_libraries() if finding.status == "problem"]
    assert problems
    for finding in problems:
        assert "does not know" in finding.text
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD" in finding.remedy


def test_library_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda is missing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "ImportError: libcuda is missing" in only(checks.check_libraries(), "problem").text


def test_limits_that_are_too_low_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    files, memory = (finding for finding in checks.check_limits() if finding.status == "warning")
    assert (files.text, files.remedy) == ("a process may open 256 files", "ulimit -n 4096")
    assert "--shm-size" in memory.remedy


def test_missing_encryption_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda what: False)
    assert "without CURVE" in only(checks.check_encryption(), "problem").text


def test_cuda_driver_without_cuda_in_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "without CUDA" in only(checks._gpu_findings({"cuda": None, "devices": []}), "problem").text
    busy = {"cuda": "13.0", "devices": [["H200", 1e9, 140e9]]}
    assert "nvidia-smi -i 0" in only(checks._gpu_findings(busy), "warning").remedy


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_rank_without_its_launcher_is_found(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
    )
    variables = {"ASYNC_LOCALSGD_RUN": "a-run-of-the-test", "LOCAL_RANK": "1"}
    launcher = started.start([sys.executable, "-c", program], **variables)
    pid = int(launcher.stdout.readline())
    try:
        launcher.wait()
        if psutil.Process(pid).ppid() != 1:
            pytest.skip("orphans have another parent here")
        mine = [finding for finding in checks.check_processes() if "a-run-of-the-test" in finding.text]
        assert [finding.status for finding in mine] == ["warning"]
        assert mine[0].remedy.endswith(f"kill {pid}")
        monkeypatch.setattr(checks, "_program", lambda _: sys.executable)
        found = [finding.text for finding in checks.check_processes()]
        assert not any("a-run-of-the-test" in text for text in found), "process 1 of a container is the launcher"
    finally:
        os.kill(pid, 9)


def test_server_is_reached_with_its_token_only(
    live_run: Callable[..., LiveRun], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_libraries", lambda: iter(()))
    run = live_run(seconds_per_step=[0.01, 0.01], trainer={"max_steps": 100_000})
    run.wait_for(lambda state: len(state["workers"]) == 2)
    address = f"127.0.0.1:{run.port}"
    code, output, _ = command("doctor", address)
    assert code == 3
    assert "set the environment variable ASYNC_LOCALSGD_TOKEN" in output
    monkeypatch.setenv("ASYNC_LOCALSGD_TOKEN", "a token of another run")
    code, output, _ = command("doctor", address, "--timeout", "2")
    assert code == 3
    assert "PROBLEM  token" in output
    monkeypatch.setenv("ASYNC_LOCALSGD_TOKEN", TOKEN)
    code, output, _ = command("doctor", address, "--no-encryption", "--timeout", "2")
    assert code == 3
    assert "PROBLEM  token" in output
    code, output, _ = command("doctor", address)
    assert code == 0, output
    assert "knows the token; traffic is encrypted" in output
    real = time.time
    monkeypatch.setattr(checks.time, "time", lambda: real() + 100.0)
    clocks = [finding for finding in checks.check_server(f"tcp://{address}", True, 10.0) if finding.check == "clocks"]
    assert only(iter(clocks), "warning").text == "the server's clock differs by -100.0 s"
    monkeypatch.setattr(checks.time, "time", real)
    run.stop()


def test_server_that_is_not_there_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_libraries", lambda: iter(()))
    code, output, _ = command("doctor", "127.0.0.1:9", "--timeout", "1")
    assert code == 3
    assert "PROBLEM  reachability: no connection to 127.0.0.1:9" in output
    assert "exchange.port" in output
    code, _, errors = command("doctor", "no-address")
    assert code == 1
    assert "'no-address' is not a server's address; use HOST:PORT" in errors


def test_text_has_a_line_for_each_finding_and_one_for_its_remedy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from lightning_async_localsgd.commands.doctor import *\n"
         "from lightning_async_localsgd.commands.checks import Finding\n"
         "print(as_text(Finding('a', 'problem', 'b', 'c')))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "PROBLEM  a: b\n         -> c\n"


@pytest.mark.parametrize("address", ["..:80", "nowhere.invalid:80"])
def test_names_that_are_no_names_are_unreachable(address: str, command: Command) -> None:
    code, output, _ = command("doctor", address)
    assert code == 3
    assert f"no connection to {address}" in output


def test_port_outside_the_range_is_no_address(command: Command) -> None:
    assert "is not a server's address" in command("doctor", "127.0.0.1:65536")[2]
