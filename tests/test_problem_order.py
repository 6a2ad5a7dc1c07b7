"""Which problems a step asks is a function of seed and step."""

from __future__ import annotations

from flexpg.training.problem_order import ProblemOrder, derive_seed


def test_every_problem_is_asked_once_before_any_is_asked_again():
    order = ProblemOrder(seed=0, count=5)
    asked = [problem for step in range(1, 11) for problem in order.of_step(step, 3)]
    rounds = [asked[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(each) == [0, 1, 2, 3, 4] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert order.of_step(7, 3) == asked[18:21]  # whatever was asked before
    assert [ProblemOrder(1, 5).of_step(step, 3) for step in range(1, 6)] != [order.of_step(n, 3) for n in range(1, 6)]


def test_replacements_are_other_problems():
    order = ProblemOrder(seed=0, count=8)
    found = order.replacements([3, 5], 4, "resampling 1 of step 2")
    assert len({*found, 3, 5}) == 6
    assert sorted(order.replacements([3, 5], 99, "all")) == [0, 1, 2, 4, 6, 7]
    assert found == order.replacements([3, 5], 4, "resampling 1 of step 2")
    assert found != order.replacements([3, 5], 4, "resampling 1 of step 3")


def test_seeds_depend_on_run_and_purpose():
    assert len({derive_seed(seed, purpose) for seed in (0, 1) for purpose in ("step 1", "step 2")}) == 4
