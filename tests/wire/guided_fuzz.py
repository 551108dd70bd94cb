"""Searches for conversations that end the server, guided by the code that they reach.

To run it for longer, from the project's folder: ``python tests/wire/guided_fuzz.py -runs=1000000 -max_len=2000``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["lightning_async_localsgd"]):
    from tests.wire.fuzzing import FuzzerBytes, run_random_conversation


def run_one(data: bytes) -> None:
    run_random_conversation(FuzzerBytes(data))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    atheris.Setup(sys.argv, run_one)
    atheris.Fuzz()
