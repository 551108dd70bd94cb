"""Searches for conversations that end the server, guided by which code they reach.

Run it for longer, from the project's folder: ``python tests/wire/guided_fuzz.py -runs=1000000 -max_len=2000``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["lightning_async_localsgd"]):
    from tests.wire.fuzzing import Bytes, throw


def one(data: bytes) -> None:
    throw(Bytes(data))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
