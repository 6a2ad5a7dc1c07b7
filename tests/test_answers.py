r"""Tests of answers: every spelling in spellings.py, GSM8K with real model solutions, and what no text may break."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spellings import BOXED, MARKED, SPELLINGS

from flexpg.training.answers import marked_number
from flexpg.training.rewards import math_correct, number_closeness, number_correct

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"


def check_spelling(reward: Callable[[str, str], float], text: str, value: str | None, misreadings: tuple[str, ...]):
    rewarded = [answer for answer in misreadings if reward(text, answer) != 0.0]
    assert not rewarded
    assert value is None or reward(text, value) == 1.0


AFTER_THE_MARK = [(f"#### {spelling}", *rest) for spelling, *rest in SPELLINGS] + MARKED
IN_A_BOX = [(f"\\boxed{{{spelling}}}", *rest) for spelling, *rest in SPELLINGS] + BOXED


@pytest.mark.parametrize(
    ("text", "value", "misreadings"), AFTER_THE_MARK, ids=[ascii(text) for text, *_ in AFTER_THE_MARK]
)
def test_number_correct_reads_spelling(text, value, misreadings):
    assert marked_number(text) == (None if value is None else Fraction(value))
    check_spelling(number_correct, text, value, misreadings)


@pytest.mark.parametrize(("text", "value", "misreadings"), IN_A_BOX, ids=[ascii(text) for text, *_ in IN_A_BOX])
def test_math_correct_reads_spelling(text, value, misreadings):
    check_spelling(math_correct, text, value, misreadings)


@pytest.mark.parametrize("spelling", [spelling for spelling, value, _ in SPELLINGS if value == "7/2"])
def test_answer_of_the_data_is_read_like_a_completion(spelling):
    assert number_correct("#### 3.5", spelling) == math_correct(r"\boxed{3.5}", spelling) == 1.0
    assert number_correct("#### 3.1", spelling) == math_correct(r"\boxed{3.1}", spelling) == 0.0


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"\boxed{5x}", "5", 0.0),
        (r"\boxed{5 m^2 x}", "5", 0.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1.0),
        (r"\boxed{18}", r"\$18", 1.0),
        (r"\boxed{1{,}000\pi}", r"1000\pi", 1.0),
        (r"\boxed{10 000\pi}", r"10000\pi", 1.0),
        (r"\boxed{10 000\pi}", "0", 0.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{0.333333}", r"\frac{1}{3}", 1.0),  # six places
        (r"\boxed{3} and \boxed{456}", "3456", 0.0),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        (r"\boxed{(1, 2)}", "(2, 1)", 0.0),
    ],
)
def test_math_correct_leaves_expressions_to_math_verify(completion, answer, value):
    assert math_correct(completion, answer) == value


def test_math_correct_answer_that_is_no_expression_raises():
    with pytest.raises(ValueError, match="the answer must be an expression that math-verify reads, got ''"):
        math_correct(r"\boxed{5}", "")


def test_math_correct_works_outside_the_main_thread():
    """math-verify's timeouts are signals, which only the main thread can set."""
    found = []
    thread = threading.Thread(target=lambda: found.append(math_correct(r"\boxed{\frac{x}{2}}", r"\frac{x}{2}")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_number_correct_reads_a_completion_up_to_until():
    completion = "#### 5\n\nQuestion: next? #### 7"
    assert number_correct(completion, "5", until="\nQuestion:") == number_correct(completion, "7") == 1.0


def official_answer(text: str) -> str | None:
    """Return what the rule of GSM8K's authors extracts."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found and found[1].replace(",", "")


def gsm8k_lines(name: str) -> list[dict]:
    file = GSM8K / f"{name}.jsonl"
    if not file.exists():
        pytest.skip("GSM8K is not on this machine")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("split", ["test", "train"])
def test_number_correct_agrees_with_gsm8k_rule_on_its_answers(split):
    texts = [row["answer"] for row in gsm8k_lines(split)]
    for text, other in zip(texts, texts[1:] + texts[:1], strict=True):
        answer = text.rpartition("#### ")[2]
        assert number_correct(text, answer) == 1.0
        assert number_correct(other, answer) == (official_answer(other) == official_answer(text))


def test_number_correct_agrees_with_labels_of_real_model_solutions():
    checked = 0
    for row in gsm8k_lines("example_model_solutions"):
        answer = row["ground_truth"].rpartition("\nA: ")[2]
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution, _, final = row[model]["solution"].rpartition("A:")  # what the models write for ####
            assert number_correct(f"{solution}####{final}", answer) == row[model]["is_correct"], row[model]
            checked += 1
    assert checked == 5276


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
    assert time.process_time() - started < 2.0  # 40,000 characters squared would take minutes


@pytest.mark.parametrize("function", [number_correct, number_closeness])
def test_answer_without_a_number_raises(function):
    with pytest.raises(ValueError, match="the answer must be a number, got 'Paris'"):
        function("#### 4", "Paris")


def test_number_closeness_reads_signs_fractions_and_groups():
    for text in ("so it is -7/2", "it is -3\u00bd", "3 + 4 = - 3.5", "from 12 to \u22123 1/2 units"):
        assert number_closeness(text, "-3.5") == 1.0
    assert number_closeness("7 - 5", "5") == number_closeness("from 3-5", "5") == 1.0  # operators and dashes
    assert number_closeness("about 12 000 m^2", "12000") == 1.0
