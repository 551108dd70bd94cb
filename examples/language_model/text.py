"""Sources of text: the sources and documentation of Python, files, or C4.

A source yields the documents of a split. It does not depend on tokens, ranks or Lightning.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Split = Literal["train", "validation"]

# Tests are repetitive, encodings are tables of numbers, and site-packages is not part of Python. The help topics in
# pydoc_data are one large literal of prose, and are read as prose instead.
SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "dist-packages", "test", "tests"}
)
TEXT_SUFFIXES = frozenset({".py", ".rst", ".txt"})
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".txt.gz")


def in_validation(name: str, share: float) -> bool:
    """Return whether the document or file ``name`` belongs to the validation split.

    The result depends only on the name. It is therefore the same on all machines, and does not change when other files
    are added or removed.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class TextSource(Protocol):
    """A source of documents in two splits. The order of the documents is fixed."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of one split."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return everything on which the text depends. Equal identities mean equal text."""
        ...


class StdlibText:
    """The sources and documentation of the installed Python: about 13 MB, no download.

    Args:
        validation_share: share of the files for validation.
        root: directory of the standard library; ``None`` uses that of the running interpreter.

    """

    def __init__(self, validation_share: float = 0.05, root: Path | None = None) -> None:
        self.validation_share = validation_share
        self.root = Path(sysconfig.get_path("stdlib")) if root is None else root

    def documents(self, split: Split) -> Iterator[str]:
        """Yield source files in the order of their paths, then the topics of Python's interactive help."""
        is_validation = split == "validation"
        for name in self._files():
            if in_validation(name.as_posix(), self.validation_share) == is_validation:
                text = (self.root / name).read_text(encoding="utf-8", errors="replace")
                if text.strip():
                    yield text
        for topic, text in sorted(self._help_topics().items()):
            if in_validation(f"help/{topic}", self.validation_share) == is_validation:
                yield text

    def _files(self) -> list[Path]:
        names = []
        for directory, subdirectories, files in os.walk(self.root):
            subdirectories[:] = [name for name in subdirectories if name not in SKIPPED_DIRECTORIES]
            parent = Path(directory).relative_to(self.root)
            names += [parent / file for file in files if Path(file).suffix in TEXT_SUFFIXES]
        return sorted(names)

    def _help_topics(self) -> Mapping[str, str]:
        try:
            from pydoc_data.topics import topics
        except ImportError:  # Some distributions of Python do not contain the help.
            return {}
        return dict(topics)

    def identity(self) -> dict[str, Any]:
        """Return the Python release, its directory and the split."""
        return {
            "source": "stdlib",
            "python": sys.version,
            "root": str(self.root),
            "validation_share": self.validation_share,
        }


class FileText:
    """Documents in text files and JSON lines, plain or compressed with gzip.

    A ``.txt`` file is one document; each line of a ``.jsonl`` file is an object whose ``text`` is a document.

    Args:
        train: training files.
        validation: validation files. By default a share of ``train`` is used for validation: a share of the files if
            there are at least 20, otherwise a share of the documents.
        validation_share: the share for validation.

    Raises:
        ValueError: no file is given, a file has an unknown suffix, or a file is given for both splits.
        FileNotFoundError: a file does not exist.

    """

    # With fewer files, a share of about 5 % could contain no file.
    _FILES_FOR_SPLIT_BY_FILE = 20

    def __init__(self, train: Sequence[Path], validation: Sequence[Path] = (), validation_share: float = 0.05) -> None:
        if not train:
            raise ValueError("train_files=[] is empty: source=files needs at least one .jsonl or .txt file to train on")
        self.train = sorted(Path(path).resolve() for path in train)
        self.validation = sorted(Path(path).resolve() for path in validation)
        self.validation_share = validation_share
        for path in (*self.train, *self.validation):
            if not path.name.endswith(FILE_SUFFIXES):
                raise ValueError(f"{path} has an unknown suffix: use {', '.join(FILE_SUFFIXES)}")
            if not path.is_file():
                raise FileNotFoundError(f"The text file {path} does not exist")
        common = set(self.train).intersection(self.validation)
        if common:
            raise ValueError(f"{min(common)} is in train_files and in validation_files: remove it from one of them")

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents in the order of the paths of their files."""
        if self.validation:
            for path in self.train if split == "train" else self.validation:
                yield from _read(path)
            return
        is_validation = split == "validation"
        by_file = len(self.train) >= self._FILES_FOR_SPLIT_BY_FILE
        for path in self.train:
            if by_file:
                if in_validation(path.name, self.validation_share) == is_validation:
                    yield from _read(path)
                continue
            for number, text in enumerate(_read(path)):
                if in_validation(f"{path.name}:{number}", self.validation_share) == is_validation:
                    yield text

    def identity(self) -> dict[str, Any]:
        """Return paths, sizes and modification times of the files, and the split."""
        return {
            "source": "files",
            "train": [_stamp(path) for path in self.train],
            "validation": [_stamp(path) for path in self.validation],
            "validation_share": self.validation_share,
        }


class C4Text:
    """C4 (``allenai/c4``, configuration ``en``) as a stream, through Hugging Face ``datasets``.

    Args:
        data_files: files that replace those of the hub, in the same layout (gzip-compressed JSON lines with a field
            ``text``), as a mapping from the split name to paths.
        shuffle_buffer: number of documents from which the next one is drawn at random; 0 keeps the stored order.
        seed: seed of the shuffling.

    """

    def __init__(
        self, data_files: Mapping[str, Sequence[str]] | None = None, shuffle_buffer: int = 0, seed: int = 0
    ) -> None:
        for split in ("train", "validation"):
            if data_files is not None and not data_files.get(split):
                raise ValueError(f"c4_data_files has no files for {split!r}: it needs the keys train and validation")
        self.data_files = None if data_files is None else {k: [str(p) for p in v] for k, v in data_files.items()}
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed

    def stream(self, split: Split, epoch: int = 0, rank: int = 0, world_size: int = 1) -> Any:
        """Return the documents of ``rank`` as a ``datasets.IterableDataset``.

        Does not need a process group. Each document belongs to exactly one rank. In the worker processes of a
        DataLoader, ``datasets`` divides the files of the rank further.
        """
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node

        if self.data_files is None:
            stream = load_dataset("allenai/c4", "en", split=split, streaming=True)
        else:
            stream = load_dataset("json", data_files=self.data_files, split=split, streaming=True)
        if split == "train" and self.shuffle_buffer:
            # Shuffle before the split, so that all ranks use the same order of the files.
            stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        stream = split_dataset_by_node(stream, rank=rank, world_size=world_size)
        stream.set_epoch(epoch)
        return stream

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of all ranks."""
        for document in self.stream(split):
            yield document["text"]

    def identity(self) -> dict[str, Any]:
        """Return the files that replace those of the hub, if any."""
        files = None
        if self.data_files is not None:
            files = {
                split: [_stamp(Path(path)) if Path(path).is_file() else path for path in paths]
                for split, paths in self.data_files.items()
            }
        return {"source": "c4", "data_files": files}


def _read(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        if path.name.removesuffix(".gz").endswith(".txt"):
            text = file.read()
            if text.strip():
                yield text
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"{path}:{number}: expected a JSON object with a string field 'text'")
            yield record["text"]


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
