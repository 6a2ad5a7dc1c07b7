"""`python -m flexpg` hands out recipes that run where they are put, and overwrites nobody's work."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flexpg.__main__ import items, main

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CONFIGS = sorted(path.stem for path in RECIPES.glob("configs/*.yaml"))
PYTHON_FILES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")
BUILD = "from setuptools import build_meta; build_meta.build_wheel({!r})"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def tree(folder):
    """What stands in a folder: path -> bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_without_a_command_the_help_is_printed():
    result = subprocess.run([sys.executable, "-m", "flexpg"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: python -m flexpg")
    assert {"ls", "cp", "report"} <= {line.split()[0] for line in result.stdout.splitlines() if line.startswith("    ")}


def test_the_help_of_report_names_every_option_and_what_stands_in_the_file(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["report", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = ("--model", "--tokenizer", "--max-tokens", "--per-turn", "--activation-checkpointing", "--out", "--json")
    assert all(option in text for option in options)
    assert '"completions": [TEXT, ...]' in text and '"messages"' in text and "counted, not measured" in text


def test_ls_imports_nothing_that_a_report_needs():
    lazy = "{'rich', 'matplotlib', 'transformers', 'torchtune', 'omegaconf', 'flexpg.analysis.plots'}"
    command = f"import sys; from flexpg.__main__ import main; main(['ls']); assert not {lazy} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_ls_prints_every_name_with_the_first_sentence_of_its_file(capsys):
    main(["ls"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == PYTHON_FILES + CONFIGS
    assert all(line[-1] in ".?" for line in lines.values()), lines
    assert lines["grpo"] == "GRPO with every group's prompt encoded once: sample, score, update."


def test_a_recipe_and_a_configuration_have_different_names():
    assert len(items(RECIPES)) == len(PYTHON_FILES) + len(CONFIGS)


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_a_recipe_is_copied_with_all_of_the_package_that_it_imports(name, tmp_path, capsys):
    main(["cp", name])
    assert tree(tmp_path).keys() == {"recipes/__init__.py", f"recipes/{name}.py"}
    assert capsys.readouterr().out.splitlines() == ["recipes/__init__.py", f"recipes/{name}.py"]
    for node in ast.walk(ast.parse((RECIPES / f"{name}.py").read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
        assert not any(str(module).split(".")[0] == "recipes" for module in modules), ast.unparse(node)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_copied_with_the_assets_that_it_names(name, tmp_path):
    main(["cp", name, "somewhere/else"])
    here = tmp_path / "somewhere/else"
    copied = tree(here)
    assert copied.items() <= {f"recipes/{path}": content for path, content in tree(RECIPES).items()}.items()
    config = copied[f"recipes/configs/{name}.yaml"].decode()
    named = re.findall(r"recipes/assets/\S+", config)
    assert all((here / asset).exists() for asset in named)
    assert bool(named) == ("recipes/assets/README.md" in copied) == (len(copied) > 1)  # the licences of the assets


def test_all_is_the_whole_folder(tmp_path):
    main(["cp", "all"])
    assert tree(tmp_path / "recipes") == tree(RECIPES)


def test_a_file_that_differs_is_named_and_kept_and_nothing_is_copied_without_force(tmp_path, capsys):
    changed = tmp_path / "recipes/configs/tiny_cpu.yaml"
    changed.parent.mkdir(parents=True)
    changed.write_text("mine")
    with pytest.raises(
        SystemExit, match=r"^error: there already, and different: recipes/configs/tiny_cpu.yaml; .*--force$"
    ):
        main(["cp", "tiny_cpu"])
    assert tree(tmp_path) == {"recipes/configs/tiny_cpu.yaml": b"mine"}
    main(["cp", "tiny_cpu", "--force"])
    assert changed.read_bytes() == (RECIPES / "configs/tiny_cpu.yaml").read_bytes()
    capsys.readouterr()
    main(["cp", "tiny_cpu"])
    assert capsys.readouterr().out.splitlines()[0] == "recipes/configs/tiny_cpu.yaml (there already)"


@pytest.mark.slow
def test_a_wheel_holds_every_package_and_hands_out_the_recipes_without_a_clone(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="a wheel is built by setuptools 77 or later")
    clone, site, here = tmp_path / "clone", tmp_path / "site", tmp_path / "here"
    for folder in (clone, site, here):
        folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("flexpg", "recipes"):
        for path, content in tree(ROOT / folder).items():
            target = clone / folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    subprocess.run([sys.executable, "-c", BUILD.format(str(tmp_path))], cwd=clone, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"flexpg"}  # no `recipes`: that one is torchtune's
    assert tree(site / "flexpg/recipes") == tree(RECIPES)
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("flexpg/**/__init__.py")}
    assert all((site / package / "__init__.py").exists() for package in packages), packages

    command = "from flexpg.__main__ import main, source; print(source()); main(['cp', 'all'])"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run([sys.executable, "-c", command], cwd=here, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(site / "flexpg/recipes")
    assert tree(here / "recipes") == tree(RECIPES)
