"""Put examples and benchmarks on the path, as running their scripts does, and disable downloads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("examples/language_model", "examples/toy_mixture", "benchmarks")]
# `datasets` reads these at import. The tests must not need the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
