"""Measures the codecs on one core, in passes over the fp32 data: ``python benchmarks/codecs.py [--numel N]``.

A pass is a copy of the flat vector, which reads it once and writes it once. The sender packs, with error feedback, and
the receiver unpacks. All calls take turns, and the shortest time of each counts, because other processes of the machine
slow them down.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch

from lightning_async_localsgd.protocol.codecs import Codec, Encoding
from lightning_async_localsgd.protocol.layout import Layout

ENCODINGS: tuple[Encoding, ...] = ("bf16", "int8", "int4")
TURNS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the codecs on one core.")
    parser.add_argument("--numel", type=int, default=1 << 25, help="parameters")
    numel = parser.parse_args().numel
    torch.set_num_threads(1)
    layout = Layout([("weight", (numel,), "torch.float32", "parameter")])
    push, out, residual = torch.randn(numel) * 1e-3, torch.empty(numel), torch.zeros(numel)
    calls: dict[str, Callable[[], object]] = {"pass": partial(out.copy_, push)}
    codecs = {encoding: Codec(layout, encoding) for encoding in ENCODINGS}
    for encoding, codec in codecs.items():
        packed = codec.new_packed()
        calls[f"pack {encoding}"] = partial(codec.pack_push, push, packed, residual)
        calls[f"unpack {encoding}"] = partial(codec.unpack, packed, out)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(TURNS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    one_pass = min(times["pass"])
    print(f"{numel:,} parameters, torch {torch.__version__}, one pass {one_pass * 1000:.1f} ms")
    print("| codec | bytes / fp32 | pack | unpack | pack + unpack |")
    print("|---|---|---|---|---|")
    for encoding, codec in codecs.items():
        pack, unpack = (min(times[f"{what} {encoding}"]) / one_pass for what in ("pack", "unpack"))
        share = codec.nbytes / (4 * numel)
        print(f"| {encoding} | {share:.3f} | {pack:.1f} | {unpack:.1f} | {pack + unpack:.1f} |")


if __name__ == "__main__":
    main()
