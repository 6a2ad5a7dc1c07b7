"""`python -m flexpg`: lists the recipes and configurations that come with the package, and copies them out.

`tune ls` and `tune cp` know torchtune's own alone. `tune run` wants a recipe in a package `recipes` of the working
directory, and our configurations name their assets from there, so every file is copied to the place that it has in the
repository: `recipes/grpo.py` with `recipes/__init__.py`, `recipes/configs/tiny_cpu.yaml` with `recipes/assets/tiny`.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path


def source() -> Path:
    """The folder `recipes`: inside the package where a wheel is installed, beside it in a clone."""
    package = Path(str(files("flexpg")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def items(folder: Path) -> dict[str, Path]:
    """Every recipe and configuration of the folder by its name."""
    recipes = (path for path in folder.glob("*.py") if path.name != "__init__.py")
    return {path.stem: path for path in (*sorted(recipes), *sorted(folder.glob("configs/*.yaml")))}


def headline(path: Path) -> str:
    """The first sentence of a file's head: of a recipe's docstring, of a configuration's first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        head = ast.get_docstring(ast.parse(text)) or ""
    else:
        head = re.sub(r"(?m)^#[ \t]?", "", text)
    paragraph = " ".join(head.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) ", paragraph)[0]


def with_companions(path: Path, folder: Path) -> list[Path]:
    """A recipe and what makes its folder a package; a configuration and the assets that it names."""
    if path.suffix == ".py":
        return [folder / "__init__.py", path]
    named = [folder / name for name in re.findall(r"recipes/(assets/[\w./-]+)", path.read_text(encoding="utf-8"))]
    assets = {file for asset in named for file in (asset.rglob("*") if asset.is_dir() else [asset]) if file.is_file()}
    return [path, *sorted(assets | {folder / "assets/README.md"} if assets else ())]  # its licences go along


def copy(paths: Sequence[Path], folder: Path, destination: Path, *, force: bool) -> None:
    """Copies files of the folder into `recipes` of the destination: all of them, or none where that would lose one.

    Raises:
        OSError: a file that differs is there already, unless `force`; or the destination cannot be written.
    """
    targets = {path: destination / "recipes" / path.relative_to(folder) for path in paths}
    differing = [to for path, to in targets.items() if to.exists() and to.read_bytes() != path.read_bytes()]
    if differing and not force:
        names = ", ".join(map(str, differing))
        raise FileExistsError(f"there already, and different: {names}; move it away, or overwrite it with --force")
    for path, to in targets.items():
        is_there = to.exists() and to not in differing
        if not is_there:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
        print(f"{to}{' (there already)' if is_there else ''}")


def run_ls(args: argparse.Namespace) -> None:
    """Prints every name and what it is."""
    known = items(source())
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {headline(path)}")


def run_cp(args: argparse.Namespace) -> None:
    """Copies what was named."""
    folder = source()
    if args.name == "all":
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    else:
        paths = with_companions(items(folder)[args.name], folder)
    copy(paths, folder, args.dest, force=args.force)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; without one, prints the help."""
    parser = argparse.ArgumentParser(prog="python -m flexpg", description="What comes with flexpg beside the library.")
    commands = parser.add_subparsers(title="commands")
    ls = commands.add_parser("ls", help="list the recipes and their configurations")
    ls.set_defaults(run=run_ls)
    cp = commands.add_parser("cp", help="copy a recipe or a configuration, with what it needs, to edit and run it")
    cp.add_argument("name", metavar="NAME", choices=[*items(source()), "all"], help="a name that ls lists, or all")
    cp.add_argument("dest", metavar="DEST", nargs="?", type=Path, default=Path(), help="folder to copy into (here)")
    cp.add_argument("--force", action="store_true", help="overwrite files that differ")
    cp.set_defaults(run=run_cp)
    parser.set_defaults(run=lambda args: parser.print_help())
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # of a reader that has seen enough, as `head`
        sys.stdout = None
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
