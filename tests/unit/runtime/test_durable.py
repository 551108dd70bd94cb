"""Files that exist either completely or not at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async_localsgd.runtime import durable
from lightning_async_localsgd.runtime.durable import BackgroundWriter, link, newest_first, verified, write


def text(content: bytes) -> Any:
    return lambda file: file.write(content)


def test_file_name_contains_the_hash_and_only_this_user_can_read_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run", "rounds=7", ".ckpt", text(b"content"))
    assert path.read_bytes() == b"content"
    assert path.name == f"rounds=7-{'ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73'}.ckpt"
    assert verified(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_state_saved_by_torch_is_loaded_again(tmp_path: Path) -> None:
    state = {"weight": torch.randn(1000, 10), "empty": torch.empty(0), "step": 3, "deep": [{"x": torch.arange(5)}]}
    path = write(tmp_path, "state", ".pt", lambda file: torch.save(state, file))
    assert verified(path)
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["weight"], state["weight"])
    assert torch.equal(loaded["deep"][0]["x"], torch.arange(5))


@pytest.mark.parametrize("change", ["flip", "shorten", "extend", "remove", "rename"])
def test_damage_is_detected(tmp_path: Path, change: str) -> None:
    path = write(tmp_path, "state", ".pt", text(b"x" * 5000))
    content = bytearray(path.read_bytes())
    if change == "flip":
        content[2500] ^= 1
    elif change == "shorten":
        del content[-1]
    elif change == "extend":
        content += b"x"
    path.write_bytes(content)
    if change == "remove":
        path.unlink()
    elif change == "rename":
        path = path.rename(tmp_path / "state.pt")
    assert not verified(path)


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("saves", ["bytes", "torch"])
def test_failed_write_leaves_only_the_earlier_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, saves: str
) -> None:
    before = write(tmp_path, "first", ".pt", text(b"before"))

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    tensors = {"weight": torch.ones(1000)}
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, "second", ".pt", text(b"after") if saves == "bytes" else lambda file: torch.save(tensors, file))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [before]
    assert verified(before)


def test_short_writes_of_the_system_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    path = write(tmp_path, "state", ".pt", text(b"0123456789"))
    assert path.read_bytes() == b"0123456789"
    assert verified(path)


def test_leftovers_of_dead_processes_are_removed_but_not_files_in_progress(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from lightning_async_localsgd.runtime.durable import write\n"
        "write(Path(sys.argv[1]), 'x', '.pt', lambda file: (file.write(b'half'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    code = subprocess.run([sys.executable, "-c", script, tmp_path], check=False).returncode
    assert code == -signal.SIGKILL
    [leftover] = tmp_path.iterdir()

    meanwhile: list[set[Path]] = []

    def save(file: Any) -> None:
        # The other write removes leftovers while this file is unfinished.
        write(tmp_path, "other", ".pt", text(b"other"))
        meanwhile.append(set(tmp_path.glob(".unfinished-*")))
        file.write(b"content")

    path = write(tmp_path, "state", ".pt", save)
    assert verified(path)
    assert leftover not in meanwhile[0]
    assert len(meanwhile[0]) == 1
    assert not list(tmp_path.glob(".unfinished-*"))


def test_file_removed_as_a_leftover_before_its_lock_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            [path] = tmp_path.iterdir()
            removed.append(path)
            path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert verified(write(tmp_path, "state", ".pt", text(b"content")))
    assert removed


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_file_system_without_locks_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert verified(write(tmp_path, "state", ".pt", text(b"content")))


def test_failed_lock_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(tmp_path, "state", ".pt", text(b"content"))
    assert list(tmp_path.iterdir()) == []


def test_last_written_file_is_the_newest_even_if_the_clock_was_set_back(tmp_path: Path) -> None:
    before = [write(tmp_path, f"rounds={n}", ".ckpt", text(b"%d" % n)) for n in (8, 9)]
    for path in before:
        os.utime(path, (2e9, 2e9))  # Far in the future, as if the clock had been set back since.
    after = [write(tmp_path, f"rounds={n}", ".ckpt", text(b"%d" % n)) for n in (1, 2)]
    assert newest_first([*before, *after])[:2] == after[::-1]


def test_link_is_the_same_file_or_a_copy_if_links_are_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "here", "state", ".pt", text(b"content"))
    first = link(path, tmp_path / "there")
    assert first.samefile(path)
    assert link(path, tmp_path / "there") == first

    def another_device(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", another_device)
    copy = link(path, tmp_path / "far")
    assert copy.name == path.name
    assert verified(copy)
    assert not copy.samefile(path)
    path.write_bytes(b"damaged")
    with pytest.raises(OSError, match="does not match the hash in its name"):
        link(path, tmp_path / "farther")
    assert not list((tmp_path / "farther").iterdir())


def test_background_writer_logs_and_counts_failures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = BackgroundWriter("the state", tmp_path)
    go = threading.Event()
    writer.begin(lambda: (go.wait(), write(tmp_path, "state", ".pt", text(b"content"))))  # type: ignore[func-returns-value]
    assert writer.busy
    assert not writer.wait(0.01)
    go.set()
    assert writer.wait(10)
    assert len(list(tmp_path.glob("state-*.pt"))) == 1

    def fails() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    with caplog.at_level(logging.ERROR):
        writer.begin(fails)
        assert writer.wait(10)
    assert writer.failures == 1
    assert "the state could not be written" in caplog.text
    assert "Permission denied" in caplog.text
    assert not any(thread.name == "async_localsgd-writer" for thread in threading.enumerate())


def test_file_at_the_path_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(OSError, match="run"):
        durable.write(tmp_path / "run", "state", ".pt", text(b"content"))
