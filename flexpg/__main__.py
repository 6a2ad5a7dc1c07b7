"""`python -m flexpg`: lists the recipes and configurations, copies them out, and reports what sharing would save.

`tune ls` and `tune cp` know torchtune's own alone. `tune run` wants a recipe in a package `recipes` of the working
directory, and our configurations name their assets from there, so every file is copied to the place that it has in the
repository: `recipes/grpo.py` with `recipes/__init__.py`, `recipes/configs/tiny_cpu.yaml` with `recipes/assets/tiny`.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpg.analysis.flops import ModelShape

PICTURES = (".png", ".pdf", ".svg")


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


def run_report(args: argparse.Namespace) -> None:
    """Prints a table of what sharing saves of an update over a file's rollouts, and draws it."""
    if args.out.suffix not in PICTURES:
        raise ValueError(f"--out {args.out} is no picture; name a {', '.join(PICTURES)} file")
    try:
        from rich.console import Console

        from flexpg.analysis.plots import plot_report
        from flexpg.analysis.report import MAX_TOKENS, report
        from flexpg.analysis.rollout_files import read_rollouts
    except ImportError as error:
        raise ImportError(f"{error}; a report needs more than flexpg alone: pip install 'flexpg[report]'") from error
    if not args.file.is_file():
        raise FileNotFoundError(f"no file {args.file}; give a .jsonl file of rollouts")
    shape = _shape(args.model)  # first: a mistyped path is no folder to look for a tokenizer in
    tokenizer = _tokenizer(args)
    rollouts, names = read_rollouts(args.file, **tokenizer, per_turn=args.per_turn, vocab_size=shape.vocab_size)
    found = report(
        rollouts,
        shape,
        max_tokens=args.max_tokens or MAX_TOKENS,
        activation_checkpointing=args.activation_checkpointing,
        names=names,
    )
    Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(found.table())
    if args.json:
        args.json.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"numbers: {args.json}")
    plot_report(args.out, found)
    print(f"picture: {args.out}")


def _shape(path: Path) -> ModelShape:
    """The shape of a checkpoint of transformers, or of the torchtune model of a recipe's configuration."""
    return _shape_of_recipe(path) if path.suffix in (".yaml", ".yml") else _shape_of_checkpoint(path)


def _shape_of_checkpoint(path: Path) -> ModelShape:
    from flexpg.analysis.transformers_files import local_config
    from flexpg.analysis.transformers_shape import shape_of

    config = local_config(path)
    try:
        return shape_of(config)
    except Exception as error:  # a config's numbers meet whatever its family's layers do with them
        raise ValueError(f"{path}: {_said(error)}") from error


def _shape_of_recipe(path: Path) -> ModelShape:
    import torch
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    from flexpg.analysis.torchtune_shape import shape_of
    from flexpg.training.models import model_shape

    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(config, DictConfig) or "model" not in config:
        raise ValueError(f"{path} has no `model`; give a configuration of the recipe, or a checkpoint's folder")
    try:
        return shape_of(model_shape(config, torch.float32, torch.float32))
    except Exception as error:  # a builder of torchtune's, or of anyone's
        raise ValueError(f"{path}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What an error says; its kind before that where it is not written for a user, as of `KeyError: 'zzz'`."""
    return str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"


def _tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    """What `read_rollouts` takes of a tokenizer: nothing, where none was named and the model's folder holds none."""
    if str(args.tokenizer) == "bytes":
        from flexpg.training.tasks import ByteTokenizer

        return {"encode": ByteTokenizer().encode}
    folder = args.tokenizer or (args.model.parent if args.model.is_file() else args.model)
    if args.tokenizer is None and args.model.suffix in (".yaml", ".yml"):
        return {}
    from flexpg.analysis.transformers_files import has_tokenizer, local_tokenizer

    if args.tokenizer is None and not has_tokenizer(folder):
        return {}
    tokenizer = local_tokenizer(folder)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    return {"encode": encode, "chat": tokenizer if tokenizer.chat_template else None}


def token_budgets(text: str) -> list[int]:
    """The numbers of `4096,8192`.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    budgets = text.split(",")
    if not all(budget.strip().isdecimal() and int(budget) > 0 for budget in budgets):
        raise argparse.ArgumentTypeError(f"{text!r} came; give whole numbers of tokens, as in 4096,8192")
    return list(map(int, budgets))


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The parser of `report`."""
    report = commands.add_parser(
        "report",
        help="say what sharing prefixes saves of an update over given rollouts",
        description="Tokens, attention pairs, FLOPs and activations of an update over the rollouts of a file, unshared "
        "and shared, by group size and token budget: counted, not measured.",
    )
    report.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help='JSONL, a line like {"prompt": TEXT, "completions": [TEXT, ...]}, {"prompt": ..., "completion": ...} or '
        '{"messages": [...]}; instead of a TEXT also its token ids',
    )
    report.add_argument(
        "--model",
        metavar="PATH",
        type=Path,
        required=True,
        help="what is trained: a transformers checkpoint's folder or its config.json, or a recipe's .yaml",
    )
    report.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="a folder that holds one (the model's, if it does), or `bytes`: one token per byte, a rough picture",
    )
    report.add_argument(
        "--max-tokens",
        metavar="N,N,...",
        type=token_budgets,
        help="token budgets of a micro-batch (4096,8192,16384,32768)",
    )
    report.add_argument("--per-turn", action="store_true", help="of messages, a rollout for each assistant's turn")
    report.add_argument(
        "--activation-checkpointing", action="store_true", help="layers are computed again in the backward"
    )
    report.add_argument(
        "--out", metavar="PICTURE", type=Path, default=Path("report.png"), help="picture to write (report.png)"
    )
    report.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there, too")
    report.set_defaults(run=run_report)


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
    _add_report(commands)
    parser.set_defaults(run=lambda args: parser.print_help())
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # of a reader that has seen enough, as `head`
        sys.stdout = None
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")  # on one line


if __name__ == "__main__":
    main()
