"""What a torchtune recipe sets up: options and components of a YAML, texts as tokens and tokens as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial, wraps
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torchtune import config, training, utils
from torchtune.config._errors import InstantiationError
from torchtune.data import Message
from torchtune.modules import TransformerDecoder
from yaml import YAMLError  # type: ignore[import-untyped]

from flexpg.integrations.torchtune import check_fits
from flexpg.losses import grpo_loss, loss_normalizer
from flexpg.sampling import SamplingParams
from flexpg.training.distributed import one_line
from flexpg.training.tasks.problem import Problem
from flexpg.tree import BLOCK

NO_TEXT = (KeyError, TypeError, ValueError)  # what tokenizers raise of an id that they do not know


def parsed(recipe_main: Callable[[DictConfig], None]) -> Callable[[], None]:
    """A recipe's main function, called with the configuration that the command line names.

    It is torchtune's `config.parse`, but that a mistake in the command line or in the file ends the process with one
    line instead of a traceback. What `recipe_main` raises comes through.

    Args:
        recipe_main: takes the configuration; its docstring is the help.
    """

    @wraps(recipe_main)
    def main() -> None:
        found: list[DictConfig] = []

        @config.parse
        @wraps(recipe_main)
        def keep(cfg: DictConfig) -> None:
            found.append(cfg)

        try:
            keep()
        except SystemExit:  # torchtune exits behind `keep`; before it, argparse has said what is wrong
            if not found:
                raise
        except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as error:
            sys.exit(f"error: {one_line(error)}")
        except TypeError:  # torchtune hands the file's options on as keywords
            sys.exit("error: the file of --config has no names at its top; give a YAML of `name: value`")
        recipe_main(found[0])

    return main


def check_keys(
    cfg: DictConfig,
    components: Sequence[str],
    at_least: Mapping[str, int],
    choices: Mapping[str, Sequence[Any]],
    others: Sequence[str],
) -> None:
    """Refuses options that are missing, unknown or out of range.

    Args:
        cfg: the whole configuration; it has the keys below, and no other.
        components: keys that hold a `_component_`.
        at_least: keys that hold a whole number, and the smallest.
        choices: keys that hold one of some strings or bools.
        others: keys whose values are not looked at here.

    Raises:
        ValueError: the first that is wrong, named.
    """
    known = {*components, *at_least, *choices, *others}
    for problem, names in (("unknown", set(cfg) - known), ("missing", known - set(cfg))):
        if names:
            close = [match for name in names for match in get_close_matches(str(name), known, n=1)]
            meant = f"; did you mean {', '.join(close)}?" if problem == "unknown" and close else ""
            listed = f"the recipe has {', '.join(sorted(known))}"
            raise ValueError(f"{problem} option {', '.join(sorted(map(str, names)))}{meant or f'; {listed}'}")
    for name, least in at_least.items():
        if type(cfg[name]) is not int or cfg[name] < least:
            raise ValueError(f"{name} is {cfg[name]!r}; give a whole number, {least} or more")
    for name, allowed in choices.items():
        if not any(type(cfg[name]) is type(value) and cfg[name] == value for value in allowed):
            words = ", ".join(str(value).lower() for value in allowed)
            raise ValueError(f"{name} is {cfg[name]!r}; allowed are {words}")
    for name in components:
        if not isinstance(cfg[name], DictConfig) or not isinstance(cfg[name].get("_component_"), str):
            raise ValueError(f"{name} is {cfg[name]!r}; give a _component_ and its arguments")


def check_values(cfg: DictConfig) -> None:
    """Refuses what a GRPO recipe's options cannot mean.

    Args:
        cfg: the whole configuration, its keys checked.

    Raises:
        ValueError: the first that is wrong, named.
    """
    if cfg.group_size == 1:
        raise ValueError("group_size is 1, which makes every advantage zero; give 2 or more")
    if type(cfg.clip_grad_norm) not in (int, float) or not cfg.clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm is {cfg.clip_grad_norm!r}; give a number above 0, .inf for no clipping")
    if not isinstance(cfg.output_dir, str) or not cfg.output_dir:
        raise ValueError(f"output_dir is {cfg.output_dir!r}; give a folder")
    if "stop_tokens" in cfg.sampling:
        raise ValueError("sampling.stop_tokens are the tokenizer's; leave them out")
    temperature = cfg.sampling.get("temperature")
    if type(temperature) not in (int, float) or not temperature > 0:
        raise ValueError(f"sampling.temperature is {temperature!r}; rollouts need a number above 0")
    if not isinstance(cfg.loss, DictConfig) or "max_completion_length" in cfg.loss:
        raise ValueError(f"loss is {cfg.loss!r}; give grpo_loss its options, and sampling.max_new_tokens as the length")
    one = torch.ones(1, 1)
    try:
        options: dict[str, Any] = {str(name): value for name, value in cfg.loss.items()}
        grpo_loss(one, one, one[0], one.bool(), ref_logprobs=one, normalizer=1.0, **options)
        loss_normalizer(one.bool(), cfg.loss.loss_type, 1)
    except (TypeError, ValueError, OverflowError, OmegaConfBaseException) as error:
        raise ValueError(f"loss: {error}") from None


def component(name: str, cfg: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """The component that the YAML describes under `name`; its own complaints are prefixed with that name.

    Args:
        name: a key of `cfg` that holds a `_component_` and its arguments.
        cfg: the whole configuration.
        args: given to the component before its arguments in the YAML.
        kwargs: given over its arguments in the YAML.

    Raises:
        ValueError: the component cannot be imported, does not take what it is given, or misses a file.
    """
    try:
        return config.instantiate(cfg[name], *args, **kwargs)
    except KeyError as error:
        raise ValueError(f"{name}: {cfg[name]._component_} does not know {error}{_files(cfg[name])}") from error
    except (TypeError, ValueError, OSError, ImportError, InstantiationError) as error:
        raise ValueError(f"{name}: {one_line(error)}{_files(cfg[name])}") from error
    except Exception as error:  # a component is anybody's code, which may raise anything
        raise ValueError(f"{name}: {type(error).__name__}: {one_line(error)}{_files(cfg[name])}") from error


def _files(options: DictConfig) -> str:
    """The files and folders that a component was given, in words: what parses them seldom names them."""
    paths = [value for value in options.values() if isinstance(value, str) and Path(value).exists()]
    return f" (given {', '.join(paths)})" if paths else ""


def device_and_dtypes(cfg: DictConfig) -> tuple[torch.device, torch.dtype, torch.dtype]:
    """The device of this process, and what `dtype` and `param_dtype` name.

    Args:
        cfg: the whole configuration.

    Raises:
        ValueError: no such device, fewer GPUs than processes, bf16 on hardware without it, or parameters in less
            precision than what is computed in.
    """
    if str(cfg.device).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device is {cfg.device!r}; give cpu or cuda")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {cfg.device} and this machine has none; set device to cpu")
    if (cfg.dtype, cfg.param_dtype) == ("fp32", "bf16"):
        raise ValueError("param_dtype is bf16 and dtype fp32; set dtype to bf16, or both to fp32")
    try:
        device = utils.get_device(cfg.device)
        return device, training.get_dtype(cfg.dtype, device), training.get_dtype(cfg.param_dtype, device)
    except RuntimeError as error:
        raise ValueError(f"device {cfg.device}, dtype {cfg.dtype}: {error}") from None


def prompt_tokens(tokenizer: Any, prompt: str, prompt_format: Literal["plain", "bos", "chat"]) -> list[int]:
    """A prompt's tokens: as it is, behind the beginning-of-sequence token, or as a user's message before its answer.

    Args:
        tokenizer: torchtune's, or one with its methods.
        prompt: the text.
        prompt_format: "chat" is the format of the tokenizer's model, with no system message, where the chat templates
            of Qwen2.5 and Llama 3.2 would add one of their own.

    Raises:
        ValueError: the tokenizer's max_seq_len leaves no room for an answer.
    """
    if prompt_format == "chat":
        # What two answers have in common: of an empty one, torchtune 0.6.1 ends Qwen's message and Phi's all the same.
        answers = [Message(role="assistant", content=answer) for answer in ("a", "b")]
        user = Message(role="user", content=prompt)
        first, second = (tokenizer.tokenize_messages([user, answer])[0] for answer in answers)
        end = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if end is None:
            raise ValueError(f"the tokenizer's max_seq_len={tokenizer.max_seq_len} cuts the prompt; set it to null")
        return list(first[:end])
    return list(tokenizer.encode(prompt, add_bos=prompt_format == "bos", add_eos=False))


def tokenized(
    cfg: DictConfig,
    tokenizer: Any,
    sampling: SamplingParams,
    model: TransformerDecoder,
    name: str,
    problems: Sequence[Problem],
    *,
    at_least: int,
    device: torch.device,
) -> list[Tensor]:
    """Every problem's prompt as tokens; one that the model or a budget has no room for is named.

    Args:
        cfg: the whole configuration.
        tokenizer: torchtune's, or one with its methods.
        sampling: how long completions may be, and what ends them.
        model: what is trained.
        name: "train" or "test".
        problems: of that name.
        at_least: problems that the run needs.
        device: where the tokens are wanted.

    Raises:
        ValueError: too few problems, or the first whose prompt cannot be completed.
    """
    if len(problems) < at_least:
        raise ValueError(f"{name}_problems has {len(problems)}; this run needs {at_least} or more")
    prompts = []
    for number, problem in enumerate(problems):
        tokens = prompt_tokens(tokenizer, problem.prompt, cfg.prompt_format)
        try:
            if not tokens:
                raise ValueError("its prompt is empty")
            length = len(tokens) + sampling.max_new_tokens
            slots = length + (-len(tokens) % BLOCK if cfg.compile else 0)
            for budget, needed in (("max_tokens", length), ("max_cache_tokens", slots)):
                if needed > cfg[budget]:
                    raise ValueError(f"prompt and completion of {needed} tokens exceed {budget}={cfg[budget]}")
            check_fits(model, max(tokens + list(sampling.stop_tokens)), length)
        except ValueError as error:
            raise ValueError(f"{name} problem {number} of {len(problems)}: {error}") from None
        prompts.append(torch.tensor(tokens, device=device))
    return prompts


def completion_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """A completion as rewards read it: without the stop token that ends it.

    An id that no text belongs to (a model's vocabulary is often padded beyond its tokenizer's) becomes U+FFFD.

    Args:
        tokenizer: torchtune's, or one with its methods.
        tokens: of one completion.
    """
    text = tokens[:-1] if tokens[-1] in tokenizer.stop_tokens else tokens
    try:
        return str(tokenizer.decode(list(text)))
    except NO_TEXT:
        runs = [(known, list(run)) for known, run in groupby(text, key=partial(_has_text, tokenizer))]
        return "".join(tokenizer.decode(run) if known else "\ufffd" * len(run) for known, run in runs)


def _has_text(tokenizer: Any, token: int) -> bool:
    try:
        tokenizer.decode([token])
    except NO_TEXT:
        return False
    return True
