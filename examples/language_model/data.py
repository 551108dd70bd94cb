"""Token windows of text: tokenizer, cache and LightningDataModule."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from text import C4Text, FileText, Split, StdlibText, TextSource
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# Part of the cache key. Increase it when the same text gives different files.
CACHE_FORMAT = 1
# A byte-level tokenizer needs all 256 bytes and the end-of-text token.
MIN_VOCABULARY = 257
_ENCODE_BATCH = 64


def default_cache_directory() -> Path:
    """Return ``$ASYNC_LOCALSGD_CACHE`` if set, else a directory below ``$XDG_CACHE_HOME`` (default ``~/.cache``)."""
    chosen = os.environ.get("ASYNC_LOCALSGD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_async_localsgd"


def train_tokenizer(documents: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with at most ``vocabulary_size`` tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    # The end-of-text marker inside of a text must not end the document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield the tokens of each document, followed by an end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"The tokenizer has no token {END_OF_TEXT}: train it with train_tokenizer")
    stream = iter(documents)
    while batch := list(itertools.islice(stream, _ENCODE_BATCH)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield [*encoding.ids, end]


class TokenWindows(Dataset[Tensor]):
    """Windows of ``sequence_length + 1`` tokens of one long text.

    Neighboring windows share one token: the last target of a window is the first input of the next window.

    Args:
        tokens: the text.
        sequence_length: tokens to predict in each window.
        upper_bound: largest number of windows. They are spread evenly over the text. ``None`` uses all windows.

    """

    def __init__(self, tokens: np.ndarray[Any, Any], sequence_length: int, upper_bound: int | None = None) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.available = max(0, len(tokens) - 1) // sequence_length
        self.used = self.available if upper_bound is None else min(upper_bound, self.available)

    def __len__(self) -> int:
        return self.used

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.used:
            raise IndexError(f"Window {index} does not exist: there are {self.used} windows")
        start = index * self.available // self.used * self.sequence_length
        window = self.tokens[start : start + self.sequence_length + 1]
        return torch.from_numpy(window.astype(np.int64))


class StreamedWindows(IterableDataset[Tensor]):
    """The windows of one rank's share of C4, tokenized while the stream is read.

    Each iteration is a new epoch with a new shuffling of the stream. In worker processes of a DataLoader, each
    iteration uses the shuffling of the first epoch.

    Args:
        source: the stream.
        tokenizer: encodes the documents.
        sequence_length: tokens to predict in each window.
        rank: of this process.
        world_size: number of ranks.

    """

    def __init__(self, source: C4Text, tokenizer: Tokenizer, sequence_length: int, rank: int, world_size: int) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def __iter__(self) -> Iterator[Tensor]:
        stream = self.source.stream("train", self.epoch, self.rank, self.world_size)
        self.epoch += 1
        size = self.sequence_length + 1
        buffer: list[int] = []
        for ids in encode_documents(self.tokenizer, (document["text"] for document in stream)):
            buffer.extend(ids)
            start = 0
            while len(buffer) - start >= size:
                yield torch.tensor(buffer[start : start + size])
                start += size - 1
            buffer = buffer[start:]


class TextDataModule(pl.LightningDataModule):
    """Token windows of real text for next-token prediction.

    Args:
        source: ``stdlib`` (the sources and documentation of the installed Python, no download), ``files`` (your own
            text files or JSON lines) or ``c4`` (``allenai/c4`` "en" as a stream, sharded by rank).
        batch_size: windows per batch and rank.
        sequence_length: tokens to predict in each window.
        validation_batch_size: windows per batch and rank in validation; default is ``batch_size``.
        validation_windows: number of validation windows, spread evenly over the validation text; default is all.
        vocabulary_size: number of tokens of the byte-level BPE tokenizer, at least 257.
        train_files: for ``files``: training files, ``.jsonl`` or ``.txt``, plain or with ``.gz``.
        validation_files: for ``files``: validation files. By default a share of ``train_files`` is used for validation.
        validation_share: the share of the text for validation, for ``stdlib`` and for ``files`` without
            ``validation_files``.
        c4_data_files: for ``c4``: files in the layout of C4 that replace those of the hub, as a mapping with the keys
            ``train`` and ``validation``.
        c4_tokenizer_documents: for ``c4``: number of documents at the start of the stream that train the tokenizer.
        c4_validation_documents: for ``c4``: number of documents of the validation split that are used.
        c4_shuffle_buffer: for ``c4``: number of documents from which the next one is drawn at random; 0 keeps the
            stored order.
        seed: seed of the shuffling of C4. The other sources use the seed of ``seed_everything``.
        cache_directory: for tokenizer and tokens; default is ``$ASYNC_LOCALSGD_CACHE``, else
            ``~/.cache/lightning_async_localsgd``.
        num_workers: worker processes of each DataLoader.

    """

    def __init__(
        self,
        source: Literal["stdlib", "files", "c4"] = "stdlib",
        batch_size: int = 8,
        sequence_length: int = 256,
        validation_batch_size: int | None = None,
        validation_windows: int | None = None,
        vocabulary_size: int = 2048,
        train_files: list[str] | None = None,
        validation_files: list[str] | None = None,
        validation_share: float = 0.05,
        c4_data_files: dict[str, list[str]] | None = None,
        c4_tokenizer_documents: int = 20_000,
        c4_validation_documents: int = 1_000,
        c4_shuffle_buffer: int = 10_000,
        seed: int = 0,
        cache_directory: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        counts: dict[str, int | None] = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "validation_batch_size": validation_batch_size,
            "validation_windows": validation_windows,
            "c4_tokenizer_documents": c4_tokenizer_documents,
            "c4_validation_documents": c4_validation_documents,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if vocabulary_size < MIN_VOCABULARY:
            raise ValueError(
                f"vocabulary_size={vocabulary_size} must be at least {MIN_VOCABULARY} (256 bytes and end of text)"
            )
        if c4_shuffle_buffer < 0:
            raise ValueError(f"c4_shuffle_buffer={c4_shuffle_buffer} must not be negative")
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share={validation_share} must be between 0 and 1")
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.validation_batch_size = validation_batch_size or batch_size
        self.validation_windows = validation_windows
        self.vocabulary_size = vocabulary_size
        self.c4_tokenizer_documents = c4_tokenizer_documents
        self.c4_validation_documents = c4_validation_documents
        self.num_workers = num_workers
        self.text: TextSource
        if source == "stdlib":
            self.text = StdlibText(validation_share)
        elif source == "files":
            self.text = FileText(
                [Path(path) for path in train_files or ()],
                [Path(path) for path in validation_files or ()],
                validation_share,
            )
        elif source == "c4":
            self.text = C4Text(c4_data_files, c4_shuffle_buffer, seed)
        else:
            raise ValueError(f"source={source!r} is unknown; choose stdlib, files or c4")
        self.cache_root = Path(cache_directory).expanduser() if cache_directory else default_cache_directory()
        self.train_data: TokenWindows | StreamedWindows | None = None
        self.validation_data: TokenWindows | None = None

    @property
    def cache(self) -> Path:
        """The cache directory of this text, vocabulary size and format."""
        key: dict[str, Any] = {
            "format": CACHE_FORMAT,
            "vocabulary_size": self.vocabulary_size,
            **self.text.identity(),
        }
        if isinstance(self.text, C4Text):
            key["documents"] = [self.c4_tokenizer_documents, self.c4_validation_documents]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.cache_root / f"{key['source']}-{self.vocabulary_size}-{digest[:16]}"

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the text. Runs with the same text and vocabulary size share the result."""
        cache = self.cache
        if cache.is_dir():
            return
        log.info("tokenizing the text of source=%s into %s", self.text.identity()["source"], cache)
        self.cache_root.mkdir(parents=True, exist_ok=True)
        # Build under another name and rename at the end, so that a killed run does not leave an incomplete cache.
        building = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=self.cache_root))
        try:
            self._build(building)
            try:
                building.rename(cache)
            except OSError:
                if not cache.is_dir():  # Otherwise another run has built the same files in the meantime.
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _build(self, directory: Path) -> None:
        streamed = isinstance(self.text, C4Text)
        sample = self.text.documents("train")
        tokenizer = train_tokenizer(
            itertools.islice(sample, self.c4_tokenizer_documents) if streamed else sample, self.vocabulary_size
        )
        tokenizer.save(str(directory / "tokenizer.json"))
        dtype = np.uint16 if self.vocabulary_size <= 2**16 else np.uint32
        splits: tuple[Split, ...] = ("validation",) if streamed else ("train", "validation")
        for split in splits:
            documents = self.text.documents(split)
            if streamed:
                documents = itertools.islice(documents, self.c4_validation_documents)
            with (directory / f"{split}.bin").open("wb") as file:
                for ids in encode_documents(tokenizer, documents):
                    np.asarray(ids, dtype=dtype).tofile(file)

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that ``prepare_data`` has cached."""
        tokenizer = Tokenizer.from_file(str(self.cache / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def setup(self, stage: str) -> None:
        """Open the cached tokens and, for C4, the stream of this rank."""
        self.validation_data = self._windows("validation")
        if stage != "fit":
            return
        if isinstance(self.text, C4Text):
            rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
            self.train_data = StreamedWindows(self.text, self.load_tokenizer(), self.sequence_length, rank, world_size)
        else:
            self.train_data = self._windows("train")

    def _windows(self, split: Split) -> TokenWindows:
        path = self.cache / f"{split}.bin"
        dtype = np.uint16 if self.vocabulary_size <= 2**16 else np.uint32
        empty = path.stat().st_size == 0
        tokens = np.zeros(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        windows = TokenWindows(tokens, self.sequence_length, self.validation_windows if split == "validation" else None)
        if len(windows) == 0:
            raise ValueError(
                f"The {split} split has {len(tokens)} tokens, fewer than one window of sequence_length="
                f"{self.sequence_length}: add text, or change validation_share or sequence_length"
            )
        return windows

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return a loader of shuffled windows. Lightning adds the sampler that divides them between ranks."""
        assert self.train_data is not None
        return DataLoader(
            self.train_data,
            batch_size=self.batch_size,
            shuffle=isinstance(self.train_data, TokenWindows),
            num_workers=self.num_workers,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return a loader of the validation windows in order."""
        assert self.validation_data is not None
        return DataLoader(self.validation_data, batch_size=self.validation_batch_size, num_workers=self.num_workers)
