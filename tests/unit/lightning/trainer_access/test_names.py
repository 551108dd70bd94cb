"""Lightning's private names: where they may be used, and that both of Lightning's packages have them.

The other tests of this folder run each function of ``trainer_access`` with real Trainers. If a Lightning release
changes a private name, one of them fails first.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_async_localsgd.lightning as ours
from tests.lightning_models import EMAWeightAveraging

FOLDER = Path(ours.__file__).parent
ACCESS = FOLDER / "trainer_access"

OF_TORCH = {"_last_lr", "_schedule_phases", "_schedulers", "_version"}
"""Attributes of torch's schedulers and tensors that have no public name."""

OVERRIDDEN = {
    "strategies.DDPStrategy()": {
        "_configure_launcher", "_get_process_group_backend", "_launcher", "_process_group_backend", "_setup_model",
        "_start_method", "_timeout",
    },
    "loops.fetchers._DataFetcher()": {"_start_profiler", "_stop_profiler"},
    "strategies.launchers.multiprocessing._MultiProcessingLauncher(None)": {
        "_recover_results_in_main_process", "_wrapping_function",
    },
    "strategies.launchers.subprocess_script._SubprocessScriptLauncher(None, 1, 1)": {"_call_children_scripts"},
    "Trainer(logger=False)._logger_connector": {"_first_loop_iter"},
}  # fmt: skip
"""Private names of Lightning's classes that our subclasses and mixins override, or read through ``self``."""

NAMES = {
    "callbacks.ModelCheckpoint()": {
        "_every_n_epochs", "_every_n_train_steps", "_find_last_checkpoints", "_last_global_step_saved",
    },
    "callbacks.StochasticWeightAveraging(0.1)": {"_model_contains_batch_norm"},
    "callbacks.EMAWeightAveraging()": {"_average_model"},
    "demos.boring_classes.BoringModel()": {"_trainer"},
    "loops.fetchers": {"_DataFetcher", "_DataLoaderIterDataFetcher", "_PrefetchDataFetcher"},
    "overrides.distributed": {"_sync_module_states"},
    "strategies.DDPStrategy()": {"_layer_sync"},
    "strategies.launchers.launcher": {"_Launcher"},
    "strategies.launchers.multiprocessing": {"_GlobalStateSnapshot", "_MultiProcessingLauncher"},
    "strategies.launchers.subprocess_script": {"_HYDRA_AVAILABLE", "_SubprocessScriptLauncher"},
    "trainer.call": {"_call_lightning_module_hook", "_interrupt"},
    "trainer.connectors.logger_connector.result": {"_METRICS", "_Metadata", "_ResultCollection", "_ResultMetric"},
    "Trainer(logger=False)": {
        "_accelerator_connector", "_checkpoint_connector", "_data_connector", "_fit_impl", "_logger_connector",
        "_teardown",
    },
    "Trainer(logger=False)._checkpoint_connector": {"_ckpt_path", "_hpc_resume_path", "_loaded_checkpoint"},
    "Trainer(logger=False)._data_connector": {"_prepare_dataloader"},
    "Trainer(logger=False)._logger_connector": {
        "_callback_metrics", "_first_loop_iter", "_logged_metrics", "_progress_bar_metrics",
    },
    "Trainer(logger=False).fit_loop": {
        "_can_stop_early", "_combined_loader", "_data_fetcher", "_data_source", "_should_accumulate",
    },
    "Trainer(logger=False).fit_loop.epoch_loop": {
        "_batches_that_stepped", "_num_ready_batches_reached", "_results", "_should_accumulate", "_should_check_val_fx",
        "_update_learning_rates",
    },
    "Trainer(logger=False).fit_loop.epoch_loop.automatic_optimization": {"_make_zero_grad_fn"},
    "trainer.connectors.logger_connector.result._ResultMetric(_Metadata('f', 'x'), True)": {
        "_forward_cache", "_update_count",
    },
    "tuner.batch_size_scaling": {"_scale_batch_size"},
    "tuner.lr_finder": {"_LRCallback"},
    "utilities.combined_loader.CombinedLoader([])": {"_iterator", "_mode"},
    "fabric.strategies.launchers.multiprocessing": {"_check_bad_cuda_fork", "_check_missing_main_guard"},
    "fabric.strategies.launchers.subprocess_script": {"_basic_subprocess_cmd", "_hydra_subprocess_cmd"},
    "fabric.utilities.distributed": {"_set_num_threads_if_needed"},
    "fabric.utilities.imports": {"_IS_INTERACTIVE"},
}  # fmt: skip
"""The private names that trainer_access uses, by their owners in ``lightning.pytorch``."""


SET = {"_last_val_time"}
"""Private attributes that trainer_access only sets. Older releases of Lightning do not have them."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a module imports from Lightning, or reads of objects that are not its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(("lightning.", "lightning_utilities.")):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                yield node.attr


def modules() -> list[Path]:
    paths = sorted(FOLDER.rglob("*.py"))
    return [path for path in paths if not path.is_relative_to(ACCESS)]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(FOLDER)))
def test_only_trainer_access_uses_private_names(path: Path) -> None:
    assert set(private_names(ast.parse(path.read_text()))) <= OF_TORCH


def test_all_private_names_of_trainer_access_are_listed_here() -> None:
    names: set[str] = set()
    for path in ACCESS.glob("*.py"):
        tree = ast.parse(path.read_text())
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        names |= {*private_names(tree), *(text for text in texts if isinstance(text, str) and is_private(text))}
    assert names == set().union(SET, *NAMES.values())


def test_all_inherited_private_names_are_listed_here() -> None:
    """Names that are read through ``self`` and that no class of the folder defines are Lightning's."""
    used: set[str] = set()
    defined: set[str] = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
    listed = set().union(*OVERRIDDEN.values())
    assert {name for name in used - defined - OF_TORCH if is_private(name)} <= listed
    assert listed <= used | defined


@pytest.mark.parametrize(
    ("package", "fabric"), [("lightning.pytorch", "lightning.fabric"), ("pytorch_lightning", "lightning_fabric")]
)
def test_both_packages_of_lightning_have_the_private_names(package: str, fabric: str) -> None:
    for owner, names in [*NAMES.items(), *OVERRIDDEN.items()]:
        path, parenthesis, arguments = owner.partition("(")
        where = f"{package}.{path}".replace(f"{package}.fabric", fabric)
        if parenthesis:
            home, _, kind = where.rpartition(".")
            found = vars(importlib.import_module(home))
            if kind == "EMAWeightAveraging" and EMAWeightAveraging is None:
                continue
            instance = eval(f"{kind}({arguments}", dict(found))
        else:
            instance = importlib.import_module(where)
        for name in names:
            assert hasattr(instance, name), f"{package}: {owner} has no {name}"


def test_every_function_has_a_test_in_this_folder() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")]
    used = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for path in ACCESS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not is_private(node.name):
                assert node.name in used, f"{path.name}: {node.name}"
