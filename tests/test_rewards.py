"""Tests of rewards: the built-in functions, components, and what a failing one reports."""

from __future__ import annotations

import doctest
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from flexpg.training.episodes import Episode, Turn, build_rollouts, episode_advantages
from flexpg.training.reward_calls import Group
from flexpg.training.rewards import Reward, build_rewards, reward_metrics, score
from flexpg.training.tasks import Problem

PAGE = (Path(__file__).parents[1] / "docs/rewards.md").read_text()


def group_of(completions: list[str], answer: str = "5", first: int = 0) -> Group:
    return Group(Problem("2+3=", answer), completions, [list(text.encode()) for text in completions], first)


# Components.


class Novelty:
    """A reward with state: 1 for a completion that was not seen before."""

    def __init__(self, bonus: float) -> None:
        self.bonus, self.seen = bonus, set()

    def __call__(self, completion: str, answer: str) -> float:
        is_new = completion not in self.seen
        self.seen.add(completion)
        return self.bonus * is_new


def test_reward_component_may_be_a_function_or_a_class_with_state(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    found, novelty = build_rewards(
        {
            "format": {"_component_": "flexpg.training.rewards.matches", "weight": 0.2, "pattern": "a"},
            "novelty": {"_component_": "my_rewards.Novelty", "bonus": 2.0},
        }
    )
    assert (found.name, found.weight, found.function("cat", ""), found.function("dog", "")) == ("format", 0.2, 1.0, 0.0)
    assert novelty.weight == 1.0 and [novelty.function(text, "") for text in ("a", "b", "a")] == [2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_component_": "no_such_module.f"}, "there is no module no_such_module in the environment or in "),
        ({"_component_": "flexpg.training.rewards.none"}, "/training/rewards.py has no none"),
        ({"_component_": "flexpg.training.rewards"}, "must be a function or class, got module "),
        ({"_component_": "flexpg.training.tasks.arithmetic"}, "is not a callable object"),  # returns a list
        ({"_component_": "flexpg.training.rewards.matches"}, "it asks for 'pattern', which is none of answer, "),
        ({"_component_": "flexpg.training.rewards.matches", "pattern": "a", "flags": 2}, "keyword argument 'flags'"),
        ({"_component_": "flexpg.training.rewards.number_correct", "untill": "x"}, "'untill'; did you mean until?"),
        ({"pattern": "a"}, "got None: '_component_'"),
    ],
)
def test_reward_that_cannot_be_built_is_named(options, message):
    with pytest.raises(ValueError, match=r"^reward 'mine' must be a reward function with options \{") as error:
        build_rewards({"mine": options})
    assert message in str(error.value)


@pytest.mark.parametrize("weight", ["much", math.nan, math.inf, None], ids=str)
def test_weight_of_a_reward_that_is_not_finite_is_named(weight):
    with pytest.raises(ValueError, match=f"weight of reward 'mine' must be a finite number, got {weight!r}"):
        build_rewards({"mine": {"_component_": "flexpg.training.rewards.number_correct", "weight": weight}})


def test_no_rewards_are_refused():
    with pytest.raises(ValueError, match="rewards must have at least one entry"):
        build_rewards({})


def test_docs_examples_run_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # as `tune run` and `python -m` do with the working directory
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text("\n".join(snippets))
    problem = Problem("", "5", {"level": 3, "solution": "5"})
    first, plain, asking, trl = (
        build_rewards(OmegaConf.create(text).rewards, [problem])
        for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    )
    (scores,) = score(first, [group_of(["#### 5", "x" * 899 + "6"])])
    assert scores.total.tolist() == pytest.approx([1.3, 0.05])
    (scores,) = score(plain, [group_of(["1+1=2\n2+3 = 5\n#### 5", "#### 5"])])
    assert scores.values["steps"].tolist() == pytest.approx([2 / 3, 0.0])
    assert scores.total.tolist() == pytest.approx([1.2, 1.0])
    (scores,) = score(asking, [Group(problem, ["It is 5.", "4", "4"])])
    assert scores.total.tolist() == pytest.approx([2.1, 0.0, 0.0])
    assert [reward.name for reward in trl] == ["accuracy", "format", "overlong"]
    question = Problem("", "5", {"question": "2+3?"})
    for name, options in (
        ("steps", {"_component_": "my_rewards.shows_steps", "at_most": 3}),
        ("hard", {"_component_": "my_rewards.hard_only"}),
    ):
        with pytest.raises(ValueError) as error:
            build_rewards({name: options}, [question])
        assert f"error: {error.value}\n" in PAGE
    del sys.modules["my_rewards"]
    (session,) = re.findall(r"```pycon\n(.*?)```", PAGE, re.DOTALL)
    parsed = doctest.DocTestParser().get_doctest(session, {}, "docs/rewards.md", None, 0)
    assert doctest.DocTestRunner().run(parsed).failed == 0


def test_trls_soft_overlong_punishment_is_that_of_dapo():
    options = {"max_completion_len": 10, "soft_punish_cache": 4, "weight": 0.5}
    rewards = build_rewards({"overlong": {"_component_": "trl.rewards.get_soft_overlong_punishment", **options}})
    (scores,) = score(rewards, [group_of(["x" * length for length in (1, 6, 7, 8, 10, 11)])])
    # DAPO, arXiv 2503.14476, eq. 13: 0 up to 10 - 4 tokens, -1 from 10 on, a line between.
    assert scores.values["overlong"].tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert scores.total.tolist() == [0.0, 0.0, -0.125, -0.25, -0.5, -0.5]


# Scoring.


def test_score_returns_the_weighted_sum_and_values_before_weighting():
    rewards = [
        Reward("one", lambda completion, answer: completion == "a"),
        Reward("length", lambda completion, answer: len(completion), -0.5),
        Reward("logged", lambda completion, answer: 3, 0),
    ]
    first, second = score(rewards, [group_of(["a", "bcd"]), group_of(["a"])])
    assert first.total.dtype == torch.float64 and first.total.tolist() == [0.5, -1.5] and second.total.tolist() == [0.5]
    assert {name: column.tolist() for name, column in first.values.items()} == {
        "one": [1.0, 0.0],
        "length": [1.0, 3.0],
        "logged": [3.0, 3.0],
    }
    assert score(rewards, []) == []


def test_none_adds_nothing_and_does_not_count_in_the_metrics():
    rewards = [
        Reward("long", lambda completion: len(completion) if completion != "a" else None),
        Reward("group", lambda completions, **kwargs: [None, 2.0, 3.0][: len(completions)], weight=10.0),
        Reward("one", lambda completion: 1.0),
        Reward("never", lambda completion: None),
    ]
    scores = score(rewards, [group_of(["a", "bc", "def"]), group_of(["a"])])
    assert [group.total.tolist() for group in scores] == [[1.0, 23.0, 34.0], [1.0]]
    assert scores[0].values["long"].isnan().tolist() == [True, False, False]
    assert reward_metrics(scores) == {
        "reward/long": 2.5,
        "reward/long/std": pytest.approx(0.5**0.5),
        "reward/group": 2.5,
        "reward/group/std": pytest.approx(0.5**0.5),
        "reward/one": 1.0,
        "reward/one/std": 0.0,
    }


def test_rollout_whose_rewards_are_all_none_raises():
    rewards = [Reward(name, lambda completion: None if completion == "b" else 1.0) for name in ("x", "y")]
    message = "a rollout must have a reward that is not None, got None from 'x', 'y' for rollout 5, completion 'b', "
    with pytest.raises(ValueError, match=f"^{message}answer '5'$"):
        score(rewards, [group_of(["a", "b"], first=4)])


def test_exception_of_a_reward_is_raised_unchanged_under_a_line_of_context(capsys):
    def broken(completion: str, answer: str) -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as error:
        score([Reward("steps", broken)], [group_of([" 6+7=13"], "13", first=3)])
    assert error.traceback[-1].name == "broken"
    line = capsys.readouterr().err
    assert line in PAGE and line == "error: reward 'steps', rollout 3, completion ' 6+7=13', answer '13'\n"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("of_group", [False, True], ids=["completion", "group"])
def test_nan_or_inf_reward_raises(value, of_group, capsys):
    one, group = lambda completion, answer: value if completion == "b" else 1.0, lambda completions: [1.0, value]
    message = f"rewards must be finite, got {value} from reward 'mine', rollout 5, completion 'b', answer '5'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        score([Reward("mine", group if of_group else one)], [group_of(["a", "b"], first=4)])
    assert capsys.readouterr().err == "error: reward 'mine', rollout 5, completion 'b', answer '5'\n"


def test_reward_or_sum_beyond_float32_names_the_reward():
    with pytest.raises(
        ValueError, match=r"^rewards must be at most 3.4e\+38, the largest float32, got 1e\+300 from rew"
    ):
        score([Reward("mine", lambda completion: 1e300)], [group_of(["a"])])
    with pytest.raises(
        ValueError, match=r"^the weighted sum of rewards must be at most 3.4e\+38, got .* from 'mine' for"
    ):
        score([Reward("mine", lambda completion: 1e38, weight=-10.0)], [group_of(["a"])])


def test_sums_that_differ_by_rounding_are_equal():
    rewards = [Reward(name, lambda completion: completion == "a", weight) for name, weight in (("x", 0.1), ("y", 0.2))]
    rewards.append(Reward("z", lambda completion: completion == "b", 0.3))
    (scores,) = score(rewards, [group_of(["a", "b"])])
    assert 0.1 + 0.2 != 0.3 and scores.total.tolist() == [0.3, 0.3]


def test_rewards_that_differ_beyond_float32_have_advantages():
    offset = Reward("offset", lambda completions: [1e8 + n for n in range(len(completions))])
    (scores,) = score([offset], [group_of(["a", "b", "c"])])
    turns = [Turn(torch.tensor([1]), torch.tensor([2]), torch.zeros(1), True) for _ in range(3)]
    episodes = [Episode([turn], is_finished=True) for turn in turns]
    data = build_rollouts([episodes], scores.total[None], torch.device("cpu"), with_logprobs=False)
    advantages = episode_advantages(data, "none")
    assert advantages.tolist() == [-1.0, 0.0, 1.0] and advantages.dtype == torch.float32


@pytest.mark.parametrize("name", ["correct", "correct/std", "environment"])
def test_logged_metric_with_the_name_of_a_reward_is_refused(name):
    def logs(completion, log_metric):
        log_metric(name, 1.0)
        return 0.0

    with pytest.raises(ValueError, match=f"the name of log_metric must not be that of a reward, got '{name}'"):
        score([Reward("correct", logs)], [group_of(["a"])])


@pytest.mark.parametrize("values", [{0: 5.0, 1: 7.0}, {1.0, 0.0}, "10"], ids=str)
def test_rewards_of_a_group_without_order_raise(values):
    with pytest.raises(ValueError, match=f"a reward of a group must be a list of numbers, got {type(values).__name__}"):
        score([Reward("mine", lambda completions: values)], [group_of(["a", "b"])])


@pytest.mark.parametrize("value", ["good", "1.0", {"score": 1}, [1.0, 0.0]], ids=str)
def test_reward_of_another_type_raises(value, capsys):
    message = re.escape(f"a reward must be a number or None, got {type(value).__name__} {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        score([Reward("mine", lambda completion: value)], [group_of(["a"], first=4)])
    assert capsys.readouterr().err == "error: reward 'mine', rollout 4, completion 'a', answer '5'\n"


def test_exception_in_a_group_names_its_rollouts(capsys):
    with pytest.raises(ValueError, match="one value per completion, 2, got 1"):
        score([Reward("mine", lambda completions: [1.0])], [group_of(["a", "b"], first=4)])
    assert capsys.readouterr().err == "error: reward 'mine', rollouts 4 to 5, answer '5'\n"
