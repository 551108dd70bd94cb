"""Text with the layout of the study's, but of random words."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from benchmarks.study.text import DOMAINS


def write_texts(folder: Path) -> None:
    """Write all files that the study reads."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioklmnrst", k=draw.randint(2, 6))) for _ in range(60)]

    def documents(count: int) -> str:
        texts = (" ".join(draw.choices(words, k=300)) for _ in range(count))
        return "".join(json.dumps({"text": text}) + "\n" for text in texts)

    names = {f"c4_en/{split}.jsonl.gz": 20 for split in ("train", "valid")}
    names |= {f"domains/{domain}.jsonl.gz": 20 for domain in DOMAINS}
    names |= {f"wikitext2/{split}.txt.gz": 20 for split in ("train", "valid")}
    for name, count in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / name, "wt") as file:
            file.write(documents(count))
