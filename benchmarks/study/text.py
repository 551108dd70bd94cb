"""The text of the study: token windows of real text, encoded once and cached."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[2]
# For the byte pair encoding of the example.
sys.path.append(str(ROOT / "examples" / "language_model"))

from data import default_cache_directory, encode_documents, train_tokenizer  # noqa: E402

DEFAULT_DATA = ROOT.parent / "shared" / "data"
DEFAULT_CACHE = default_cache_directory() / "study"
# Part of the cache key. Increase it when the same files give different tokens.
_FORMAT = 2
# The end of each domain is used for validation. Splitting by document is not possible: one domain is only two books.
_DOMAIN_VALIDATION = 0.05

DOMAINS = ("books_pg", "github_code", "stackexchange_apple", "bible_ukr")
"""One domain for each of four workers: books, source code, questions and answers, and a text in Ukrainian."""

CORPORA: dict[str, str] = {
    "c4": "c4_en/{split}.jsonl.gz",
    "wikitext2": "wikitext2/{split}.txt.gz",
    "domains": "domains/{domain}.jsonl.gz",
}


@dataclass(frozen=True)
class Corpus:
    """The token windows of one corpus.

    Args:
        train: training windows ``[n, length + 1]`` of each part. A corpus has one part, or one for each domain.
        validation: validation windows of each part, in the same shape. All parts have the same weight.

    """

    train: list[Tensor]
    validation: list[Tensor]

    @property
    def mixture(self) -> Tensor:
        """The training windows of all parts."""
        return self.train[0] if len(self.train) == 1 else torch.cat(self.train)

    def validation_windows(self, upper_bound: int) -> Tensor:
        """Return windows at even distances in the validation text, the same number from each part.

        Args:
            upper_bound: the largest number of windows.

        """
        share = max(1, upper_bound // len(self.validation))
        return torch.cat([_select_evenly(part, share) for part in self.validation])


def load_corpus(name: str, data: Path, cache: Path, vocabulary: int, length: int) -> Corpus:
    """Load a corpus, encoded with a byte pair encoding that was trained on its training text.

    Args:
        name: one of :data:`CORPORA`.
        data: folder that contains the files listed in :data:`CORPORA`.
        cache: folder for the encoded text.
        vocabulary: number of tokens of the encoding.
        length: tokens to predict in each window.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a split has fewer tokens than a window.

    """
    files = _files(name, data)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but the corpus {name} needs it: check --data")
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([_FORMAT, vocabulary, stamps]).encode()).hexdigest()
    path = cache / f"{name}-{vocabulary}-{key[:16]}.pt"
    if not path.exists():
        save_atomically(_encode(name, files, vocabulary), path)
    tokens: dict[str, list[Tensor]] = torch.load(path, weights_only=True)
    for split, parts in tokens.items():
        for part in parts:
            if len(part) <= length:
                raise ValueError(f"The {split} split of {name} has {len(part)} tokens, fewer than a window of {length}")
    return Corpus(**{split: [_windows(part, length) for part in parts] for split, parts in tokens.items()})


def save_atomically(value: object, path: Path) -> None:
    """Save to a file that is never incomplete, even if two processes save it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        torch.save(value, name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


class Windows(Dataset[Tensor]):
    """A dataset of token windows that returns whole batches."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index].long()

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.windows[indices].long()


def make_loader(windows: Tensor, batch_size: int) -> DataLoader[Tensor]:
    """Return a loader of shuffled batches ``[batch_size, length + 1]``."""
    return DataLoader(Windows(windows), batch_size, shuffle=True, drop_last=True, collate_fn=keep_batch)


def keep_batch(batch: Any) -> Any:
    """Return the batch unchanged. The dataset has already collated it."""
    return batch


def _files(name: str, data: Path) -> list[Path]:
    pattern = CORPORA[name]
    if name == "domains":
        return [data / pattern.format(domain=domain) for domain in DOMAINS]
    return [data / pattern.format(split=split) for split in ("train", "valid")]


def _encode(name: str, files: list[Path], vocabulary: int) -> dict[str, list[Tensor]]:
    mixed = name == "domains"
    tokenizer = train_tokenizer(
        (text for file in files[: None if mixed else 1] for text in _documents(file)), vocabulary
    )
    parts = [
        torch.tensor([token for ids in encode_documents(tokenizer, _documents(file)) for token in ids])
        for file in files
    ]
    if not mixed:
        return {"train": parts[:1], "validation": parts[1:]}
    # Use the same number of tokens of each domain, so that the mixture is the mean of the domains.
    size = min(map(len, parts))
    parts = [part[:size] for part in parts]
    cuts = [round((1 - _DOMAIN_VALIDATION) * len(part)) for part in parts]
    return {
        "train": [part[:cut].clone() for part, cut in zip(parts, cuts, strict=True)],
        "validation": [part[cut:].clone() for part, cut in zip(parts, cuts, strict=True)],
    }


def _documents(file: Path) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        if file.name.endswith(".txt.gz"):
            yield lines.read()
            return
        for line in lines:
            yield json.loads(line)["text"]


def _windows(tokens: Tensor, length: int) -> Tensor:
    return tokens.unfold(0, length + 1, length)


def _select_evenly(windows: Tensor, upper_bound: int) -> Tensor:
    used = min(upper_bound, len(windows))
    return windows[torch.arange(used) * len(windows) // used]
