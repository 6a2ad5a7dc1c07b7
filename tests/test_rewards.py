"""Rewards: what the built-in functions read, how functions are found, and what a failing one says."""

from __future__ import annotations

import doctest
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpg.training.rewards import (
    Reward,
    RewardError,
    final_number,
    matches,
    number_closeness,
    number_correct,
    reward,
    score,
    short_enough,
)

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()


# --- numbers


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (" 2+70000 = <<2+70000=70002>>70,002\n#### 70,002", "70002", 1.0),
        ("#### $1,234.00", "1,234", 1.0),
        ("so she pays $18.50.", "18.5", 1.0),
        ("#### 5\n\nQuestion: next? Answer: 7", "5", 1.0),
        ("it is 5.\n\nQuestion: next? Answer: 7", "5", 1.0),
        ("it is 5.\n\nQuestion: next? Answer: \\boxed{7}", "5", 1.0),
        ("#### -3", "-3", 1.0),
        ("10-3", "3", 1.0),
        ("#### 5 apples out of 9", "5", 1.0),
        ("#### 6", "5", 0.0),
        ("5 ####", "5", 0.0),
        ("none", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_a_number_is_correct_however_it_is_written(completion, answer, value):
    assert number_correct(completion, answer, until="\nQuestion:") == value


def test_text_after_until_counts_when_until_is_not_given():
    assert number_correct("it is 5.\nQuestion: next? Answer: 7", "7") == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # which number
        (r"1 \boxed{2} then \boxed{3} #### 4 and 5", 3),
        (r"\boxed{\text{about } 1{,}234}", 1234),
        (r"\boxed{\frac{1}{2}} or {3}", "1/2"),
        (r"\boxed{12\text{ cm}^2}", 12),
        (r"\boxed{\boxed{7}}", 7),
        (r"\boxed {8}", 8),
        (r"\boxed{\} 9}", 9),
        (r"\boxed{5} and \boxed{6", 5),
        (r"\boxed{5", 5),
        (r"} 4 } {", 4),
        (r"\boxed{} 5", None),
        ("#### 5 #### 6", 5),
        ("1, 2 and 3", 3),
        # how it is written
        ("+5", 5),
        ("\N{MINUS SIGN}5", -5),
        ("-$5", -5),
        ("$-5", -5),
        (r"\$-1\,234", -1234),
        (r"-\$5", -5),
        ("x=-3", -3),
        ("GPT-4", 4),
        ("(10)-3", 3),
        ("50%", 50),
        (r"50\%", 50),
        ("5.", 5),
        ("5.00", 5),
        (".5", "1/2"),
        ("so...5", 5),
        ("1,234,567.89.", "123456789/100"),
        ("1,2,3", 3),
        ("1,2345", 2345),
        ("007", 7),
        ("1e3", 1000),
        ("2.5E-1 g", "1/4"),
        ("1/2", "1/2"),
        ("-3 / 4", "-3/4"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"\frac{ 3 }{ 4 }", "3/4"),
        ("1,000/4", 250),
        ("٣", 3),
        # what is no number
        ("5/0", None),
        (r"\frac{5}{0}", None),
        ("inf", None),
        ("nan", None),
        ("1e99999", None),
        ("9" * 1001, None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == (None if number is None else Fraction(number))


@given(st.fractions(max_denominator=10**6), st.text(alphabet="abc $.,#{}\\-", max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_fraction_in_a_box_is_read_back_exactly(number, around):
    assert final_number(rf"{around} \boxed{{{number}}}") == number
    assert number_correct(rf"\boxed{{{number}}}", str(number)) == number_closeness(str(number), str(number)) == 1.0


@given(st.integers(min_value=0, max_value=10**15), st.integers(min_value=0, max_value=4))
@settings(max_examples=60, deadline=None)
def test_thousands_commas_and_trailing_zeros_do_not_matter(number, zeros):
    decimals = "." + "0" * zeros if zeros else ""
    assert number_correct(f"that is ${number:,}{decimals}.", str(number)) == 1.0
    assert number_correct(f"that is ${number:,}{decimals}.", str(number + 1)) == 0.0


@given(st.text(alphabet=st.sampled_from("0123456789.,-+eE/\\{}$ %#boxedfrac\N{MINUS SIGN}٣²"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_completion_makes_a_number_reward_raise(completion):
    assert number_correct(completion, "5") in (0.0, 1.0)
    assert 0.0 <= number_closeness(completion, "5") <= 1.0


HOSTILE = [
    "9" * 10_000,
    "9," * 10_000,
    "999," * 10_000 + "9999",
    "1/" * 10_000,
    "-" * 20_000,
    "." * 20_000,
    "$" * 20_000,
    "1.1" * 10_000,
    "1e" * 10_000,
    "1e999",
    "-1e9999",
    "\\boxed{" * 10_000,
    "\\boxed{" * 5_000 + "}" * 5_000,
    "\\boxed" + " " * 20_000,
    "\\frac{" * 10_000,
    "\\frac{" + "9" * 10_000 + "}{",
    "{,}" * 10_000,
    "#" * 20_000,
    "\\" * 20_001,
    "\x00\ud800",
]


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_are_scored_in_time_linear_in_their_length(completion):
    started = time.process_time()
    assert number_correct(completion, "5") == 0.0
    assert 0.0 <= number_closeness(completion, "5") < 1.0
    assert time.process_time() - started < 0.5  # 20,000 characters squared would take minutes


def test_closeness_falls_with_the_distance_relative_to_the_answer():
    assert number_closeness("100", "100") == 1.0
    assert number_closeness("50", "100") == number_closeness("150", "100") == 2 / 3
    assert number_closeness("1", "0") == 0.5  # near 0 the distance itself counts
    assert number_closeness("no idea", "100") == 0.0
    assert number_closeness("text 100\nQuestion: 7", "100", until="\nQuestion:") == 1.0


# --- format and length


def test_a_pattern_matches_anywhere_and_over_lines():
    assert matches("a\n#### 5\nb", "5", pattern=r"#### -?\d+") == 1.0
    assert matches("a\nb", "5", pattern="a.b") == 1.0
    assert matches("a\nb", "5", pattern="^b") == 0.0


def test_short_enough_is_1_up_to_the_limit_and_0_from_twice_the_limit():
    values = [short_enough("x" * length, "", max_chars=10) for length in (0, 10, 15, 20, 1000)]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]


# --- finding a function


def test_a_reward_is_its_function_with_the_options_filled_in():
    term = reward("format", "flexpg.training.rewards.matches", weight=0.2, pattern="a")
    assert (term.name, term.weight, term.function("cat", ""), term.function("dog", "")) == ("format", 0.2, 1.0, 0.0)


@pytest.fixture
def users_directory(tmp_path, monkeypatch):
    """An empty working directory that is not on sys.path; `my_rewards` is forgotten before and after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("my_rewards", None)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def test_the_users_module_is_found_in_the_working_directory_which_then_leaves_the_path(users_directory, monkeypatch):
    (users_directory / "my_rewards.py").write_text("def right(completion, answer):\n    return completion == answer\n")
    (users_directory / "colorsys.py").write_text("raise AssertionError('hid the standard library')\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    path = list(sys.path)
    assert score([reward("right", "my_rewards.right")], ["5", "6"], ["5", "5"])[0].tolist() == [1.0, 0.0]
    assert reward("hue", "colorsys.rgb_to_hsv", b=1).name == "hue"
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package", "No module named 'no_such_package'"),
        ("def right(:", r"invalid syntax \(my_rewards.py, line 1\)"),
        ("", "module 'my_rewards' has no attribute 'right'"),
    ],
)
def test_a_users_module_that_is_broken_says_what_is_wrong_in_it(users_directory, text, message):
    (users_directory / "my_rewards.py").write_text(text)
    with pytest.raises(
        ValueError, match=f"reward 'right': .*cannot be imported: {message}.*in the working directory, /"
    ):
        reward("right", "my_rewards.right")
    assert str(users_directory) not in sys.path


def test_the_pages_own_reward_runs_from_the_working_directory_with_its_yaml(users_directory):
    OmegaConf = pytest.importorskip("omegaconf").OmegaConf
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (users_directory / "my_rewards.py").write_text(snippet)
    first, own = (OmegaConf.create(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    terms = [reward(name, **options) for name, options in first.rewards.items()]
    assert score(terms, ["#### 5", "x" * 899 + "6"], ["5", "5"])[0].tolist() == pytest.approx([1.3, 0.05])
    terms = [reward(name, **options) for name, options in own.rewards.items()]
    total, values = score(terms, ["1+1=2\n2+3 = 5", "5"], ["5", "5"])
    assert values["steps"].tolist() == pytest.approx([2 / 3, 0.0])
    assert total.tolist() == pytest.approx([1.2, 1.0])
    with pytest.raises(ValueError) as error:
        reward("steps", "my_rewards.shows_steps", at_most=3)
    assert str(error.value) in PAGE


def test_the_pages_session_prints_what_it_shows():
    (session,) = re.findall(r"```pycon\n(.*?)```", PAGE, re.DOTALL)
    parsed = doctest.DocTestParser().get_doctest(session, {}, "docs/rewards.md", None, 0)
    assert doctest.DocTestRunner().run(parsed) == (0, 6)


# --- scoring


def test_the_total_is_the_weighted_sum_and_the_values_are_not_weighted():
    terms = [
        Reward("one", lambda c, a: 1),
        Reward("length", lambda c, a: len(c), -0.5),
        Reward("off", lambda c, a: 3, 0),
    ]
    total, values = score(terms, ["a", "bcd"], ["", ""])
    assert total.dtype == torch.float32 and total.tolist() == [0.5, -0.5]
    assert {name: column.tolist() for name, column in values.items()} == {
        "one": [1.0, 1.0],
        "length": [1.0, 3.0],
        "off": [3.0, 3.0],
    }


def test_true_and_false_are_1_and_0_and_no_rollouts_give_empty_columns():
    assert score([Reward("right", lambda c, a: c == a)], ["5", "6"], ["5", "5"])[0].tolist() == [1.0, 0.0]
    total, values = score([Reward("right", lambda c, a: c == a)], [], [])
    assert total.shape == values["right"].shape == (0,)


def test_a_function_that_raises_keeps_its_own_traceback():
    def broken(completion, answer):
        return 1 / 0

    with pytest.raises(RewardError) as error:
        score([Reward("steps", broken)], [" 6+7=13"], ["13"], first=3, count=16)
    assert str(error.value) in PAGE
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert error.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == "broken"
