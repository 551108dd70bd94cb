"""``python -m lightning_async_localsgd``: what it starts, when it starts that again, and how it ends."""

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

from lightning_async_localsgd import supervisor
from lightning_async_localsgd.supervisor import main
from tests.processes import Jobs, jobs, python_path

# It has a child, as rank 0 has; what it is told is written down, once for each time that the script is started.
SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
out, fates, *rest = sys.argv[1:]
out = pathlib.Path(out)
lives = len(list(out.glob("life*")))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], stdout=subprocess.DEVNULL)
names = ("ASYNC_LOCALSGD_RUN", "ASYNC_LOCALSGD_RESUME")
told = {"pid": os.getpid(), "child": child.pid, "rest": rest, **{name: os.environ.get(name) for name in names}}
(out / "new").write_text(json.dumps(told))
(out / "new").rename(out / f"life{lives}")
fate = json.loads(fates)[lives]
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


def lives(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("life*"))]


def await_life(started: Jobs, folder: Path, name: str = "life0") -> dict[str, object]:
    until = time.monotonic() + 30
    while not (folder / name).exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return lives(folder)[0]


def test_a_killed_script_is_started_again_and_told_to_go_on(started: Jobs, script: Path) -> None:
    out = script.parent
    process = started.start(command(script, out, '["kill", "kill", 0]', "--max_steps=3", "-m"))
    code, text = started.finish(process, 60)
    assert code == 0, text
    first, second, third = lives(out)
    assert first["rest"] == second["rest"] == third["rest"] == ["--max_steps=3", "-m"]
    assert [life["ASYNC_LOCALSGD_RESUME"] for life in (first, second, third)] == [None, "1", "1"]
    assert first["ASYNC_LOCALSGD_RUN"] == second["ASYNC_LOCALSGD_RUN"] is not None
    assert "the job was ended by signal 9 (SIGKILL); it is started again in 0.5 s" in text
    assert not any(psutil.pid_exists(life["child"]) for life in (first, second))  # type: ignore[arg-type]


def test_a_module_and_a_run_with_a_name(started: Jobs, script: Path) -> None:
    out = script.parent
    line = command("--max-restarts", 0, "-m", "script", out, "[7]")
    code, _ = started.finish(started.start(line, ASYNC_LOCALSGD_RUN="mine", **python_path(out)), 60)
    assert code == 7, "an error of the script is final"
    [life] = lives(out)
    assert life["ASYNC_LOCALSGD_RUN"] == "mine"


def test_restarts_are_used_up(started: Jobs, script: Path) -> None:
    line = command("--max-restarts=1", script, script.parent, '["kill", "kill"]')
    code, text = started.finish(started.start(line), 60)
    assert code == 128 + signal.SIGKILL
    assert "--max-restarts=1 is used up" in text


@pytest.mark.parametrize(
    ("sent", "fate"),
    [("SIGINT", "wait"), ("SIGTERM", "wait"), pytest.param("SIGTERM", "stubborn", marks=pytest.mark.slow)],
)
def test_a_signal_ends_the_job_for_good(started: Jobs, script: Path, sent: str, fate: str) -> None:
    out = script.parent
    process = started.start(command(script, out, f'["{fate}"]'))
    await_life(started, out, "ready" if fate == "stubborn" else "life0")
    process.send_signal(getattr(signal, sent))
    begun = time.monotonic()
    code, text = started.finish(process, 60)
    assert len(lives(out)) == 1
    assert time.monotonic() - begun < 30
    if fate == "stubborn":
        assert code == 128 + signal.SIGKILL
        assert "it is killed" in text
    else:
        # Python turns SIGINT into an exception first, and then ends by that signal after all.
        assert code == 128 + getattr(signal, sent)
    assert not started.processes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_the_job_ends_with_its_supervisor(started: Jobs, script: Path) -> None:
    process = started.start(command(script, script.parent, '["wait"]'))
    life = await_life(started, script.parent)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([one for one in started.processes() if one.pid == life["pid"]], timeout=30)
    assert not alive
    for process_ in started.processes():
        process_.kill()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"TORCHELASTIC_RUN_ID": "1"}, "torchrun"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, "srun"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
    ],
)
def test_one_of_several_ranks_is_not_started_again_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], named: str
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["train.py"])
    assert named in capsys.readouterr().err


def test_what_is_said_to_nobody_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        supervisor._say("the job has not ended")
        monkeypatch.undo()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), writer)  # For what is left in its buffer.


def test_a_senseless_number_of_restarts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--max-restarts=-1", "train.py"])
    assert "--max-restarts=-1 must be 0 or more" in capsys.readouterr().err


def test_neither_torch_nor_lightning_is_needed() -> None:
    code = "import sys, lightning_async_localsgd.supervisor; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
