"""The command line of the example with each configuration and a small budget."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model import LanguageModel

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "language_model"
CONFIGS = {
    name: yaml.safe_load((EXAMPLE / "configs" / f"{name}.yaml").read_text())
    for name in ("async", "ddp", "diloco", "single", "simulated")
}
# Seconds per step of the emulated devices in arXiv 2401.09135.
PAPER_SECONDS = (0.58, 0.75, 1.51, 3.33)


def _seconds_per_step(config: dict[str, Any]) -> list[float]:
    if config is CONFIGS["simulated"]:
        simulated: list[float] = config["trainer"]["strategy"]["init_args"]["seconds_per_step"]
        return simulated
    [devices] = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("EmulatedDevices")]
    seconds: list[float] = devices["init_args"]["seconds_per_step"]
    return seconds


def _run(arguments: list[str], directory: Path, timeout: float = 240.0) -> str:
    """Run ``train.py`` in ``directory``, and kill all of its processes at the end."""
    command = [sys.executable, str(EXAMPLE / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with (directory / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    assert code == 0, text
    return text


@pytest.mark.parametrize("name", list(CONFIGS))
def test_configuration_trains_and_reports(name: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w") as out:
        for path in sorted(EXAMPLE.glob("*.py")):
            for part in path.read_text().split("\n\n"):
                out.write(json.dumps({"text": part}) + "\n")
    arguments = ["fit", "--config", str(EXAMPLE / "configs" / f"{name}.yaml")]
    arguments += ["--trainer.max_steps=8", "--trainer.val_check_interval=4", "--data.validation_windows=8"]
    arguments += ["--data.source=files", f"--data.train_files=[{corpus}]", "--data.vocabulary_size=300"]
    arguments += [f"--data.cache_directory={tmp_path / 'cache'}", "--data.validation_share=0.2"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=2"]
    if name == "diloco":
        arguments += ["--trainer.strategy.init_args.local_steps=4"]
    text = _run(arguments, tmp_path)
    assert re.search(r"validation perplexity \d+\.\d\d \(loss \d\.\d{4}\)", text), text
    [checkpoint] = re.findall(r"checkpoint (\S+\.ckpt)", text)
    model = LanguageModel.load_from_checkpoint(tmp_path / checkpoint)
    assert model.transformer.embedding.num_embeddings == 300
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    metrics = next((tmp_path / "runs").rglob("metrics.csv")).read_text()
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(metrics.splitlines()[0].split(","))
    assert next((tmp_path / "runs").rglob("config.yaml")).is_file()


def test_configurations_have_equal_budgets_data_and_models() -> None:
    budgets = {
        name: c["trainer"]["max_steps"] * len(_seconds_per_step(c)) * c["data"]["batch_size"]
        for name, c in CONFIGS.items()
    }
    assert len(set(budgets.values())) == 1
    for name in ("ddp", "diloco", "single", "simulated"):
        assert CONFIGS[name]["data"] == CONFIGS["async"]["data"]
        assert CONFIGS[name]["model"] == CONFIGS["async"]["model"]
        assert CONFIGS[name]["seed_everything"] == CONFIGS["async"]["seed_everything"]
    for name in ("ddp", "diloco", "simulated"):
        assert _seconds_per_step(CONFIGS[name]) == _seconds_per_step(CONFIGS["async"])
    assert _seconds_per_step(CONFIGS["single"]) == _seconds_per_step(CONFIGS["async"])[:1]


def test_emulated_devices_have_the_relative_speeds_of_the_paper() -> None:
    seconds = _seconds_per_step(CONFIGS["async"])
    assert [value / seconds[0] for value in seconds] == pytest.approx(
        [value / PAPER_SECONDS[0] for value in PAPER_SECONDS], rel=0.01
    )
