"""The command line, `flexpg` or `python -m flexpg`: copy recipes, and report what sharing prefixes would save.

`tune ls` and `tune cp` list torchtune's own recipes only. `tune run` expects recipes in a package `recipes` of the
working directory, and configurations name their assets from there, so files are copied to the same place that they have
in the repository: `recipes/grpo.py` with `recipes/__init__.py`, `recipes/configs/tiny_cpu.yaml` with
`recipes/assets/tiny`.
"""

from __future__ import annotations

import argparse
import ast
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from flexpg import __version__
from flexpg.analysis.report_command import add_report, needs_extra, positive


def recipes_folder() -> Path:
    """Return the folder `recipes`: inside the package if a wheel is installed, next to it in a clone."""
    package = Path(str(files("flexpg")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_files(folder: Path) -> dict[str, Path]:
    """Return every recipe and configuration by name."""
    recipes = (path for path in folder.glob("*.py") if path.name != "__init__.py")
    return {path.stem: path for path in (*sorted(recipes), *sorted(folder.glob("configs/*.yaml")))}


def headline(path: Path) -> str:
    """Return the first sentence of a recipe's docstring or of a configuration's first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        head = ast.get_docstring(ast.parse(text)) or ""
    else:
        head = re.sub(r"(?m)^#[ \t]?", "", text)
    paragraph = " ".join(head.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) ", paragraph)[0]


def with_dependencies(path: Path, folder: Path) -> list[Path]:
    """Return a recipe with the package's __init__.py, or a configuration with the assets that it names."""
    if path.suffix == ".py":
        return [folder / "__init__.py", path]
    named = [folder / name for name in re.findall(r"recipes/(assets/[\w./-]+)", path.read_text(encoding="utf-8"))]
    assets = {file for asset in named for file in (asset.rglob("*") if asset.is_dir() else [asset]) if file.is_file()}
    return [path, *sorted(assets | {folder / "assets/README.md"} if assets else ())]  # with the assets' licenses


def list_recipes(args: argparse.Namespace) -> None:
    """Print every name and its headline."""
    known = recipe_files(recipes_folder())
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {headline(path)}")


def copy_recipes(args: argparse.Namespace) -> None:
    """Copy what was named; no file is copied if one that differs exists, unless --force is given."""
    folder = recipes_folder()
    if args.name == "all":
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    else:
        paths = with_dependencies(recipe_files(folder)[args.name], folder)
    targets = {path: args.dest / "recipes" / path.relative_to(folder) for path in paths}
    differing = [to for path, to in targets.items() if to.exists() and to.read_bytes() != path.read_bytes()]
    if differing and not args.force:
        raise FileExistsError(f"files exist and differ: {', '.join(map(str, differing))}; --force overwrites them")
    for path, to in targets.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
        print(to)


def translate_torchtune(args: argparse.Namespace) -> None:
    """Write a configuration of torchtune's GRPO recipes as one of recipes/grpo.py, and print what to look at."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    with needs_extra("recipes"):
        from flexpg.training.from_torchtune import translate
    found = translate(args.file, args.ranks)
    command = f"flexpg from-torchtune {args.file.name}" + (f" --ranks {args.ranks}" if args.ranks else "")
    text = found.yaml(f"Translated by `{command}` from a configuration of torchtune's GRPO.")
    if args.out is None:
        print(text, end="")
    elif args.out.exists() and args.out.read_text(encoding="utf-8") != text and not args.force:
        raise FileExistsError(f"files exist and differ: {args.out}; --force overwrites them")
    else:
        args.out.write_text(text, encoding="utf-8")
        print(f"wrote {args.out}")
    for name, note in found.notes.items():
        print(f"note: {name}: {note}", file=sys.stderr)


def _recipe_name(text: str) -> str:
    known = [*recipe_files(recipes_folder()), "all"]
    if text not in known:
        near = " or ".join(get_close_matches(text, known))
        did_you_mean = f"; did you mean {near}?" if near else ""
        raise argparse.ArgumentTypeError(f"must be a name that `flexpg ls` prints, got {text!r}{did_you_mean}")
    return text


def _add_from_torchtune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "from-torchtune",
        help="translate a configuration of torchtune's GRPO recipes",
        description="Write a configuration of torchtune's sync or async GRPO recipe as one of recipes/grpo.py; notes "
        "say what to look at (see docs/coming_from_torchtune.md).",
    )
    add = parser.add_argument
    add("file", metavar="THEIRS.yaml", type=Path, help="configuration of torchtune's recipe")
    add("-o", "--out", metavar="OURS.yaml", type=Path, help="file to write (default: standard output)")
    add("--ranks", metavar="N", type=positive, help="processes of torchtune's sync recipe (default: 1)")
    add("--force", action="store_true", help="overwrite a file that differs")
    parser.set_defaults(run=translate_torchtune)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; without one, print the help."""
    parser = argparse.ArgumentParser(prog="flexpg", description="Recipes and reports of flexpg.")
    parser.add_argument("--version", action="version", version=f"flexpg {__version__}")
    parser.set_defaults(run=lambda args: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    ls = commands.add_parser("ls", help="list the recipes and their configurations")
    ls.set_defaults(run=list_recipes)
    cp = commands.add_parser("cp", help="copy a recipe or a configuration, with the files that it needs")
    cp.add_argument("name", metavar="NAME", type=_recipe_name, help="see ls; or all")
    cp.add_argument("dest", metavar="DEST", nargs="?", type=Path, default=Path(), help="folder to copy to (default: .)")
    cp.add_argument("--force", action="store_true", help="overwrite files that differ")
    cp.set_defaults(run=copy_recipes)
    add_report(commands)
    _add_from_torchtune(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")  # on one line


if __name__ == "__main__":
    main()
