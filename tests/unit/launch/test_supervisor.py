"""The command ``python -m lightning_async_localsgd``: what it runs, when it restarts the script, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lightning_async_localsgd.launch import supervisor
from lightning_async_localsgd.launch.supervisor import main
from tests.processes import Jobs, jobs, python_path

# Each start of the script launches a child, as rank 0 does, writes its settings to a file, and ends in its own way.
SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
out, fates, *rest = sys.argv[1:]
out = pathlib.Path(out)
number = len(list(out.glob("start*")))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], stdout=subprocess.DEVNULL)
names = ("ASYNC_LOCALSGD_RUN", "ASYNC_LOCALSGD_RESUME")
settings = {"pid": os.getpid(), "child": child.pid, "rest": rest, **{name: os.environ.get(name) for name in names}}
(out / "new").write_text(json.dumps(settings))
(out / "new").rename(out / f"start{number}")
fate = json.loads(fates)[number]
if fate == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fate in ("wait", "stubborn"):
    if fate == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (out / "ready").touch()
    time.sleep(100)
child.kill()
sys.exit(fate)
"""


@pytest.fixture
def started() -> Iterator[Jobs]:
    with jobs() as started:
        yield started


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lightning_async_localsgd", *map(str, arguments)]


def starts(folder: Path) -> list[dict[str, object]]:
    """Return what each start of the script wrote."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("start*"))]


def wait_for_start(folder: Path, name: str = "start0") -> dict[str, object]:
    deadline = time.monotonic() + 30
    while not (folder / name).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return starts(folder)[0]


def test_killed_script_is_restarted_and_told_to_resume(started: Jobs, script: Path) -> None:
    out = script.parent
    process = started.start(command(script, out, '["kill", "kill", 0]', "--max_steps=3", "-m"))
    code, text = started.finish(process, 60)
    assert code == 0, text
    first, second, third = starts(out)
    assert first["rest"] == second["rest"] == third["rest"] == ["--max_steps=3", "-m"]
    assert [start["ASYNC_LOCALSGD_RESUME"] for start in (first, second, third)] == [None, "1", "1"]
    assert first["ASYNC_LOCALSGD_RUN"] == second["ASYNC_LOCALSGD_RUN"] is not None
    assert "the script ended with signal 9 (SIGKILL); restarting it in 0.5 s" in text
    assert not any(psutil.pid_exists(start["child"]) for start in (first, second))  # type: ignore[arg-type]


def test_error_of_a_module_is_final_and_the_run_keeps_its_name(started: Jobs, script: Path) -> None:
    out = script.parent
    line = command("--max-restarts", 0, "-m", "script", out, "[7]")
    code, _ = started.finish(started.start(line, ASYNC_LOCALSGD_RUN="mine", **python_path(out)), 60)
    assert code == 7
    [start] = starts(out)
    assert start["ASYNC_LOCALSGD_RUN"] == "mine"


def test_supervisor_gives_up_when_restarts_are_used_up(started: Jobs, script: Path) -> None:
    line = command("--max-restarts=1", script, script.parent, '["kill", "kill"]')
    code, text = started.finish(started.start(line), 60)
    assert code == 128 + signal.SIGKILL
    assert "not restarting it again after 1 restart(s) (--max-restarts=1)" in text


@pytest.mark.parametrize(
    ("sent", "fate"),
    [("SIGINT", "wait"), ("SIGTERM", "wait"), pytest.param("SIGTERM", "stubborn", marks=pytest.mark.slow)],
)
def test_stop_signal_ends_the_job_without_a_restart(started: Jobs, script: Path, sent: str, fate: str) -> None:
    out = script.parent
    process = started.start(command(script, out, f'["{fate}"]'))
    wait_for_start(out, "ready" if fate == "stubborn" else "start0")
    process.send_signal(getattr(signal, sent))
    begun = time.monotonic()
    code, text = started.finish(process, 60)
    assert len(starts(out)) == 1
    assert time.monotonic() - begun < 30
    if fate == "stubborn":
        assert code == 128 + signal.SIGKILL
        assert "killing it" in text
    else:
        # Python turns SIGINT into an exception, and then ends itself with the same signal.
        assert code == 128 + getattr(signal, sent)
    assert not started.processes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can signal the death of a parent")
def test_job_ends_when_its_supervisor_dies(started: Jobs, script: Path) -> None:
    process = started.start(command(script, script.parent, '["wait"]'))
    start = wait_for_start(script.parent)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([other for other in started.processes() if other.pid == start["pid"]], timeout=30)
    assert not alive
    for other in started.processes():
        other.kill()


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "1"}, "torchrun"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, "srun"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
    ],
)
def test_single_rank_of_another_launcher_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], launcher: str
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["train.py"])
    assert launcher in capsys.readouterr().err


def test_printing_to_a_closed_pipe_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        supervisor._print("the script is still running")
        monkeypatch.undo()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), writer)  # For the text that is left in the buffer.


def test_negative_number_of_restarts_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--max-restarts=-1", "train.py"])
    assert "--max-restarts=-1 must be 0 or more" in capsys.readouterr().err


def test_supervisor_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, lightning_async_localsgd.launch.supervisor; assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
