"""Event logs that cannot be read say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_async_localsgd.server.events import FORMAT, read_events

BEGIN = {"kind": "begin", "seconds": 0.0, "content": {"format": FORMAT}}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_log_of_another_format_is_refused_by_its_format_even_if_its_messages_differ(tmp_path: Path) -> None:
    other = {**BEGIN, "content": {"format": FORMAT - 1}}
    push = {"kind": "push", "seconds": 1.0, "content": {"push": {"a field of long ago": 1}}}
    with pytest.raises(ValueError, match=f"format {FORMAT - 1}, and only format {FORMAT} can be read"):
        read_events(write(tmp_path / "events.jsonl", other, push))


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"kind":"dance","seconds":0,"content":{}}', '{"kind":"push","seconds":0,"content":{"push":{"x":1}}}'],
)
def test_broken_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="line 2 cannot be read"):
        read_events(write(tmp_path / "events.jsonl", BEGIN, line))
