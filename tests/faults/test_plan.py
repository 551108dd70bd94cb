"""Faults that make no sense are refused by name, and those that do come once and leave nothing behind."""

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
from lightning_async_localsgd.faults import MOMENTS, Fault, FaultInjection, FaultKind
from lightning_async_localsgd.injection import cut_connections

LASTING = {FaultKind.STOP: {"seconds": 1.0}, FaultKind.DELAY: {"seconds": 1.0}, FaultKind.DROP_LINK: {"seconds": 1.0}}
NEEDED: dict[FaultKind, dict[str, float]] = {**LASTING, FaultKind.SLOW_LINK: {"bytes_per_second": 1e6}}


@pytest.mark.parametrize("kind", FaultKind)
def test_every_kind_has_its_moments(kind: FaultKind) -> None:
    assert Fault(kind, **NEEDED.get(kind, {})).moment == MOMENTS[kind][0]
    for moment in MOMENTS[FaultKind.KILL]:
        if moment in MOMENTS[kind]:
            assert repr(moment) in str(Fault(kind, moment=moment, **NEEDED.get(kind, {})))
        else:
            with pytest.raises(ValueError, match=f"moment='{moment}' makes no sense for a {kind.name} fault"):
                Fault(kind, moment=moment, **NEEDED.get(kind, {}))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kind": "KILL"}, "kind='KILL' must be a FaultKind: KILL, STOP"),
        ({"kind": FaultKind.KILL, "worker": -1}, "worker=-1 of a KILL fault must be an integer >= 0"),
        ({"kind": FaultKind.KILL, "round": 0}, "round=0 of a KILL fault must be an integer >= 1"),
        ({"kind": FaultKind.KILL, "life": 0.5}, "life=0.5 of a KILL fault must be an integer >= 0"),
        ({"kind": FaultKind.KILL, "seconds": 1.0}, "seconds=1.0 means nothing for a KILL fault"),
        ({"kind": FaultKind.STOP}, "a STOP fault needs seconds=..."),
        ({"kind": FaultKind.STOP, "seconds": float("inf")}, "seconds=inf of a STOP fault must be a positive"),
        ({"kind": FaultKind.SLOW_LINK, "bytes_per_second": 0}, "bytes_per_second=0 of a SLOW_LINK fault"),
        ({"kind": FaultKind.NAN, "moment": "saving"}, "moment='saving' makes no sense for a NAN fault"),
        ({"kind": FaultKind.CORRUPT, "worker": 0}, "a CORRUPT fault at 'mid-push' is not possible for worker=0"),
        ({"kind": FaultKind.KILL, "worker": 0, "moment": "mid-pull"}, "has no connection"),
    ],
)
def test_nonsense_is_refused_by_name(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Fault(**values)


def test_a_callback_without_faults_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("faults=[] is empty")):
        FaultInjection([])


@pytest.mark.parametrize(
    ("strategy", "fault", "text"),
    [
        ("auto", Fault(FaultKind.KILL), "knows the moments of strategy='async_localsgd' only, this is a Single"),
        (
            "async_localsgd",
            Fault(FaultKind.KILL),
            "KILL of worker 1, round 1, 'computing' can never come: there is one",
        ),
        (
            AsyncLocalSGDStrategy(checkpoint_every=None),
            Fault(FaultKind.KILL, worker=0, moment="saving"),
            "with checkpoint_every=None nothing is saved",
        ),
    ],
)
def test_what_can_never_come_is_refused_when_the_fit_begins(
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


def test_a_configuration_file_can_ask_for_faults() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(FaultInjection, "rehearsal")
    text = """
rehearsal:
  class_path: lightning_async_localsgd.faults.FaultInjection
  init_args:
    faults:
      - {kind: KILL, worker: 1, round: 3, moment: mid-push}
      - {kind: STOP, worker: 2, seconds: 20}
"""
    callback = parser.instantiate(parser.parse_string(text)).rehearsal
    assert callback.faults == [
        Fault(FaultKind.KILL, worker=1, round=3, moment="mid-push"),
        Fault(FaultKind.STOP, worker=2, seconds=20),
    ]


@pytest.mark.filterwarnings("ignore")
def test_one_rank_rehearses_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults = [
        Fault(FaultKind.DELAY, worker=0, round=2, moment="before round", seconds=0.3),
        Fault(FaultKind.NAN, worker=0, round=3, moment="computing"),
        Fault(FaultKind.DELAY, worker=0, round=9, seconds=60.0),
        Fault(FaultKind.DELAY, worker=0, round=1, seconds=60.0, life=1),
    ]
    trainer = L.Trainer(
        strategy="async_localsgd",
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
    with pytest.warns(UserWarning, match="never injected, because its moment did not come: DELAY for 60 s"):
        trainer.fit(model)
    assert time.monotonic() - began > 0.3
    assert [record.getMessage() for record in caplog.records if "injected" in record.getMessage()] == [
        "injected: DELAY for 0.3 s of worker 0, round 2, 'before round'",
        "injected: NAN of worker 0, round 3, 'computing'",
    ]
    assert model.layer.weight.isfinite().all(), "the NaN was refused"


def test_a_process_stands_still_and_goes_on() -> None:
    code = "import time; from lightning_async_localsgd.injection import stand_still; import sys\n"
    code += "began = time.monotonic(); stand_still(1.0); print(time.monotonic() - began)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert 1.0 <= float(done.stdout) < 30.0


def test_whoever_would_wake_a_process_ends_with_it(tmp_path: Path) -> None:
    mark = f"ASYNC_LOCALSGD_TEST={tmp_path}"
    code = "from lightning_async_localsgd.injection import stand_still; stand_still(600.0)"
    environment = {**os.environ, "ASYNC_LOCALSGD_TEST": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as victim:
        _await(lambda: _state(victim.pid) == "T")
        assert len(_marked(mark)) == 2
        victim.kill()
    _await(lambda: not _marked(mark))


def test_connections_to_one_address_are_cut_and_no_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        victim = socket.create_connection(one.getsockname())
        bystander = socket.create_connection(other.getsockname())
        end, far = one.accept()[0], other.accept()[0]
        with victim, bystander, end, far:
            cut_connections(f"tcp://127.0.0.1:{one.getsockname()[1]}")
            assert end.recv(1) == b""
            bystander.sendall(b"x")
            assert far.recv(1) == b"x"


def _await(condition: Any) -> None:
    until = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _marked(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found
