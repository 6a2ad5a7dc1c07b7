"""Tests of rewards: the built-in functions, components, and what a failing one reports."""

from __future__ import annotations

import doctest
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flexpg.training.rewards import (
    Reward,
    build_rewards,
    math_correct,
    number_closeness,
    number_correct,
    score,
)

PAGE = (Path(__file__).parents[1] / "docs/rewards.md").read_text()

# Numbers.


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (" 2+70000 = <<2+70000=70002>>70,002\n#### 70,002", "70002", 1.0),
        ("#### $1,234.00", "1,234", 1.0),
        ("####18.50", "18.5", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 3", "-3", 0.0),
        ("#### .5", "0.5", 1.0),
        ("#### 007", "7", 1.0),
        ("#### 5 apples out of 9", "5", 1.0),
        ("#### 6 #### 5", "5", 1.0),  # the last mark counts
        ("#### 5\n\nQuestion: next? #### 7", "5", 1.0),
        ("#### 6", "5", 0.0),
        ("it is 5", "5", 0.0),
        ("5 ####", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_number_correct_compares_the_number_after_the_last_mark(completion, answer, value):
    assert number_correct(completion, answer, until="\nQuestion:") == value


def test_number_closeness_falls_with_the_distance_of_the_last_number():
    assert number_closeness("100", "100") == number_closeness("1 + 99 = 100.", "100") == 1.0
    assert number_closeness("50", "100") == number_closeness("150", "100") == 2 / 3
    assert number_closeness("1", "0") == 0.5  # near 0 the distance itself counts
    assert number_closeness("no idea", "100") == 0.0
    assert number_closeness("text 100\nQuestion: 7", "100", until="\nQuestion:") == 1.0
    assert number_closeness("text 100\nQuestion: 7", "7") == 1.0


@given(st.integers(min_value=0, max_value=10**15), st.integers(min_value=0, max_value=4))
@settings(max_examples=60, deadline=None)
def test_thousands_commas_and_trailing_zeros_do_not_matter(number, zeros):
    text = f"#### ${number:,}{'.' + '0' * zeros if zeros else ''}."
    assert number_correct(text, str(number)) == number_closeness(text, str(number)) == 1.0
    assert number_correct(text, str(number + 1)) == 0.0


@given(st.text(alphabet=st.sampled_from("0123456789.,-+eE/\\{}$ %#boxedfrac\N{MINUS SIGN}٣²"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_completion_makes_a_number_reward_raise(completion):
    assert number_correct(completion, "5") in (0.0, 1.0)
    assert 0.0 <= number_closeness(completion, "5") <= 1.0


@pytest.mark.parametrize("unit", ["9", "9,", "1/", "-", ".", "$", "1.1", "#", "####", "1e", "$-"])
def test_number_rewards_take_time_linear_in_the_completion(unit):
    started = time.process_time()
    for completion in (unit * 10_000, "#### " + unit * 10_000):
        assert 0.0 <= number_correct(completion, "5") + number_closeness(completion, "5") < 1.0
    assert time.process_time() - started < 0.5  # 40,000 characters squared would take minutes


@pytest.mark.parametrize("function", [number_correct, number_closeness])
def test_answer_without_a_number_raises(function):
    with pytest.raises(ValueError, match="the answer must have a number, got 'Paris'"):
        function("#### 4", "Paris")


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"first \boxed{3}. So it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{3} or \boxed{4}", "4", 0.0),
        (r"\boxed{1{,}234}", "1234", 1.0),
        (r"\boxed{5} apples of 9", "5", 1.0),
        ("the answer is 72", "72", 1.0),
        (r"\boxed{71}, not 72", "72", 0.0),
        ("I do not know", "72", 0.0),
        ("", "72", 0.0),
        (r"\boxed{\boxed{", "72", 0.0),
    ],
)
def test_math_correct_compares_expressions_and_prefers_the_box(completion, answer, value):
    assert math_correct(completion, answer) == value


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
        ({"_component_": "no_such_module.f"}, "No module named 'no_such_module'"),
        ({"_component_": "flexpg.training.rewards.none"}, "No module named 'flexpg.training.rewards.none'"),
        ({"_component_": "flexpg.training.rewards"}, "is not a callable object"),
        ({"_component_": "flexpg.training.rewards.matches"}, "missing a required argument: 'pattern'"),
        ({"_component_": "flexpg.training.rewards.matches", "pattern": "a", "flags": 2}, "keyword argument 'flags'"),
        ({"_component_": "flexpg.training.rewards.number_correct", "weight": "much"}, "could not convert string"),
        ({"pattern": "a"}, "got None: '_component_'"),
    ],
)
def test_reward_that_cannot_be_built_is_named(options, message):
    with pytest.raises(ValueError, match=r"^reward 'mine' must be a function \(completion, answer\) -> float") as error:
        build_rewards({"mine": options})
    assert message in str(error.value)


def test_no_rewards_are_refused():
    with pytest.raises(ValueError, match="rewards must have at least one entry"):
        build_rewards({})


def test_docs_examples_run_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # as `tune run` and `python -m` do with the working directory
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(snippet)
    first, own = (
        build_rewards(OmegaConf.create(text).rewards) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    )
    assert score(first, ["#### 5", "x" * 899 + "6"], ["5", "5"])[0].tolist() == pytest.approx([1.3, 0.05])
    total, values = score(own, ["1+1=2\n2+3 = 5\n#### 5", "#### 5"], ["5", "5"])
    assert values["steps"].tolist() == pytest.approx([2 / 3, 0.0])
    assert total.tolist() == pytest.approx([1.2, 1.0])
    with pytest.raises(ValueError) as error:
        build_rewards({"steps": {"_component_": "my_rewards.shows_steps", "at_most": 3}})
    assert f"error: {error.value}\n" in PAGE
    del sys.modules["my_rewards"]
    (session,) = re.findall(r"```pycon\n(.*?)```", PAGE, re.DOTALL)
    parsed = doctest.DocTestParser().get_doctest(session, {}, "docs/rewards.md", None, 0)
    assert doctest.DocTestRunner().run(parsed).failed == 0


# Scoring.


def test_score_returns_the_weighted_sum_and_values_before_weighting():
    rewards = [
        Reward("one", lambda completion, answer: completion == "a"),
        Reward("length", lambda completion, answer: len(completion), -0.5),
        Reward("logged", lambda completion, answer: 3, 0),
    ]
    total, values = score(rewards, ["a", "bcd"], ["", ""])
    assert total.dtype == torch.float32 and total.tolist() == [0.5, -1.5]
    assert {name: column.tolist() for name, column in values.items()} == {
        "one": [1.0, 0.0],
        "length": [1.0, 3.0],
        "logged": [3.0, 3.0],
    }
    total, values = score(rewards, [], [])
    assert total.shape == values["one"].shape == (0,)


def test_exception_of_a_reward_is_raised_unchanged_under_a_line_of_context(capsys):
    def broken(completion: str, answer: str) -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as error:
        score([Reward("steps", broken)], [" 6+7=13"], ["13"], first=3)
    assert error.traceback[-1].name == "broken"
    line = capsys.readouterr().err
    assert line in PAGE and line == "error: reward 'steps', rollout 3, completion ' 6+7=13', answer '13'\n"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_or_inf_reward_raises(value, capsys):
    reward = Reward("mine", lambda completion, answer: value if completion == "b" else 1.0)
    message = f"rewards must be finite, got {value} from reward 'mine', rollout 5, completion 'b', answer '5'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        score([reward], ["a", "b"], ["5", "5"], first=4)
    assert capsys.readouterr().err == "error: reward 'mine', rollout 5, completion 'b', answer '5'\n"
