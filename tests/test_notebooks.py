"""The notebooks of examples/ run as they are, and nothing in them depends on where they were executed."""

import re

import nbformat
import pytest

from docs.notebooks import FOLDER, NAMES, execute_notebook, read_notebook

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|mnt|Users|content)/|\b[A-Z]:\\")


def texts(notebook):
    """Yield every text that the cells have put out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from (value for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def assert_no_output_depends_on_a_machine(notebook):
    for text in texts(notebook):
        assert not ABSOLUTE_PATH.search(text), text
    streams = [output for cell in notebook.cells for output in cell.get("outputs", []) if "name" in output]
    assert not [output.text for output in streams if output.name == "stderr"]


def test_absolute_paths_are_recognized_and_relative_ones_are_not():
    for text in ("/home/me/x.py:21: Warning", "File '/tmp/a'", "C:\\temp", "wrote /usr/a"):
        assert ABSOLUTE_PATH.search(text), text
    for text in ("../../recipes/assets/tiny", "baseline / shared", "runs/tmp/a", "https://x.org/usr/a", "1/2"):
        assert not ABSOLUTE_PATH.search(text), text


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_committed_with_outputs_and_without_metadata(name):
    notebook = read_notebook(name)
    nbformat.validate(notebook)
    assert_no_output_depends_on_a_machine(notebook)
    assert notebook.metadata == {"language_info": {"name": "python"}}
    assert [cell.metadata for cell in notebook.cells] == [{}] * len(notebook.cells)
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "pip install" in notebook.cells[0].source
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_links_of_notebook_resolve(name):
    for cell in read_notebook(name).cells:
        for target in re.findall(r"\]\(((?!http)[^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert (FOLDER / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_without_error(name):
    executed, committed = execute_notebook(name), read_notebook(name)
    assert_no_output_depends_on_a_machine(executed)
    kinds = [
        [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
        for notebook in (executed, committed)
    ]
    assert kinds[0] == kinds[1]
