"""Entry point of ``python -m lightning_async_localsgd``, see :mod:`.launch.supervisor`."""

from __future__ import annotations

import sys

from lightning_async_localsgd.launch.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
