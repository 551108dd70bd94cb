"""Where epochs are shorter than rounds, each validation is of a model that has learned since the last one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.live import short_epochs_job as job
from tests.processes import Jobs


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_callbacks_that_decide_see_the_model_improve(started: Jobs, tmp_path: Path, interval: float) -> None:
    started.run(job.__file__, tmp_path, interval)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["epochs"] == job.EPOCHS
    assert len(found["versions"]) == job.EPOCHS / interval
    assert found["versions"] == sorted(set(found["versions"]))
    assert found["losses"] == sorted(set(found["losses"]), reverse=True)
    assert found["best"] == pytest.approx(found["losses"][-1])
    assert found["rate"] == 0.01
