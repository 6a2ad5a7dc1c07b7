"""Datasets and rewards with the signatures of torchtune's GRPO recipes are usable as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from flexpg.training.prompts import prompt_tokens
from flexpg.training.reward_calls import Group, Run
from flexpg.training.rewards import build_rewards, score
from flexpg.training.tasks import ByteTokenizer, Problem, gsm8k, torchtune_dataset

ROOT = Path(__file__).parent.parent


# Datasets.


class BosTokenizer(ByteTokenizer):
    """ByteTokenizer that adds the beginning-of-sequence token by default, as torchtune's tokenizers do."""

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        return super().encode(text, add_bos, add_eos)


class Questions(Dataset):
    """A dataset with the items of torchtune's RLDataset."""

    def __init__(self, tokenizer: BosTokenizer, *, add_bos: bool = True, without: str | None = None) -> None:
        self.tokenizer, self.add_bos, self.without = tokenizer, add_bos, without

    def __len__(self) -> int:
        return 5

    def __getitem__(self, n: int) -> dict[str, Any]:
        question = f"User: {n}+1? Assistant: <think>"
        tokens = self.tokenizer.encode(question, add_bos=self.add_bos, add_eos=False)
        item = {"question": question, "tokens": tokens, "mask": [1] * len(tokens), "answer": str(n + 1), "level": n}
        return {name: value for name, value in item.items() if name != self.without}


TOKENIZER, QUESTIONS = {"_component_": "recipes.grpo.tokenizer"}, {"_component_": "recipes.grpo.dataset"}


@pytest.fixture
def components(monkeypatch):
    """Names by which configurations find this file's classes."""
    monkeypatch.setattr("recipes.grpo.tokenizer", BosTokenizer, raising=False)
    monkeypatch.setattr("recipes.grpo.dataset", Questions, raising=False)


def test_torchtune_dataset_gives_the_prompts_of_its_items(components):
    problems = torchtune_dataset(QUESTIONS, TOKENIZER, skip=1, size=3)
    assert problems[0] == Problem("User: 1+1? Assistant: <think>", "2", {"level": 1}) and len(problems) == 3
    items = Questions(BosTokenizer())
    for n, problem in enumerate(problems, 1):
        assert prompt_tokens(BosTokenizer(), problem.prompt, "bos") == items[n]["tokens"]


@pytest.mark.parametrize(
    ("options", "skip", "message"),
    [
        (
            {"add_bos": False},
            0,
            "the tokens of item 0 of the dataset must be its question with a beginning-of-sequence",
        ),
        ({"without": "answer"}, 0, "item 0 of the dataset must have question, tokens and answer, got no answer"),
        ({}, 5, "the dataset must have more than 5 items, got 5"),
    ],
)
def test_torchtune_dataset_with_other_items_raises(options, skip, message, components):
    with pytest.raises(ValueError, match=message):
        torchtune_dataset(QUESTIONS | options, TOKENIZER, skip=skip)


def test_gsm8k_partition_takes_the_rows_of_torchtunes_filter():
    source = str(ROOT / "recipes/assets/gsm8k_sample.jsonl")
    rows = [problem.prompt for problem in gsm8k(source, shots=0)]
    taken = [problem.prompt for problem in gsm8k(source, shots=0, partition="1-7/9", skip=2)]
    assert taken == [row for n, row in enumerate(rows) if 1 <= n % 9 <= 7][2:]
    shown = gsm8k(source, shots=1, partition="3-3/4")[0].prompt
    assert shown.startswith(rows[3]) and shown.endswith(rows[7])
    for wrong in ("1-9", "9-1/10", "1-10/10", "a-b/c"):
        with pytest.raises(ValueError, match="partition must be FIRST-LAST/TOTAL"):
            gsm8k(source, partition=wrong)


# Rewards with the signatures of torchtune.dev.rl.rewards.


@dataclass
class RewardOutput:
    reward_base_name: str
    total_reward: torch.Tensor
    successes: torch.Tensor
    rewards: dict[str, torch.Tensor] | None = field(default_factory=dict)


class TorchtuneReward(ABC):
    @abstractmethod
    def __call__(self, completion_ids: torch.Tensor, completions: list[str], answers: list[str]) -> RewardOutput: ...


class TaggedAnswerReward(TorchtuneReward):
    def __init__(self, answer_tag: str, positive_reward: float, negative_reward: float = 0.0) -> None:
        self.answer_tag, self.values = answer_tag, (negative_reward, positive_reward)

    def __call__(self, completion_ids: torch.Tensor, completions: list[str], answers: list[str]) -> RewardOutput:
        assert completion_ids.shape[0] == len(completions) == len(answers)
        tag = self.answer_tag
        right = [f"<{tag}>{answer}</{tag}>" in text for text, answer in zip(completions, answers, strict=True)]
        rewards = torch.tensor([self.values[is_right] for is_right in right])
        return RewardOutput("tagged", rewards, (rewards == self.values[1]).float(), {"tag": rewards})


def batched(tokenizer, completions, answers, device) -> tuple[torch.Tensor, torch.Tensor, dict]:
    texts = [[tokenizer.decode(row.tolist()) for row in group] for group in completions]
    pairs = zip(texts, answers, strict=True)
    found = torch.tensor([[[len(text), answer in text] for text in texts] for texts, answer in pairs])
    return found.to(device), found.clamp(max=1), {"func_names": ["length", "correct"]}


def test_torchtune_rewards_sum_to_torchtunes_reward(monkeypatch):
    monkeypatch.setattr("recipes.grpo.TaggedAnswerReward", TaggedAnswerReward, raising=False)
    monkeypatch.setattr("recipes.grpo.batched", batched, raising=False)
    component = {"_component_": "recipes.grpo.TaggedAnswerReward", "answer_tag": "answer"}
    described = {
        "one": component | {"positive_reward": 10.0},
        "other": component | {"positive_reward": 1.0, "negative_reward": -1.0},
        "batched": {"_component_": "recipes.grpo.batched"},
    }
    texts, problem = ["</think><answer>5</answer>", "5"], Problem("2+3", "5")
    ids = [[*text.encode(), 258] for text in texts]
    (scores,) = score(build_rewards(described, [problem]), [Group(problem, texts, ids)], Run(ByteTokenizer()))
    assert scores.total.tolist() == [10 + 1 + len(texts[0]) + 1, 0 - 1 + 1 + 1]
