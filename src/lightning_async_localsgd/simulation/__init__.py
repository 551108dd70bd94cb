"""A simulated cluster in one process: virtual workers with virtual clocks, and the decisions of the live server.

All local steps of all workers are computed. Only time is simulated: the simulator counts time instead of waiting.
"""

from __future__ import annotations
