"""Complete runs whose pushes and models travel with fewer bits."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import pytest

from tests.live.conftest import Outcome


def losses_of(outcome: Outcome) -> list[float]:
    with (outcome.out / "metrics.csv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]


@pytest.mark.parametrize(
    "exchange",
    [{"upload": "int8", "download": "bf16"}, {"upload": "int4", "download": "int8", "overlap": True}],
    ids=["int8-bf16", "int4-int8-overlap"],
)
def test_all_ranks_end_with_the_same_model_and_the_loss_falls(
    job: Callable[..., Outcome], exchange: dict[str, Any]
) -> None:
    outcome = job(
        ranks=2, start_method="fork", exchange=exchange, strategy={"quorum": 1}, sanity=0, val_check_interval=4
    )
    assert len({rank["digest"] for rank in outcome.ranks}) == 1
    losses = losses_of(outcome)
    assert losses[-1] < losses[0]
