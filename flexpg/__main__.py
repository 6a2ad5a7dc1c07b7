"""The command line, `flexpg` or `python -m flexpg`: copy recipes, and report what sharing prefixes would save.

`tune ls` and `tune cp` list torchtune's own recipes only. `tune run` expects recipes in a package `recipes` of the
working directory, and configurations name their assets from there, so files are copied to the same place that they have
in the repository: `recipes/grpo.py` with `recipes/__init__.py`, `recipes/configs/tiny_cpu.yaml` with
`recipes/assets/tiny`.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexpg import __version__

if TYPE_CHECKING:
    from flexpg.analysis.flops import ModelShape
    from flexpg.rollouts import Rollouts


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
    with _extra("recipes"):
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


def print_report(args: argparse.Namespace) -> None:
    """Print what sharing saves in an update over the rollouts, and plot it."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of its C++ extensions, which a report does not need
    with _extra("report"):
        from rich.console import Console

        from flexpg.analysis.plots import plot_report
        from flexpg.analysis.report import report
    shape = _shape(args.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("always", ".* stored turn by turn")
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        rollouts, names = _rollouts(args, shape.vocab_size)
    found = report(
        rollouts,
        shape,
        max_tokens=args.max_tokens,
        activation_checkpointing=args.activation_checkpointing,
        names=names,
        context_parallel=args.context_parallel,
        budget_bytes=args.memory * 2**30,
    )
    Console(width=max(100, shutil.get_terminal_size().columns), highlight=False).print(found.table())
    if args.json:
        args.json.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    plot_report(found).savefig(args.out, dpi=200)
    print(f"wrote {args.out}")


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Make an ImportError say which extra to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; run: pip install 'flexpg[{name}]'") from error


def _shape(path: Path) -> ModelShape:
    """Return the shape of a transformers checkpoint or adapter, or of the model in a recipe's configuration."""
    try:
        if path.suffix in (".yaml", ".yml"):
            with _extra("recipes"):
                from flexpg.analysis.torchtune_shape import recipe_shape
            return recipe_shape(path)
        with _extra("report"):
            from flexpg.analysis.transformers_files import local_model
            from flexpg.analysis.transformers_shape import shape_of
        return shape_of(local_model(path))
    except (ImportError, OSError):
        raise
    except Exception as error:  # a config's values meet whatever its family's layers do with them
        raise ValueError(f"--model {path}: {type(error).__name__}: {error}") from error


def _rollouts(args: argparse.Namespace, vocab_size: int) -> tuple[Rollouts, Sequence[str] | None]:
    """Return the rollouts of the file with their names, or rollouts of the given lengths."""
    if not args.files:
        from flexpg.analysis.report import rollouts_from_lengths

        prompts = args.prompts or 1
        completions = [[args.completion_tokens] * args.group_size] * prompts
        return rollouts_from_lengths([args.prompt_tokens] * prompts, completions), None
    from flexpg.analysis.rollout_files import read_rollouts
    from flexpg.conversations.transcripts import skipped_message

    tokenizer = _tokenizer(args.tokenizer, args.model)
    skipped: dict[str, str] | None = {} if args.skip_bad else None
    rollouts, names = read_rollouts(
        args.files,
        **tokenizer,
        per_turn=args.per_turn,
        stop_tokens=_stop_tokens(args.stop_tokens, tokenizer.get("chat")),
        template_options=args.template_options,
        vocab_size=vocab_size,
        skipped=skipped,
    )
    if skipped:
        print(f"note: {skipped_message(skipped)}", file=sys.stderr)
    return rollouts, names


def _stop_tokens(names: Sequence[str] | None, chat: Any) -> list[int] | None:
    """Return the ids of stop tokens, which may be given as ids or as texts of a tokenizer's tokens."""
    if names is None:
        return None
    ids = []
    for name in names:
        token = int(name) if name.isdecimal() else None if chat is None else chat.get_vocab().get(name)
        if token is None or (chat is not None and token >= len(chat)):
            raise ValueError(f"--stop-tokens must be ids or tokens of the tokenizer, got {name!r}")
        ids.append(token)
    return ids


def _tokenizer(path: Path | None, model: Path) -> dict[str, Any]:
    """Return the tokenizer arguments of `read_rollouts`; none if no tokenizer is given and the model has none."""
    if str(path) == "bytes":
        return {"encode": lambda text: list(text.encode())}
    if path is None and model.suffix in (".yaml", ".yml"):
        return {}
    with _extra("report"):
        from flexpg.analysis.transformers_files import local_tokenizer, tokenizer_folder
    folder = tokenizer_folder(model) if path is None else path
    if folder is None:
        return {}
    try:
        tokenizer = local_tokenizer(folder)
    except OSError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise ValueError(f"--tokenizer {folder}: {type(error).__name__}: {error}") from error
    encode = partial(tokenizer.encode, add_special_tokens=False)
    return {"encode": encode, "chat": tokenizer if tokenizer.chat_template else None}


def _recipe_name(text: str) -> str:
    known = [*recipe_files(recipes_folder()), "all"]
    if text not in known:
        near = " or ".join(get_close_matches(text, known))
        did_you_mean = f"; did you mean {near}?" if near else ""
        raise argparse.ArgumentTypeError(f"must be a name that `flexpg ls` prints, got {text!r}{did_you_mean}")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _budgets(text: str) -> list[int]:
    return [_positive(budget) for budget in text.split(",")]


def _json_object(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return options


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="report what sharing prefixes would save in an update",
        description="Count tokens, visible pairs, FLOPs and activation memory of one update over the rollouts of a "
        "file, or over rollouts of given lengths, with and without shared prefixes. Nothing is measured.",
    )
    add = parser.add_argument
    add(
        "files",
        metavar="FILE",
        nargs="*",
        type=Path,
        help='rollouts or conversations as JSON lines, JSON or Parquet, also with gzip, "-" for standard input; '
        "prompts with completions as text, token ids or messages, or the formats of common tools (see docs/report.md)",
    )
    add("--prompt-tokens", metavar="N", type=_positive, help="length of every prompt, instead of FILE")
    add("--completion-tokens", metavar="N", type=_positive, help="length of every completion, instead of FILE")
    add("--group-size", metavar="G", type=_positive, help="completions per prompt, instead of FILE")
    add("--prompts", metavar="N", type=_positive, help="number of prompts, instead of FILE (default: 1)")
    add(
        "--model",
        metavar="PATH",
        type=Path,
        required=True,
        help="model to train: the folder of a transformers checkpoint or PEFT adapter, a config.json, or a recipe's "
        ".yaml; weights are not read",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="folder of a tokenizer (default: the model's), or `bytes` for one token per byte, as an approximation",
    )
    add(
        "--max-tokens",
        metavar="N,N,...",
        type=_budgets,
        default=[4096, 8192, 16384, 32768],
        help="token budgets of a micro-batch (default: 4096,8192,16384,32768)",
    )
    add(
        "--per-turn",
        action="store_true",
        default=None,
        help="one rollout per assistant turn (default: per conversation where the chat template allows it)",
    )
    add("--skip-bad", action="store_true", help="skip rows that cannot be read, and say which")
    add(
        "--stop-tokens",
        metavar="TOKEN,TOKEN,...",
        type=lambda text: text.split(","),
        help="tokens or ids that end an assistant turn (default: the tokenizer's and its generation_config.json's)",
    )
    add(
        "--template-options",
        metavar="JSON",
        type=_json_object,
        help="options of the chat template, such as '{\"enable_thinking\": false}'",
    )
    add("--activation-checkpointing", action="store_true", help="layers are recomputed in the backward")
    add(
        "--context-parallel",
        metavar="N",
        type=_positive,
        default=1,
        help="also report the memory, and the longest prompt that fits, if 1 to N ranks share a packed sequence",
    )
    add(
        "--memory",
        metavar="GIB",
        type=_positive,
        default=40,
        help="memory of one rank for activations, with --context-parallel (default: 40)",
    )
    add("--out", metavar="FILE", type=Path, default=Path("report.png"), help="figure to write (default: report.png)")
    add("--json", metavar="FILE", type=Path, help="also write the numbers as JSON")

    def run(args: argparse.Namespace) -> None:
        lengths = (args.prompt_tokens, args.completion_tokens, args.group_size)
        if any((*lengths, args.prompts)) if args.files else None in lengths:
            parser.error("give either FILE, or --prompt-tokens, --completion-tokens and --group-size")
        print_report(args)

    parser.set_defaults(run=run)


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
    add("--ranks", metavar="N", type=_positive, help="processes of torchtune's sync recipe (default: 1)")
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
    _add_report(commands)
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
