"""An ordinary short run in real processes: ``python short_run_job.py OUT STRATEGY RANKS TASK SEED``.

Rank 0 writes the validation loss of each epoch to ``OUT``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.short_tasks import TASKS


def main(out: str, strategy: str, ranks: str, task: str, seed: str) -> None:
    losses = TASKS[task].fit(int(seed), strategy=strategy, devices=int(ranks))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(out).write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # Lightning leaves DDP's to the end of Python, which may abort it.


if __name__ == "__main__":
    main(*sys.argv[1:])
