"""Fault injection: invalid faults are refused by name, valid faults are injected once and leave nothing behind."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.faults import MOMENTS, Fault, FaultInjection, FaultKind, cut_connections

LASTING_KINDS = {
    FaultKind.STOP: {"seconds": 1.0},
    FaultKind.DELAY: {"seconds": 1.0},
    FaultKind.DROP_LINK: {"seconds": 1.0},
}
ARGUMENTS: dict[FaultKind, dict[str, float]] = {**LASTING_KINDS, FaultKind.SLOW_LINK: {"bytes_per_second": 1e6}}


@pytest.mark.parametrize("kind", FaultKind)
def test_each_kind_can_be_injected_at_its_moments_only(kind: FaultKind) -> None:
    assert Fault(kind, **ARGUMENTS.get(kind, {})).moment == MOMENTS[kind][0]
    for moment in MOMENTS[FaultKind.KILL]:
        if moment in MOMENTS[kind]:
            assert repr(moment) in str(Fault(kind, moment=moment, **ARGUMENTS.get(kind, {})))
        else:
            with pytest.raises(ValueError, match=f"moment='{moment}' is not possible for a {kind.name} fault"):
                Fault(kind, moment=moment, **ARGUMENTS.get(kind, {}))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kind": "KILL"}, "kind='KILL' must be a FaultKind: KILL, STOP"),
        ({"kind": FaultKind.KILL, "worker": -1}, "worker=-1 of a KILL fault must be an integer >= 0"),
        ({"kind": FaultKind.KILL, "round": 0}, "round=0 of a KILL fault must be an integer >= 1"),
        ({"kind": FaultKind.KILL, "life": 0.5}, "life=0.5 of a KILL fault must be an integer >= 0"),
        ({"kind": FaultKind.KILL, "seconds": 1.0}, "seconds=1.0 has no effect on a KILL fault"),
        ({"kind": FaultKind.STOP}, "a STOP fault needs seconds=..."),
        ({"kind": FaultKind.STOP, "seconds": float("inf")}, "seconds=inf of a STOP fault must be a positive"),
        ({"kind": FaultKind.SLOW_LINK, "bytes_per_second": 0}, "bytes_per_second=0 of a SLOW_LINK fault"),
        ({"kind": FaultKind.NAN, "moment": "saving"}, "moment='saving' is not possible for a NAN fault"),
        ({"kind": FaultKind.CORRUPT, "worker": 0}, "a CORRUPT fault at 'mid-push' is not possible for worker=0"),
        ({"kind": FaultKind.KILL, "worker": 0, "moment": "mid-pull"}, "has no connection"),
    ],
)
def test_invalid_fault_is_refused_by_name(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Fault(**values)


def test_callback_without_faults_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("faults=[] is empty")):
        FaultInjection([])


@pytest.mark.parametrize(
    ("strategy", "fault", "text"),
    [
        ("auto", Fault(FaultKind.KILL), "works with strategy='async_localsgd' only, not with Single"),
        (
            "async_localsgd",
            Fault(FaultKind.KILL),
            "KILL of worker 1, round 1, 'computing' can never come: there is one",
        ),
        (
            AsyncLocalSGDStrategy(checkpoint_every=None),
            Fault(FaultKind.KILL, worker=0, moment="saving"),
            "with checkpoint_every=None the strategy saves nothing",
        ),
    ],
)
def test_fault_that_can_never_happen_is_refused_when_fit_begins(
    tmp_path: Path, strategy: Any, fault: Fault, text: str
) -> None:
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        callbacks=[FaultInjection([fault])],
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        trainer.fit(BoringModel())


def test_faults_can_be_configured_in_a_file() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(FaultInjection, "injection")
    text = """
injection:
  class_path: lightning_async_localsgd.faults.FaultInjection
  init_args:
    faults:
      - {kind: KILL, worker: 1, round: 3, moment: mid-push}
      - {kind: STOP, worker: 2, seconds: 20}
"""
    callback = parser.instantiate(parser.parse_string(text)).injection
    assert callback.faults == [
        Fault(FaultKind.KILL, worker=1, round=3, moment="mid-push"),
        Fault(FaultKind.STOP, worker=2, seconds=20),
    ]


@pytest.mark.filterwarnings("ignore")
def test_faults_are_injected_into_a_run_of_one_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults = [
        Fault(FaultKind.DELAY, worker=0, round=2, moment="before round", seconds=0.3),
        Fault(FaultKind.NAN, worker=0, round=3, moment="computing"),
        Fault(FaultKind.DELAY, worker=0, round=9, seconds=60.0),
        Fault(FaultKind.DELAY, worker=0, round=1, seconds=60.0, life=1),
    ]
    trainer = L.Trainer(
        strategy=AsyncLocalSGDStrategy(local_steps=50),
        accelerator="cpu",
        devices=1,
        max_steps=200,
        callbacks=[FaultInjection(faults)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    began = time.monotonic()
    model = BoringModel()
    with pytest.warns(UserWarning, match="not injected, because its moment did not come: DELAY for 60 s"):
        trainer.fit(model)
    assert time.monotonic() - began > 0.3
    assert [record.getMessage() for record in caplog.records if record.getMessage().startswith("injected:")] == [
        "injected: DELAY for 0.3 s of worker 0, round 2, 'before round'",
        "injected: NAN of worker 0, round 3, 'computing'",
    ]
    assert model.layer.weight.isfinite().all(), "the push with the NaN is refused"


def test_suspended_process_resumes() -> None:
    code = "import time; from lightning_async_localsgd.faults import suspend_process; import sys\n"
    code += "began = time.monotonic(); suspend_process(1.0); print(time.monotonic() - began)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert 1.0 <= float(done.stdout) < 30.0


def test_child_that_would_resume_a_process_ends_with_it(tmp_path: Path) -> None:
    variable = f"ASYNC_LOCALSGD_TEST={tmp_path}"
    code = "from lightning_async_localsgd.faults import suspend_process; suspend_process(600.0)"
    environment = {**os.environ, "ASYNC_LOCALSGD_TEST": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as victim:
        _wait_until(lambda: _state(victim.pid) == "T")
        assert len(_processes_with(variable)) == 2
        victim.kill()
    _wait_until(lambda: not _processes_with(variable))


def test_only_connections_to_the_given_address_are_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as cut, socket.create_server(("127.0.0.1", 0)) as kept:
        victim = socket.create_connection(cut.getsockname())
        bystander = socket.create_connection(kept.getsockname())
        victim_end, bystander_end = cut.accept()[0], kept.accept()[0]
        with victim, bystander, victim_end, bystander_end:
            cut_connections(f"tcp://127.0.0.1:{cut.getsockname()[1]}")
            assert victim_end.recv(1) == b""
            bystander.sendall(b"x")
            assert bystander_end.recv(1) == b"x"


def _wait_until(condition: Any) -> None:
    until = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _processes_with(variable: str) -> list[int]:
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                processes.append(int(folder.name))
        except OSError:
            continue
    return processes
