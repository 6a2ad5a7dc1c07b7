"""`import flexpg` is fast and has no side effects, imports run in one direction, and nothing evaluates text."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flexpg

PACKAGE = Path(flexpg.__file__).parent
ORDER = [  # a module imports only from those before it; a package that is listed as a whole also from itself
    *(
        "processor_layouts",
        "prompt_inputs",
        "token_sequences",
        "tree",
        "masks",
        "backends.dense",
        "backends.flex",
        "backends.split",
        "backends.dispatch",
        "backends",
    ),
    *("collectives", "context_parallel", "prefix_cache", "packed_input", "rollout_checks", "rollouts", "advantages"),
    *("conversations.response_items", "conversations.messages", "conversations.left_out", "conversations.turn_texts"),
    *("conversations.chat_template", "conversations.rollouts", "conversations.row_files", "conversations.transcripts"),
    *("conversations", "micro_batches", "packing"),
    *("logprobs", "loss_terms", "losses", "sample_cache", "sampling"),
    *("layer_hooks", "integrations.fsdp", "integrations.framework", "integrations.packed_loop", "integrations.samples"),
    "integrations",
    *("integrations.torchtune", "integrations.transformers", "integrations.trl", "integrations.vllm"),
    *("verify", "analysis", "training", "__main__"),
]
DISPATCH = {("integrations.framework", f"integrations.{name}") for name in ("torchtune", "transformers")}
RECIPE_MODELS = ("training.causal_lm", "training.quantization", "training.transformers_models")
FRAMEWORKS = {  # where each may be imported
    "torchtune": ("integrations.torchtune", "analysis.torchtune_shape", "training."),
    "transformers": ("integrations.transformers", "integrations.trl", "analysis.transformers_", *RECIPE_MODELS),
    "trl": ("integrations.trl",),
    "vllm": ("integrations.vllm",),
    "peft": ("analysis.transformers_files", "training.causal_lm"),
}

IMPORT_FLEXPG = """
import logging, os, sys, time, warnings
import numpy, torch
import torch.nn.attention.flex_attention  # since torch 2.14 it imports SymPy, which adds a warning filter
before = dict(os.environ), list(warnings.filters), list(logging.root.handlers), torch.random.get_rng_state().tolist()
start = time.perf_counter()
import flexpg
seconds = time.perf_counter() - start
import flexpg.training.rewards, flexpg.training.tasks
assert "torch._dynamo" not in sys.modules  # it takes longer than all of flexpg
after = dict(os.environ), list(warnings.filters), list(logging.root.handlers), torch.random.get_rng_state().tolist()
assert before == after
optional = {"torchtune", "torchao", "transformers", "trl", "vllm", "peft", "matplotlib", "rich", "datasets"}
optional |= {"omegaconf"}
assert not optional & set(sys.modules), optional & set(sys.modules)
assert "torch._inductor.compile_fx" not in sys.modules, "loaded the compiler"
assert seconds < 1, seconds
"""


def module_name(path: Path) -> str:
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def imported(path: Path) -> Iterator[str]:
    """Return the full name of every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:  # a module, or a name in one
                name = f"{node.module}.{alias.name}"
                yield name if name.removeprefix("flexpg.") in FILES else node.module


def own_imports(module: str) -> set[str]:
    """Return the modules of flexpg that a module of flexpg imports."""
    names = set(imported(FILES[module]))
    assert "flexpg" not in names or module == "__main__", f"{module} imports from the package root"
    ours = {name.removeprefix("flexpg.") for name in names if name.startswith("flexpg.")}
    return {name for name in ours if (module, name) not in DISPATCH}


def rank(module: str) -> int:
    """Return the place of a module, or of the package that it is in."""
    while module not in ORDER:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} has no place in the order"
    return ORDER.index(module)


def test_import_flexpg_needs_torch_and_numpy_only_and_has_no_side_effects():
    result = subprocess.run([sys.executable, "-c", IMPORT_FLEXPG], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("module", FILES)
def test_imports_run_downwards(module):
    for other in own_imports(module):
        assert rank(other) <= rank(module), other  # equal in a package, for which the next test is enough


def test_imports_have_no_cycle():
    order = list(TopologicalSorter({module: own_imports(module) for module in FILES}).static_order())
    assert set(order) == set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_frameworks_are_imported_by_their_integration_only(module):
    for framework in {name.partition(".")[0] for name in imported(FILES[module])} & set(FRAMEWORKS):
        assert module.startswith(FRAMEWORKS[framework]), framework


EVALUATE_TEXT = {"eval", "exec", "compile", "__import__"}  # as builtins
UNPICKLE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RECIPES = {path.stem: path for path in sorted((PACKAGE.parent / "recipes").glob("*.py"))}


@pytest.mark.parametrize("path", [*FILES.values(), *RECIPES.values()], ids=[*FILES, *RECIPES])
def test_no_eval_and_no_pickle(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in UNPICKLE:
            assert node.attr == "UnpicklingError"  # which torch.load raises
        if isinstance(node, ast.Call):
            function, options = (
                ast.unparse(node.func),
                {option.arg: ast.unparse(option.value) for option in node.keywords},
            )
            assert function not in {*EVALUATE_TEXT, "yaml.load"}
            assert function != "torch.load" or options.get("weights_only") == "True"
    assert not {name.partition(".")[0] for name in imported(path)} & (UNPICKLE - {"pickle"})


def test_public_names_shadow_no_module():
    """`flexpg.report.report` was an AttributeError while `flexpg.report` was a function."""
    assert not set(flexpg.__all__) & {module.partition(".")[0] for module in FILES}


def test_wheel_has_all_packages_and_py_typed():
    setup = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert {name for name in setup["packages"] if name != "flexpg.recipes"} == packages
    assert "py.typed" in setup["package-data"]["flexpg"] and (PACKAGE / "py.typed").is_file()
