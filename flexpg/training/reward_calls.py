"""Calls of reward functions: each gets what its parameters are named after, as TRL and torchtune pass it.

| parameters | called once per | gets |
| --- | --- | --- |
| `completion` and other names in the singular | completion | its text and token ids, the problem's columns |
| `completions`, `prompts` or `completion_ids` | group | lists, as TRL passes them; `**kwargs` gets all columns |
| the same with `answers`, without `**kwargs` | group | texts and padded tensors, as torchtune passes them |
| none of these | completion | its text and the answer, by position |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from flexpg.training.tasks.problem import Problem


@dataclass(frozen=True)
class Group:
    """The completions of one problem.

    Attributes:
        problem: The problem.
        completions: G texts.
        completion_ids: G lists of token ids, stop tokens included; empty if no reward asks for them.
        first: The number of the first rollout, for errors.
    """

    problem: Problem
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]] = ()
    first: int = 0


@dataclass(frozen=True)
class TrainerState:
    """The part of transformers' TrainerState that reward functions read.

    Attributes:
        global_step: Steps that are done.
        max_steps: Steps of the run.
    """

    global_step: int = 0
    max_steps: int = 0


@dataclass(frozen=True)
class Run:
    """What rewards can ask for besides the group.

    Attributes:
        tokenizer: A torchtune tokenizer, or one with its methods.
        is_chat: Whether prompts are messages; TRL's functions then get completions as lists of messages too.
        trainer_state: Where the run is.
    """

    tokenizer: Any = None
    is_chat: bool = False
    trainer_state: TrainerState = field(default_factory=TrainerState)


@dataclass(frozen=True)
class Log:
    """What reward functions log.

    Attributes:
        metrics: The values of `log_metric`, by name.
        rewards: The names of rewards, which metrics must not have.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)
    rewards: Collection[str] = ()

    def log_metric(self, name: str, value: float) -> None:
        """Append a value of a metric.

        Raises:
            ValueError: If a reward is logged under its name.
        """
        if name in self.rewards or name.removesuffix("/std") in self.rewards:
            raise ValueError(f"the name of log_metric must not be that of a reward, got {name!r}; choose another one")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Do nothing: TRL writes the column to its table of completions, which this library does not have."""


class Convention(Enum):
    """Who passes what; see the table of the module."""

    COMPLETION = "completion"
    TRL = "group, as TRL"
    TORCHTUNE = "group, as torchtune"
    POSITIONAL = "by position"


Kind = inspect._ParameterKind
NAMED = (Kind.POSITIONAL_OR_KEYWORD, Kind.KEYWORD_ONLY)
COMMON = {"trainer_state", "log_metric", "log_extra", "tokenizer"}
NAMES = {  # besides columns
    Convention.COMPLETION: COMMON | {"prompt", "completion", "completion_ids", "answer"},
    Convention.TRL: COMMON | {"prompts", "completions", "completion_ids", "answer", "answers"},
    Convention.TORCHTUNE: COMMON | {"prompts", "completions", "completion_ids", "answer", "answers", "device"},
    Convention.POSITIONAL: {"answer"},
}
OF_THE_GROUP = {"completions", "prompts", "completion_ids"}
NOT_COLUMNS = {"prompt", "completion", "completion_ids"}  # a column of this name is not passed to a group, as in TRL


@runtime_checkable
class RewardOutput(Protocol):
    """What torchtune's reward classes return: total_reward is [G]."""

    total_reward: torch.Tensor


def convention(function: Callable[..., Any]) -> Convention:
    """Return how a reward function is called, from its signature."""
    names, kinds = _names(function), set(_kinds(function).values())
    if "completion" in names:
        return Convention.COMPLETION
    if OF_THE_GROUP & set(names):
        return Convention.TORCHTUNE if "answers" in names and Kind.VAR_KEYWORD not in kinds else Convention.TRL
    return Convention.TRL if kinds == {Kind.VAR_KEYWORD} else Convention.POSITIONAL


def is_factory(function: Callable[..., Any]) -> bool:
    """Return whether a function takes nothing but its options, so that what it returns is the reward function."""
    return convention(function) is Convention.POSITIONAL and all(
        parameter.kind in NAMED and (parameter.default is not parameter.empty or name not in _names(function))
        for name, parameter in inspect.signature(function).parameters.items()
    )


def check_names(function: Callable[..., Any], columns: Collection[str]) -> None:
    """Check that a run provides everything that a reward function asks for.

    Args:
        function: The function, with its options.
        columns: The columns of the problems.

    Raises:
        TypeError: If it names neither a completion nor completions, and does not take two arguments by position.
        ValueError: If it asks for something else.
    """
    style, names = convention(function), _names(function)
    known = NAMES[style] | (set(columns) - NOT_COLUMNS)
    signature = inspect.signature(function)
    if style is Convention.POSITIONAL:
        try:
            signature.bind("", "")
        except TypeError as error:
            way_out = "a function without a parameter `completion` is called with completion and answer"
            raise TypeError(f"{error}; {way_out}") from None
        asked = [name for name in signature.parameters if name not in _fixed(function)][:2]
        if asked[0] in known or (known - {"answer"}) & set(asked):
            raise ValueError(f"it asks for {' and '.join(asked)}, but not for completion or completions")
        return
    for name in names:
        if name not in known and signature.parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"it asks for {name!r}, which is none of {', '.join(sorted(known))}")


def calls(function: Callable[..., Any], group: Group, run: Run, log: Log) -> Iterator[tuple[range, partial[Any]]]:
    """Return the calls of a reward function that score a group, each with the completions of the group that it scores.

    Raises:
        ValueError: If it asks for token ids and the group has none.
    """
    style, names, size = convention(function), _names(function), len(group.completions)
    if "completion_ids" in names and len(group.completion_ids) != size:
        raise ValueError(f"completion_ids must have one list per completion, {size}, got {len(group.completion_ids)}")
    if style is Convention.POSITIONAL:
        for i, completion in enumerate(group.completions):
            yield range(i, i + 1), partial(function, completion, group.problem.answer)
    elif style is Convention.COMPLETION:
        for i, completion in enumerate(group.completions):
            provided = {**group.problem.columns, **_common(run, log), "completion": completion}
            provided |= {"prompt": group.problem.prompt, "answer": group.problem.answer}
            if group.completion_ids:
                provided["completion_ids"] = list(group.completion_ids[i])
            yield range(i, i + 1), partial(function, **{name: provided[name] for name in names if name in provided})
    else:
        provided = _torchtune(group, run, names) if style is Convention.TORCHTUNE else _trl(group, run)
        provided = _columns(group) | _common(run, log) | provided
        passed = set(names)
        if Kind.VAR_KEYWORD in _kinds(function).values():
            passed |= provided.keys() - {"answers", "tokenizer"}  # all that TRL passes
        yield range(size), partial(function, **{name: provided[name] for name in provided if name in passed})


def _names(function: Callable[..., Any]) -> list[str]:
    """Return the parameters that can be passed by name, except options that are set."""
    return [name for name, kind in _kinds(function).items() if kind in NAMED and name not in _fixed(function)]


def _fixed(function: Callable[..., Any]) -> Collection[str]:
    """Return the names of the options that are set."""
    return function.keywords if isinstance(function, partial) else ()


def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}


def _common(run: Run, log: Log) -> dict[str, Any]:
    context = {"tokenizer": run.tokenizer, "trainer_state": run.trainer_state}
    return context | {"log_metric": log.log_metric, "log_extra": log.log_extra}


def _columns(group: Group) -> dict[str, Any]:
    columns = group.problem.columns.items()
    return {name: [value] * len(group.completions) for name, value in columns if name not in NOT_COLUMNS}


def _trl(group: Group, run: Run) -> dict[str, Any]:
    """Return a group as TRL passes it, with messages if prompts are messages."""
    size, prompt = len(group.completions), group.problem.prompt
    prompts: list[Any] = [prompt] * size
    completions: list[Any] = list(group.completions)
    if run.is_chat:
        prompts = [[{"role": "user", "content": prompt}] for _ in range(size)]
        completions = [[{"role": "assistant", "content": text}] for text in group.completions]
    answers = {"answer": [group.problem.answer] * size, "answers": [group.problem.answer] * size}
    ids = {"completion_ids": [list(tokens) for tokens in group.completion_ids]} if group.completion_ids else {}
    return {"prompts": prompts, "completions": completions} | answers | ids


def _torchtune(group: Group, run: Run, names: Collection[str]) -> dict[str, Any]:
    """Return a group as torchtune passes it: to a function with `tokenizer`, token ids [1, G, C] as completions."""
    size, problem = len(group.completions), group.problem
    completions: Any = list(group.completions)
    answers, ids = [problem.answer] * size, {}
    if {"tokenizer", "completion_ids"} & set(names):
        rows = [torch.tensor(tokens, dtype=torch.long) for tokens in group.completion_ids]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=run.tokenizer.pad_id)  # [G, C]
        ids = {"completion_ids": padded}
        if "tokenizer" in names:
            completions, answers = padded[None], [problem.answer]
    columns = {"completions": completions, "answers": answers, "answer": [problem.answer] * size}
    return {"prompts": [problem.prompt] * size, "device": torch.device("cpu")} | columns | ids


def read_values(function: Callable[..., Any], result: Any, count: int) -> list[float | None]:
    """Return the values of the completions that a call has scored, None where the reward does not apply.

    Args:
        function: The reward function.
        result: What it returned: a number for one completion (torchtune: a tuple of it and a success), a list, array
            or tensor for a group (torchtune: a tuple of [1, G] or [1, G, K] rewards and successes, or a RewardOutput).
        count: Completions that it was given.

    Raises:
        ValueError: If it is not one number, or None, per completion.
    """
    style = convention(function)
    if style in (Convention.COMPLETION, Convention.POSITIONAL):
        values = [result[0] if isinstance(result, tuple) else result]
    elif isinstance(result, RewardOutput):
        values = list(result.total_reward)
    elif style is Convention.TORCHTUNE and "tokenizer" in _names(function):
        values = list(result[0].reshape(count, -1).sum(-1))
    elif isinstance(result, str | bytes | Mapping | Set):
        raise ValueError(f"a reward of a group must be a list of numbers, got {type(result).__name__} {result!r:.80}")
    else:
        values = list(result)
    if len(values) != count:
        raise ValueError(f"a reward of a group must be one value per completion, {count}, got {len(values)}")
    return [None if value is None else _number(value) for value in values]


def _number(value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"a reward must be a number or None, got {type(value).__name__} {value!r:.80}") from None
