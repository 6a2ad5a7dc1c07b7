"""Importing flexpg is quick, quiet and free of side effects, and its files import in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flexpg

PACKAGE = Path(flexpg.__file__).parent
ORDER = [
    "scalars",
    "rollouts",
    "tree",
    "analysis.flops",
    "packing",
    "masks",
    "backends.dense",
    "backends.flex",
    "backends.split",
    "backends",
    "prefix_cache",
    "logprobs",
    "losses",
    "sample_cache",
    "sampling",
    "training.rewards",
    "training.metrics",
    "conversations",
    "analysis.rollout_files",
    "analysis.report",
    "analysis.plots",
    "training.tasks",
    "training.distributed",
    "training.checkpoints",
    "training.failures",
    "integrations",
    "analysis",
    "training",
    "layer_hooks",
    "verify",
    "__main__",
]
INTEGRATED = {"torchtune", "transformers", "trl"}  # each imported by flexpg/integrations/<its name>*.py alone
STANDS_ON = {"trl": {"transformers"}}  # whose trainers are transformers' Trainer

ALONE = """
import os, sys, time
import numpy, torch
environment = dict(os.environ)
start = time.perf_counter()
import flexpg
seconds = time.perf_counter() - start
import flexpg.training.rewards, flexpg.training.tasks
assert dict(os.environ) == environment, "changed environment variables"
unwanted = {"torchtune", "torchao", "transformers", "trl", "matplotlib", "rich", "datasets"} & set(sys.modules)
assert not unwanted, unwanted
assert "torch._inductor.compile_fx" not in sys.modules, "loaded the compiler"
assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
assert seconds < 1, seconds
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def rank(module: str) -> int:
    """The place of a module in the order; a module of a package that is not listed has its package's."""
    while module not in ORDER:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} has no place in the order"
    return ORDER.index(module)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_importing_flexpg_needs_torch_and_numpy_alone_and_leaves_no_trace():
    result = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_only_from_files_above_it(path):
    own = module_name(path)
    for name in imported(path):
        assert name != "flexpg", f"{own} imports from the package root"
        if name.startswith("flexpg."):
            other = name.removeprefix("flexpg.")
            assert rank(other) < rank(own) or (rank(other) == rank(own) and other.startswith(own.split(".")[0] + "."))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_package_is_imported_by_its_integration_alone(path):
    packages = {name.split(".")[0] for name in imported(path)} & INTEGRATED
    own = module_name(path)
    integrated = own.split(".")[-1].split("_")[0]
    allowed = {integrated, *STANDS_ON.get(integrated, ())} if own.startswith("integrations.") else set()
    assert packages <= allowed


RUN_TEXT = {"eval", "exec", "compile", "__import__"}  # as builtins
READ_PICKLES = {"checkpoints"}  # by an unpickler of its own, which makes no object of another kind


@pytest.mark.parametrize(
    "path", [*FILES, *sorted((PACKAGE.parent / "recipes").glob("*.py"))], ids=lambda path: path.stem
)
def test_no_text_is_run_and_no_pickle_is_read(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.func.id for call in calls if isinstance(call.func, ast.Name) and call.func.id in RUN_TEXT]
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "load":
            module = ast.unparse(call.func.value)
            assert module not in {"yaml", "joblib", "marshal", "shelve"}
            assert module != "pickle" or path.stem in READ_PICKLES
            assert module != "torch" or {"weights_only"} <= {option.arg for option in call.keywords}
    if path.stem not in READ_PICKLES:
        assert not imported(path) & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


def test_every_public_name_exists_and_is_listed_once():
    assert len(set(flexpg.__all__)) == len(flexpg.__all__)
    for name in flexpg.__all__:
        assert getattr(flexpg, name) is not None
    assert {"PrefixTree", "block_mask", "attention", "token_logprobs", "Rollouts", "grpo_loss", "sample"} <= set(
        flexpg.__all__
    )
