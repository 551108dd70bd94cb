"""``python -m lightning_async_localsgd``, see :mod:`.supervisor`."""

from __future__ import annotations

import sys

from lightning_async_localsgd.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
