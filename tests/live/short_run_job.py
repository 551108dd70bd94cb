"""An ordinary short run in real processes: ``python short_run_job.py OUT STRATEGY RANKS TASK SEED``.

Rank 0 writes the validation loss of each epoch to ``OUT``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.lightning_models import close_ddp_group
from tests.short_tasks import TASKS


def main(out: str, strategy: str, ranks: str, task: str, seed: str) -> None:
    losses = TASKS[task].fit(int(seed), strategy=strategy, devices=int(ranks))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(out).write_text(json.dumps(losses))
    close_ddp_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
