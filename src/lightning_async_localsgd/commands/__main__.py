"""Entry point of ``python -m lightning_async_localsgd.commands``, which is the console script."""

from __future__ import annotations

import sys

from lightning_async_localsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
