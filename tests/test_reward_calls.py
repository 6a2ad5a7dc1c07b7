"""Tests of what reward functions get: by name, as TRL and torchtune pass it, and async."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field

import pytest
import torch

from flexpg.training.reward_calls import Group, Run, TrainerState, check_names
from flexpg.training.rewards import Reward, build_rewards, reward_metrics, score
from flexpg.training.tasks import ByteTokenizer, Problem

PROBLEM = Problem("2+3=", "5", {"question": "2+3?", "solution": "5", "level": 3, "answer": "5 <- 2+3", "prompt": "?"})
TEXTS = ["5", "six"]
IDS = [[53, 258], [115, 105, 120, 258]]
RUN = Run(ByteTokenizer(), trainer_state=TrainerState(global_step=7, max_steps=9))


def values_of(function, run: Run = RUN, texts=TEXTS, ids=IDS) -> list[float]:
    (scores,) = score([Reward("mine", function)], [Group(PROBLEM, texts, ids)], run)
    return scores.values["mine"].tolist()


# By name.


def test_singular_names_are_passed_once_per_completion():
    seen = []

    def reward(completion_ids, completion, answer, prompt, level, trainer_state, tokenizer, *, floor=0.5):
        seen.append((completion_ids, completion, answer, prompt, level, trainer_state.global_step, tokenizer, floor))
        return len(completion)

    assert values_of(reward) == [1.0, 3.0]
    assert seen == [(ids, text, "5", "2+3=", 3, 7, RUN.tokenizer, 0.5) for ids, text in zip(IDS, TEXTS, strict=True)]


def test_options_of_a_completion_reward_are_all_that_its_kwargs_get(monkeypatch):
    def reward(completion, answer, level, **options):
        return level + sum(options.values())

    monkeypatch.setattr("recipes.grpo.reward", reward, raising=False)
    (built,) = build_rewards({"mine": {"_component_": "recipes.grpo.reward", "level": 10, "more": 1}}, [PROBLEM])
    assert values_of(built.function) == [11.0, 11.0]  # an option wins over the column `level`


@pytest.mark.parametrize(
    "function",
    [lambda text, truth: len(text) * (truth == "5"), lambda c, /, answer: len(c), lambda *texts: len(texts[0])],
)
def test_function_without_known_names_gets_completion_and_answer(function):
    check_names(function, PROBLEM.columns)
    assert values_of(function) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completion, difficulty: 0, "it asks for 'difficulty', which is none of answer, completion, "),
        (lambda completions, prompt_ids, **kwargs: 0, "it asks for 'prompt_ids', which is none of answer, answers, "),
        (lambda completions, prompt: 0, "it asks for 'prompt', which is none of answer, answers, "),
        (lambda completion, prompts: 0, "it asks for 'prompts', which is none of answer, "),
        (lambda answer, text: 0, "it asks for answer and text, but not for completion or completions"),
        (lambda text, level: 0, "it asks for text and level, but not for completion or completions"),
        (lambda text, answer, more: 0, "missing a required argument: 'more'"),
        (lambda text: 0, "too many positional arguments; a function without a parameter `completion` is called"),
    ],
)
def test_name_that_nobody_provides_is_an_error(function, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        check_names(function, {"level", "prompt"})


def test_column_that_some_problems_lack_is_not_provided(monkeypatch):
    monkeypatch.setattr("recipes.grpo.reward", lambda completion, level: level, raising=False)
    described = {"mine": {"_component_": "recipes.grpo.reward"}}
    assert len(build_rewards(described, [PROBLEM, PROBLEM])) == 1
    with pytest.raises(ValueError, match="it asks for 'level', which is none of "):
        build_rewards(described, [PROBLEM, Problem("", "")])


def test_reward_that_asks_for_token_ids_of_a_group_without_raises():
    with pytest.raises(ValueError, match="completion_ids must have one list per completion, 2, got 0"):
        values_of(lambda completion_ids: [0.0, 0.0], ids=())


# As TRL.


@pytest.mark.parametrize("is_chat", [False, True])
def test_trl_function_gets_what_grpo_trainer_passes(is_chat):
    seen = {}

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        kwargs["log_extra"]("length", [1, 3])
        kwargs["log_metric"]("words", 2.0)
        return [1, None]

    groups = [Group(PROBLEM, TEXTS, IDS), Group(PROBLEM, TEXTS, IDS)]
    scores = score([Reward("mine", reward), Reward("other", lambda completion: 0)], groups, Run(RUN.tokenizer, is_chat))
    assert scores[0].total.tolist() == [1.0, 0.0]
    assert reward_metrics(scores)["reward/words"] == 2.0
    assert seen.keys() == {
        *("prompts", "completions", "completion_ids", "question", "solution", "level", "answer"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    text = [[{"role": "assistant", "content": text}] for text in TEXTS] if is_chat else TEXTS
    prompt = [{"role": "user", "content": "2+3="}] if is_chat else "2+3="
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == ([prompt] * 2, text, IDS)
    assert (seen["level"], seen["answer"]) == ([3, 3], ["5", "5"])
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (0, 0)


def test_trl_rewards_work_from_a_configuration():
    described = {
        "accuracy": {"_component_": "trl.rewards.accuracy_reward"},
        "reasoning": {"_component_": "trl.rewards.reasoning_accuracy_reward", "reasoning_delimiters": ["</t>"]},
        "think": {"_component_": "trl.rewards.think_format_reward"},
        "overlong": {
            "_component_": "trl.rewards.get_soft_overlong_punishment",
            "max_completion_len": 10,
            "soft_punish_cache": 4,
        },
        "repetition": {"_component_": "trl.rewards.get_repetition_penalty_reward"},
        "cosine": {"_component_": "trl.rewards.get_cosine_scaled_reward", "max_len": 8},
    }
    rewards = build_rewards(described, [PROBLEM])
    texts = [r"<think>2+3</think> \boxed{5}", r"<t>2+3</t> \boxed{\frac{10}{2}}", r"\boxed{6}"]
    ids = [[1, 2, 3, 4], [1] * 8, [1] * 11]
    (scores,) = score(rewards, [Group(PROBLEM, texts, ids)], Run(is_chat=True))
    assert {name: values.tolist() for name, values in scores.values.items()} == {
        "accuracy": [1.0, 1.0, 0.0],
        "reasoning": [0.0, 1.0, 0.0],
        "think": [1.0, 0.0, 0.0],
        "overlong": [0.0, -0.5, -1.0],
        "repetition": pytest.approx([0.0, -5 / 6, -8 / 9]),
        "cosine": pytest.approx([0.75, 0.5, -0.5]),
    }


def test_trl_accuracy_is_none_where_the_solution_is_not_mathematics():
    (accuracy,) = build_rewards({"accuracy": {"_component_": "trl.rewards.accuracy_reward"}}, [PROBLEM])
    problem = Problem("", "", {"solution": "see the book"})
    (scores,) = score(
        [accuracy, Reward("one", lambda completion: 1)], [Group(problem, ["5"], [[1]])], Run(is_chat=True)
    )
    assert scores.values["accuracy"].isnan().all() and scores.total.tolist() == [1.0]


# As torchtune: functions with the signatures of its dev.rl and dev.grpo.


def correctness(answer: str, completion: str) -> tuple[float, float]:
    success = float(answer == completion)
    return 10 * success + len(completion), success


def batch_correctness(tokenizer, completions, answers) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, group_size, *_ = completions.shape
    rewards, successes = torch.zeros(batch_size, group_size), torch.zeros(batch_size, group_size)
    for b in range(batch_size):
        for g in range(group_size):
            text = tokenizer.decode(completions[b, g].tolist())
            rewards[b, g], successes[b, g] = correctness(answer=answers[b], completion=text)
    return rewards, successes


def batch_rewards(tokenizer, completions, answers, device) -> tuple[torch.Tensor, torch.Tensor, dict]:
    rewards, successes = batch_correctness(tokenizer, completions, answers)
    return torch.stack([rewards, torch.ones_like(rewards, device=device)], -1), successes[..., None], {}


@dataclass
class Output:
    """A RewardOutput."""

    reward_base_name: str
    total_reward: torch.Tensor
    successes: torch.Tensor
    rewards: dict[str, torch.Tensor] | None = field(default_factory=dict)


class Correctness:
    def __init__(self, positive_reward: float) -> None:
        self.positive_reward = positive_reward

    def __call__(self, completion_ids: torch.Tensor, completions: list[str], answers: list[str]) -> Output:
        assert completion_ids.tolist() == [[53, 258, 256, 256], [115, 105, 120, 258]]
        successes = torch.tensor([float(a == b) for a, b in zip(completions, answers, strict=True)])
        return Output("correctness", successes * self.positive_reward, successes)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize(
    ("function", "expected"),
    [(correctness, [11, 3]), (batch_correctness, [11, 3]), (batch_rewards, [12, 4]), (Correctness(2.0), [2, 0])],
    ids=["one", "batch", "several", "class"],
)
def test_torchtune_rewards_work_as_they_are(function, expected, is_chat):
    check_names(function, ())
    assert values_of(function, Run(ByteTokenizer(), is_chat)) == expected


# Async.


def test_async_rewards_of_all_groups_run_concurrently():
    running, most = 0, 0

    async def grade(completion, answer):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return len(completion)

    class Judge:
        async def __call__(self, completions, **kwargs):
            return [await grade(text, "") for text in completions]

    groups = [Group(PROBLEM, TEXTS, IDS) for _ in range(20)]
    started = time.perf_counter()
    scores = score([Reward("one", grade), Reward("sync", lambda completion: 1), Reward("group", Judge())], groups)
    assert time.perf_counter() - started < 2  # one after the other: 4 seconds
    assert most == 60
    assert [group.total.tolist() for group in scores] == [[3.0, 7.0]] * 20


def test_async_reward_keeps_its_event_loop_between_steps():
    loops = []

    async def reward(completion):
        loops.append(asyncio.get_running_loop())
        return 0.0

    for _ in range(2):
        values_of(reward)
    assert len(set(loops)) == 1 and len(loops) == 4

    async def notebook():
        return values_of(reward)

    assert asyncio.run(notebook()) == [0.0, 0.0]  # a loop that runs already, as in Jupyter


def test_exception_of_an_async_reward_names_reward_and_rollout(capsys):
    cancelled = []

    async def reward(completion):
        if completion == "six":
            raise LookupError("no answer")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(completion)
            raise

    with pytest.raises(LookupError, match="no answer") as error:
        values_of(reward)
    assert error.traceback[-1].name == "reward"
    assert capsys.readouterr().err == "error: reward 'mine', rollout 1, completion 'six', answer '5'\n"
    time.sleep(0.1)
    assert cancelled == ["5"]
