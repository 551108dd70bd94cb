"""Measures the codecs on one core, in passes over the fp32 data: ``python benchmarks/codecs.py [--numel N]``.

A pass is a copy of the flat vector, which reads it once and writes it once. A worker packs its push, with error
feedback, and the server unpacks it. Models travel the other way, with ``int8`` as differences. All calls take turns.
CPU times are compared, and the shortest of each counts, because other processes of the machine disturb them.
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
    push, out, residual, held = torch.randn(numel) * 1e-3, torch.empty(numel), torch.zeros(numel), torch.zeros(numel)
    calls: dict[str, Callable[[], object]] = {"pass": partial(out.copy_, push)}
    codecs = {encoding: Codec(layout, encoding) for encoding in ENCODINGS}
    for encoding, codec in codecs.items():
        packed = codec.new_packed()
        calls[f"push {encoding}"] = partial(codec.pack_push, push, packed, residual)
        calls[f"unpack {encoding}"] = partial(codec.unpack, packed, out)
        if encoding == "bf16":
            calls[f"model {encoding}"] = partial(codec.pack_model, push, packed)
        if encoding == "int8":
            calls[f"model {encoding}"] = partial(codec.pack_difference, push, packed, held)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(TURNS):
        for name, call in calls.items():
            began = time.thread_time()
            call()
            times[name].append(time.thread_time() - began)
    one_pass = min(times["pass"])
    print(f"{numel:,} parameters, torch {torch.__version__}, one pass {one_pass * 1000:.1f} ms")
    print("| codec | bytes / fp32 | pack a push | unpack | pack a model |")
    print("|---|---|---|---|---|")
    for encoding, codec in codecs.items():
        names = (f"{what} {encoding}" for what in ("push", "unpack", "model"))
        passes = (f"{min(times[name]) / one_pass:.1f}" if name in times else "" for name in names)
        print(f"| {encoding} | {codec.nbytes / (4 * numel):.3f} | {' | '.join(passes)} |")


if __name__ == "__main__":
    main()
