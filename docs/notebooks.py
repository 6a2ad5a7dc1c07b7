"""Execute the notebooks of examples/notebooks and write them back with their outputs.

    python -m docs.notebooks                      # all of them
    python -m docs.notebooks masks_from_scratch

What depends on an environment is left out: metadata, execution counts, and plain text next to HTML or an image. Images
have 64 colors, which makes them several times smaller.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "examples/notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
TIMEOUT = 600  # seconds for a cell


def read_notebook(name: str) -> nbformat.NotebookNode:
    """Return a notebook as it is committed."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute_notebook(name: str) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of an execution in its own folder.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises.
    """
    notebook = read_notebook(name)
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, resources=place).execute()
    notebook.metadata = {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                clean_output(output)
    return notebook


def clean_output(output: nbformat.NotebookNode) -> None:
    """Remove from an output what is redundant or differs between environments."""
    if "execution_count" in output:
        output.execution_count = None
    data = output.get("data", {})
    if len(data) > 1:
        data.pop("text/plain", None)
    if "image/png" in data:
        file = BytesIO()
        with Image.open(BytesIO(base64.b64decode(data["image/png"]))) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
        data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main(argv: Sequence[str] | None = None) -> None:
    """Execute the named notebooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=NAMES, default=NAMES)
    for name in parser.parse_args(argv).names:
        nbformat.write(execute_notebook(name), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
