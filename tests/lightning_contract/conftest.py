"""Fixtures of the tests with the launching job."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return an empty folder for the notes of a job."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
