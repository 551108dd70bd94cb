"""Command line of the example: ``python train.py fit --config configs/async.yaml``.

The strategy is chosen by the configuration alone; nothing here, in ``model.py`` or in ``data.py`` depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from data import TextDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from model import LanguageModel
from typing_extensions import override


class LanguageModelCLI(LightningCLI):
    """Model and data from one configuration; after ``fit`` it validates the final model."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocabulary_size", "model.vocabulary_size")
        parser.link_arguments("data.sequence_length", "model.sequence_length")

    def after_fit(self) -> None:
        """Validates the model that training left behind; ``LightningCLI`` calls this on every rank."""
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
    """Runs the command line."""
    LanguageModelCLI(LanguageModel, TextDataModule, seed_everything_default=0)


if __name__ == "__main__":
    main()
