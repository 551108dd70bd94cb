"""The sources of text, the tokenizer, the cache and the DataModule of the example."""

from __future__ import annotations

import gzip
import json
import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import data
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from data import END_OF_TEXT, StreamedWindows, TextDataModule, TokenWindows, encode_documents, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from model import LanguageModel
from text import C4Text, FileText, StdlibText, in_validation
from torch.utils.data import DataLoader

WORDS = ("round", "dispatch", "worker", "global", "model", "push", "staleness", "outer", "step", "of", "the", "a")


def _document(number: int) -> str:
    draw = random.Random(number)
    return f"document {number}: " + " ".join(f"{draw.choice(WORDS)} {draw.randrange(10**6)}" for _ in range(12))


def _write_c4(directory: Path, split: str, files: int, each: int) -> list[str]:
    """Write files in the layout of allenai/c4: gzip-compressed JSON lines with text, timestamp and url."""
    paths = []
    for file in range(files):
        path = directory / f"c4-{split}.{file:05d}-of-{files:05d}.json.gz"
        with gzip.open(path, "wt", encoding="utf-8") as out:
            for number in range(file * each, (file + 1) * each):
                record = {
                    "text": f"{split} {_document(number)}",
                    "timestamp": "2019-04-25T12:57:54Z",
                    "url": f"http://{number}",
                }
                out.write(json.dumps(record) + "\n")
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def c4_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("c4")
    return {split: _write_c4(directory, split, files=4, each=15) for split in ("train", "validation")}


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": _document(number)}) + "\n" for number in range(200)))
    return str(path)


# Sources


def test_split_depends_only_on_the_name_and_has_the_right_share() -> None:
    names = [f"package/module_{number}.py" for number in range(4000)]
    chosen = [name for name in names if in_validation(name, 0.05)]
    assert 140 < len(chosen) < 260
    assert set(chosen) <= {name for name in names if in_validation(name, 0.1)}
    # This result must never change. Otherwise files that a model was trained on could become validation files.
    assert [name for name in names[:60] if in_validation(name, 0.05)] == ["package/module_12.py"]


def test_stdlib_splits_by_file_and_skips_files_without_text(tmp_path: Path) -> None:
    for name in ("os.py", "json/decoder.py", "LICENSE.txt", "test/test_os.py", "site-packages/x.py", "encodings/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "code.so").write_bytes(b"\x7fELF")
    source = StdlibText(0.5, root=tmp_path)
    splits = {split: set(source.documents(split)) for split in ("train", "validation")}
    files = {text for texts in splits.values() for text in texts if text.startswith("content of")}
    assert files == {"content of os.py", "content of json/decoder.py", "content of LICENSE.txt"}
    assert splits["train"].isdisjoint(splits["validation"])


def test_installed_python_has_enough_text() -> None:
    characters = {split: sum(map(len, StdlibText().documents(split))) for split in ("train", "validation")}
    assert characters["train"] > 4_000_000
    assert 0.01 < characters["validation"] / characters["train"] < 0.15


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json.gz"])
def test_files_with_all_suffixes_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    texts = ["first text\n", "second text with an umlaut: ä"]
    content = "".join(texts) if ".txt" in suffix else "\n\n".join(json.dumps({"text": text}) for text in texts)
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    validation = tmp_path / "validation.txt"
    validation.write_text("validation")
    source = FileText([path], [validation])
    assert list(source.documents("train")) == (["".join(texts)] if ".txt" in suffix else texts)
    assert list(source.documents("validation")) == ["validation"]


def test_few_files_are_split_by_document_and_many_by_file(tmp_path: Path, text_file: str) -> None:
    few = FileText([Path(text_file)], validation_share=0.2)
    train, validation = list(few.documents("train")), list(few.documents("validation"))
    assert sorted(train + validation) == sorted(_document(number) for number in range(200))
    assert 20 < len(validation) < 60
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"part_{number}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": f"{number}"}) + "\n" for _ in range(3)))
    many = FileText(paths, validation_share=0.2)
    train, validation = list(many.documents("train")), list(many.documents("validation"))
    assert len(train) + len(validation) == 120
    assert set(train).isdisjoint(validation)
    assert validation


def test_errors_name_the_bad_file(tmp_path: Path, text_file: str) -> None:
    with pytest.raises(ValueError, match=r"train_files=\[\] is empty"):
        FileText([])
    with pytest.raises(FileNotFoundError, match=r"missing\.txt does not exist"):
        FileText([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match=r"paper\.pdf has an unknown suffix"):
        FileText([tmp_path / "paper.pdf"])
    with pytest.raises(ValueError, match="is in train_files and in validation_files"):
        FileText([Path(text_file)], [Path(text_file)])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"body": "no text"}\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl:2: expected a JSON object with a string field 'text'"):
        list(FileText([broken], [Path(text_file)]).documents("train"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shuffle_buffer", [0, 10])
def test_each_c4_document_belongs_to_one_rank(
    c4_files: dict[str, list[str]], world_size: int, shuffle_buffer: int
) -> None:
    assert not torch.distributed.is_initialized()
    source = C4Text(c4_files, shuffle_buffer=shuffle_buffer)
    for epoch in (0, 1):
        parts = [[d["url"] for d in source.stream("train", epoch, rank, world_size)] for rank in range(world_size)]
        assert sorted(url for part in parts for url in part) == sorted(f"http://{number}" for number in range(60))
        assert all(parts)


def test_each_epoch_of_c4_has_a_new_order(c4_files: dict[str, list[str]]) -> None:
    source = C4Text(c4_files, shuffle_buffer=10)
    first, again, second = ([d["url"] for d in source.stream("train", epoch)] for epoch in (0, 0, 1))
    assert first == again
    assert first != second


def test_c4_files_need_both_splits(c4_files: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="has no files for 'validation'"):
        C4Text({"train": c4_files["train"]})


# Tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer((_document(number) for number in range(50)), 300)


@given(text=st.text(max_size=200))
def test_tokenizer_preserves_any_text(tokenizer: Any, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    [ids] = encode_documents(tokenizer, [text])
    assert ids[-1] == tokenizer.token_to_id(END_OF_TEXT)
    assert tokenizer.decode(ids[:-1]) == text


def test_end_of_text_marker_inside_a_text_is_plain_text(tokenizer: Any) -> None:
    [ids] = encode_documents(tokenizer, [f"before {END_OF_TEXT} after"])
    assert ids.count(tokenizer.token_to_id(END_OF_TEXT)) == 1


def test_windows_cover_the_text_and_share_one_token() -> None:
    windows = TokenWindows(np.arange(103, dtype=np.uint16), 10)
    assert len(windows) == 10
    assert torch.equal(windows[0], torch.arange(11))
    assert windows[0][-1] == windows[1][0]
    assert windows[9].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[10]


def test_limited_windows_are_spread_over_the_text() -> None:
    windows = TokenWindows(np.arange(1001, dtype=np.uint16), 10, upper_bound=4)
    assert [int(window[0]) for window in (windows[i] for i in range(len(windows)))] == [0, 250, 500, 750]
    assert len(TokenWindows(np.arange(101, dtype=np.uint16), 10, upper_bound=400)) == 10


def _stream_windows(source: C4Text, tokenizer: Any, rank: int, world_size: int, workers: int = 0) -> list[list[int]]:
    dataset = StreamedWindows(source, tokenizer, 16, rank, world_size)
    return [window.tolist() for window in DataLoader(dataset, batch_size=None, num_workers=workers)]


def test_streamed_windows_contain_the_text_of_the_rank(c4_files: dict[str, list[str]], tokenizer: Any) -> None:
    source = C4Text(c4_files)
    for rank in range(2):
        texts = [document["text"] for document in source.stream("train", 0, rank, 2)]
        tokens = [token for ids in encode_documents(tokenizer, texts) for token in ids]
        windows = _stream_windows(source, tokenizer, rank, 2)
        assert windows == [tokens[start : start + 17] for start in range(0, len(tokens) - 16, 16)]


def test_worker_processes_divide_the_text_of_the_rank(c4_files: dict[str, list[str]], tokenizer: Any) -> None:
    source = C4Text(c4_files)
    undivided, divided = (_stream_windows(source, tokenizer, 0, 2, workers) for workers in (0, 2))
    # Each worker drops at most one incomplete window at its end; no text is read twice.
    assert len(undivided) - 2 <= len(divided) <= len(undivided)
    assert divided != undivided
    assert len({tuple(window) for window in divided}) == len(divided)


# DataModule


def _module(cache: Path, **arguments: Any) -> TextDataModule:
    defaults: dict[str, Any] = {"batch_size": 2, "sequence_length": 16, "vocabulary_size": 300, "source": "files"}
    return TextDataModule(**{**defaults, "cache_directory": str(cache), **arguments})


def test_batches_have_one_token_more_than_the_sequence(tmp_path: Path, text_file: str) -> None:
    module = _module(tmp_path / "cache", train_files=[text_file], validation_batch_size=3, validation_windows=5)
    module.prepare_data()
    module.setup("fit")
    train, validation = list(module.train_dataloader()), list(module.val_dataloader())
    assert {tuple(batch.shape) for batch in train} == {(2, 17)}
    assert [len(batch) for batch in validation] == [3, 2]
    assert max(int(batch.max()) for batch in train) < 300


def test_cache_is_built_once(tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(tmp_path / "cache", train_files=[text_file])
    module.prepare_data()
    monkeypatch.setattr(data, "train_tokenizer", pytest.fail)
    _module(tmp_path / "cache", train_files=[text_file], sequence_length=8).prepare_data()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [module.cache.name]


def test_cache_depends_on_text_split_and_vocabulary(tmp_path: Path, text_file: str) -> None:
    before = _module(tmp_path, train_files=[text_file]).cache
    assert _module(tmp_path, train_files=[text_file], vocabulary_size=301).cache != before
    assert _module(tmp_path, train_files=[text_file], validation_share=0.1).cache != before
    Path(text_file).write_text(Path(text_file).read_text() + '{"text": "more"}\n')
    assert _module(tmp_path, train_files=[text_file]).cache != before


def test_failed_build_leaves_no_files(tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tokenizer: Any, documents: Iterable[str]) -> Any:
        raise OSError("no space left on device")

    module = _module(tmp_path / "cache", train_files=[text_file])
    monkeypatch.setattr(data, "encode_documents", fail)
    with pytest.raises(OSError, match="no space left"):
        module.prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []


def test_runs_can_build_the_same_cache_at_the_same_time(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_built = threading.Barrier(2, timeout=60)
    build = TextDataModule._build

    def build_together(module: TextDataModule, directory: Path) -> None:
        build(module, directory)
        both_built.wait()

    monkeypatch.setattr(TextDataModule, "_build", build_together)
    modules = [_module(tmp_path / "cache", train_files=[text_file]) for _ in range(2)]
    errors: list[BaseException] = []

    def prepare(module: TextDataModule) -> None:
        try:
            module.prepare_data()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare, args=(module,)) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [modules[0].cache.name]
    modules[1].setup("fit")


def test_environment_variables_set_the_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNC_LOCALSGD_CACHE", str(tmp_path / "chosen"))
    assert TextDataModule().cache_root == tmp_path / "chosen"
    monkeypatch.delenv("ASYNC_LOCALSGD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert TextDataModule().cache_root == tmp_path / "xdg" / "lightning_async_localsgd"


def test_too_little_text_is_rejected(tmp_path: Path, text_file: str) -> None:
    module = _module(tmp_path / "cache", train_files=[text_file], sequence_length=100_000)
    module.prepare_data()
    with pytest.raises(ValueError, match="fewer than one window of sequence_length=100000"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"validation_batch_size": 0}, "validation_batch_size=0"),
        ({"validation_windows": 0}, "validation_windows=0"),
        ({"vocabulary_size": 256}, "vocabulary_size=256 must be at least 257"),
        ({"validation_share": 1.0}, "validation_share=1.0"),
        ({"source": "wikipedia"}, "source='wikipedia' is unknown; choose stdlib, files or c4"),
        ({"source": "files"}, r"train_files=\[\] is empty"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(**arguments)


def test_model_trains_on_c4_files(tmp_path: Path, c4_files: dict[str, list[str]]) -> None:
    module = _module(
        tmp_path / "cache", source="c4", c4_data_files=c4_files, c4_tokenizer_documents=20, c4_validation_documents=10
    )
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(LanguageModel(vocabulary_size=300, sequence_length=16), datamodule=module)
    assert trainer.global_step == 4
    assert isinstance(module.train_data, StreamedWindows)
    [result] = trainer.validate(trainer.lightning_module, datamodule=module, verbose=False)
    assert result["val/perplexity"] > 1
