"""Samples of a run to read: the best and the worst episode of a few problems, as text with rewards.

They go to the terminal, to a file of JSON lines, and to W&B or TensorBoard if one of these is the metric logger.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtune.training.metric_logging import TensorBoardLogger, WandBLogger

from flexpg.training.causal_lm import CheckpointTokenizer
from flexpg.training.episodes import Episode
from flexpg.training.prompts import completion_text
from flexpg.training.rewards import Scores
from flexpg.training.tasks.problem import Problem

PROMPT_CHARS, COMPLETION_CHARS = 70, 90  # of a sample in the terminal


@dataclass(frozen=True)
class Sample:
    """One episode as text.

    Attributes:
        step: The step that it was sampled in.
        prompt: The problem's prompt, before the prompt format is applied.
        answer: The problem's answer.
        completion: What follows the prompt, without the last stop token; of several turns, all of them, with
            the special tokens that a checkpoint's chat template writes between messages.
        rewards: The value of each reward before weighting; None where it does not apply.
        reward: The weighted sum.
        advantage: The advantage that it is trained with.
        completion_tokens: Tokens that were sampled, with stop tokens.
        is_truncated: Whether a limit on tokens ended it.
    """

    step: int
    prompt: str
    answer: str
    completion: str
    rewards: dict[str, float | None]
    reward: float
    advantage: float
    completion_tokens: int
    is_truncated: bool


def best_and_worst(
    step: int,
    problem: Problem,
    episodes: Sequence[Episode],
    scores: Scores,
    advantages: Sequence[float],
    tokenizer: Any,
) -> list[Sample]:
    """Return the episodes of a problem with the highest and the lowest reward, in this order.

    Args:
        step: The step.
        problem: The problem.
        episodes: G episodes, at least two.
        scores: Their rewards.
        advantages: The advantage of each.
        tokenizer: A torchtune tokenizer, or one with its methods.
    """
    rewards = scores.total.tolist()
    order = sorted(range(len(episodes)), key=lambda n: -rewards[n])
    return [
        Sample(
            step=step,
            prompt=problem.prompt,
            answer=problem.answer,
            completion=_episode_text(tokenizer, episodes[n]),
            rewards={name: _number(values[n]) for name, values in scores.values.items()},
            reward=rewards[n],
            advantage=advantages[n],
            completion_tokens=sum(len(turn.completion) for turn in episodes[n].turns),
            is_truncated=not episodes[n].is_finished,
        )
        for n in (order[0], order[-1])
    ]


def samples_of_step(
    step: int,
    scored: Sequence[tuple[Problem, Sequence[Episode], Scores]],
    advantages: Tensor,
    tokenizer: Any,
    num_problems: int = 2,
) -> list[Sample]:
    """Return the best and the worst episode of a step's first problems.

    Args:
        step: The step.
        scored: Its problems, each with G episodes and their rewards.
        advantages: [problems, G] float.
        tokenizer: A torchtune tokenizer, or one with its methods.
        num_problems: How many problems to show.
    """
    return [
        sample
        for (problem, episodes, scores), values in zip(scored[:num_problems], advantages.tolist(), strict=False)
        for sample in best_and_worst(step, problem, episodes, scores, values, tokenizer)
    ]


class SamplesLog:
    """The file of a run's samples, one JSON object on each line.

    Args:
        path: The file; samples of steps that a resumed run repeats are removed, and a line that was cut off.
        steps_done: Completed steps.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        self.path = path
        kept = [sample for sample in read_samples(path) if sample.step <= steps_done]
        if path.exists():
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text("".join(map(_line, kept)), encoding="utf-8")
            os.replace(unfinished, path)

    def write(self, samples: Sequence[Sample], metric_logger: Any) -> None:
        """Append samples of a step to the file, and pass them to the metric logger if it takes text."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, samples)))
        step, rows = samples[0].step, [asdict(sample) for sample in samples]
        if isinstance(metric_logger, WandBLogger):
            wandb = metric_logger._wandb  # the module; torchtune's loggers have methods for numbers only
            cells = [[_cell(value) for value in row.values()] for row in rows]
            wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=cells), "global_step": step})
        elif isinstance(metric_logger, TensorBoardLogger):
            metric_logger._writer.add_text("samples", "\n\n---\n\n".join(map(_markdown, samples)), step)


def read_samples(path: Path) -> list[Sample]:
    """Return the samples in a file, none if it does not exist; a last line that was cut off is left out.

    Raises:
        ValueError: If a line is not that of a sample.
    """
    if not path.exists():
        return []
    samples = []
    with path.open(encoding="utf-8") as file:  # other line ends than \n may be in a text
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n") or not line.strip():
                continue
            try:
                samples.append(Sample(**json.loads(line)))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number} must be a sample that the recipe wrote, got {line[:80]!r}; delete the line "
                    "or move the file"
                ) from error
    return samples


def format_samples(samples: Sequence[Sample]) -> str:
    r"""Return samples for a terminal: the end of each prompt, and one line per completion.

    >>> print(format_samples([Sample(3, "Add.\n2+2=", "4", "#### 4", {"correct": 1.0}, 1.0, 0.7, 7, False)]))
    step    3  'Add.\n2+2='
      reward 1.000 (correct 1)  advantage +0.70  7 tokens  '#### 4'
    """
    lines = []
    for (step, prompt), group in groupby(samples, key=lambda sample: (sample.step, sample.prompt)):
        tail = prompt if len(prompt) <= PROMPT_CHARS else f"...{prompt[-PROMPT_CHARS:]}"
        lines.append(f"step {step:>4}  {tail!r}")
        lines += [f"  {format_rewards(sample)}  {_shorten(sample.completion)!r}" for sample in group]
    return "\n".join(lines)


def format_rewards(sample: Sample) -> str:
    """Return the rewards, the advantage and the length of a sample in one line."""
    values = ", ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in sample.rewards.items())
    length = f"{sample.completion_tokens:,} tokens{', truncated' if sample.is_truncated else ''}"
    return f"reward {sample.reward:.3f} ({values})  advantage {sample.advantage:+.2f}  {length}"


def _shorten(text: str) -> str:
    """Return a text without its middle if it is long; answers are at the end."""
    half = COMPLETION_CHARS // 2
    return text if len(text) <= COMPLETION_CHARS else f"{text[:half]} ... {text[-half:]}"


def _episode_text(tokenizer: Any, episode: Episode) -> str:
    """Return the text after the first prompt: the completion, or all turns with what the environment answered."""
    first, last = episode.turns[0], episode.turns[-1]
    tokens = [*last.prompt[len(first.prompt) :].tolist(), *last.completion.tolist()]
    if len(episode.turns) > 1 and isinstance(tokenizer, CheckpointTokenizer):  # its special tokens separate messages
        return tokenizer.decode_all(tokens[:-1] if tokens[-1] in tokenizer.stop_tokens else tokens)
    return completion_text(tokenizer, tokens)


def _number(value: Tensor) -> float | None:
    return None if math.isnan(number := value.item()) else number


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample)) + "\n"


def _cell(value: Any) -> Any:
    """Return a value as a column of one type: rewards that do not apply would make a column of several."""
    return json.dumps(value) if isinstance(value, dict) else value


def _markdown(sample: Sample) -> str:
    """Return a sample as Markdown, with its texts as code, which nothing in them can end."""
    parts = (sample.prompt, f"answer: {sample.answer}", format_rewards(sample), sample.completion)
    return "\n\n".join("\n".join(f"    {line}" for line in part.splitlines()) for part in parts)
