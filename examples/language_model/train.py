"""Command line of the example: ``python train.py fit --config configs/async.yaml``.

The configuration selects the strategy. This file, ``model.py`` and ``data.py`` do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from data import TextDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from model import LanguageModel
from typing_extensions import override


class LanguageModelCLI(LightningCLI):
    """Creates model and data from one configuration, and validates the final model after ``fit``."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocabulary_size", "model.vocabulary_size")
        parser.link_arguments("data.sequence_length", "model.sequence_length")

    def after_fit(self) -> None:
        """Validate the final model. ``LightningCLI`` calls this method on every rank."""
        results = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self._report(results[0])

    @rank_zero_only
    def _report(self, result: Mapping[str, float]) -> None:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"\nFinal model, {parameters:,} parameters:")
        print(f"  validation perplexity {result['val/perplexity']:.2f} (loss {result['val/loss']:.4f})")
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "")
        print(f"  checkpoint {path}" if path else "  no checkpoint was written", flush=True)


def main() -> None:
    """Run the command line."""
    LanguageModelCLI(LanguageModel, TextDataModule, seed_everything_default=0)


if __name__ == "__main__":
    main()
