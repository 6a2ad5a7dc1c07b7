"""The command `flexpg report`: what sharing prefixes would save in an update over given rollouts."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpg.analysis.flops import ModelShape
    from flexpg.rollouts import Rollouts


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the command line."""
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
    add("--prompt-tokens", metavar="N", type=positive, help="length of every prompt, instead of FILE")
    add("--completion-tokens", metavar="N", type=positive, help="length of every completion, instead of FILE")
    add("--group-size", metavar="G", type=positive, help="completions per prompt, instead of FILE")
    add("--prompts", metavar="N", type=positive, help="number of prompts, instead of FILE (default: 1)")
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
        type=positive,
        default=1,
        help="also report the memory, and the longest prompt that fits, if 1 to N ranks share a packed sequence",
    )
    add(
        "--memory",
        metavar="GIB",
        type=positive,
        default=40,
        help="memory of one rank for activations, with --context-parallel (default: 40)",
    )
    add("--out", metavar="FILE", type=Path, default=Path("report.png"), help="figure to write (default: report.png)")
    add("--json", metavar="FILE", type=Path, help="also write the numbers as JSON")

    def run(args: argparse.Namespace) -> None:
        lengths = (args.prompt_tokens, args.completion_tokens, args.group_size)
        if any((*lengths, args.prompts)) if args.files else None in lengths:
            parser.error("give either FILE, or --prompt-tokens, --completion-tokens and --group-size")
        for file in filter(None, (args.out, args.json)):
            if not file.parent.is_dir():
                parser.error(f"there is no folder {file.parent} for {file.name}")
        if not args.out.suffix:
            parser.error(f"--out must end in the figure's format, as {args.out}.png does")
        print_report(args)

    parser.set_defaults(run=run)


def print_report(args: argparse.Namespace) -> None:
    """Print what sharing saves in an update over the rollouts, and plot it."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of its C++ extensions, which a report does not need
    with needs_extra("report"):
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


def _shape(path: Path) -> ModelShape:
    """Return the shape of a transformers checkpoint or adapter, or of the model in a recipe's configuration."""
    try:
        if path.suffix in (".yaml", ".yml"):
            with needs_extra("recipes"):
                from flexpg.analysis.torchtune_shape import recipe_shape
            return recipe_shape(path)
        with needs_extra("report"):
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
    from flexpg.conversations.row_files import skipped_message

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
    with needs_extra("report"):
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


def _budgets(text: str) -> list[int]:
    return [positive(budget) for budget in text.split(",")]


def _json_object(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return options


def positive(text: str) -> int:
    """Return the positive integer of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Make an ImportError say which extra to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; run: pip install 'flexpg[{name}]'") from error
