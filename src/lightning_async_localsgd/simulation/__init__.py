"""A whole cluster in one process: virtual workers with clocks of their own, and the live server's own decisions.

What is computed is real, every local step of every worker; only time is not: it is counted instead of waited for.
"""

from __future__ import annotations
