"""A report counts what brute force counts."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexpg.analysis.flops import ModelShape, activation_bytes, update_flops
from flexpg.analysis.report import report, rollouts_from_lengths
from flexpg.analysis.rollout_files import read_rollouts
from flexpg.analysis.work import Work, encoded_work, packed_work, recomputed_tokens
from flexpg.packing import pack
from flexpg.rollouts import Rollouts

SOLUTIONS = Path(__file__).parents[2] / "shared/data/gsm8k/example_model_solutions.jsonl"
SHAPE = ModelShape(2, 8, 2, 1, 4, 16, 50, 576)
PROMPTS = [[*range(20)], [*range(10), *range(30, 35)]]  # ten tokens in common
COMPLETIONS = [[[1, 2, 3], [1, 2, 4, 5], [6], [6]], [[7, 8], [9]]]
ROLLOUTS = Rollouts.from_groups(PROMPTS, COMPLETIONS, rewards=[[0.0] * 4, [0.0] * 2])


def count_trie(sequences):
    """Count the tokens of a trie by position: every distinct prefix is a token, which sees as many as it is long."""
    prefixes = {tuple(sequence[:t]) for sequence in sequences for t in range(1, len(sequence) + 1)}
    return by_position([len(prefix) - 1 for prefix in prefixes])


def count_separately(sequences):
    return by_position([t for sequence in sequences for t in range(len(sequence))])


def by_position(positions):
    return Work(torch.tensor([positions.count(position) for position in range(max(positions) + 1)]))


def count_prompts_once(groups):
    """Give each prompt and each completion tokens of its own, so that nothing but the prompt is shared."""
    return count_trie(
        [(g, token) for token in prompt] + [(g, c, token) for token in completion]
        for g, (prompt, completions) in enumerate(groups)
        for c, completion in enumerate(completions)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_report_by_group_size_counts_first_completions_of_every_prompt(checkpointing):
    found = report(ROLLOUTS, SHAPE, itemsize=4, activation_checkpointing=checkpointing)
    assert [row["group_size"] for row in found.by_group_size] == [1, 2, 4]
    for row in found.by_group_size:
        groups = [(prompt, members[: row["group_size"]]) for prompt, members in zip(PROMPTS, COMPLETIONS, strict=True)]
        sequences = [prompt + tokens for prompt, members in groups for tokens in members]
        loss_tokens = sum(len(tokens) for _, members in groups for tokens in members)
        assert row["rollouts"] == len(sequences)
        for name, work in {
            "baseline": count_separately(sequences),
            "prompts_once": count_prompts_once(groups),
            "shared": count_trie(sequences),
        }.items():
            options = {"activation_checkpointing": checkpointing}
            counts = {
                "tokens": work.num_tokens,
                "pairs": work.num_pairs,
                "flops": update_flops(work, loss_tokens, SHAPE, **options).total,
                "activation_bytes": activation_bytes(work.num_tokens, loss_tokens, SHAPE, itemsize=4, **options),
            }
            assert counts.items() <= row[name].items()
            if name != "baseline":
                assert all(row[name][f"{key}_ratio"] == row["baseline"][key] / counts[key] for key in counts)
    assert found.by_group_size[-1] == {"group_size": 4, **found.total}


def test_report_by_group_size_ends_with_the_largest_group():
    sizes = [row["group_size"] for row in report(ROLLOUTS.select([0, 1, 2, 4]), SHAPE).by_group_size]
    assert sizes == [1, 2, 3]
    assert report(ROLLOUTS.select([4, 0, 5, 1, 2, 3]), SHAPE).by_group_size == report(ROLLOUTS, SHAPE).by_group_size


def test_report_counts_logits_only_of_tokens_in_the_loss():
    mask = ROLLOUTS.loss_mask.clone()
    mask[0, 1:] = False
    full, masked = report(ROLLOUTS, SHAPE), report(replace(ROLLOUTS, loss_mask=mask), SHAPE)
    assert (full.loss_tokens, masked.loss_tokens) == (12, 10)
    logits = update_flops(Work(torch.tensor([0])), 2, SHAPE).total
    assert full.total["shared"]["flops"] - masked.total["shared"]["flops"] == logits > 0


def test_report_by_max_tokens_counts_micro_batches_and_recomputed_tokens():
    found = report(ROLLOUTS, SHAPE, max_tokens=[1000, 30, 30, 23])
    too_small, small, large = found.by_max_tokens
    assert too_small == {"max_tokens": 23} and (found.longest, found.longest_tokens) == ("rollout 1", 24)
    assert (small["max_tokens"], large["max_tokens"]) == (30, 1000)
    assert (large["micro_batches"], large["recomputed_tokens"], large["tokens"]) == (1, 0, 34)
    assert (small["micro_batches"], small["recomputed_tokens"], small["tokens"]) == (2, 10, 44)  # what prompts share
    assert (small["baseline_micro_batches"], large["baseline_micro_batches"]) == (6, 1)
    assert small["activation_bytes"] < large["activation_bytes"] < large["baseline_activation_bytes"]
    assert 1 < small["flops_ratio"] < large["flops_ratio"] == found.total["shared"]["flops_ratio"]
    assert large["activation_bytes"] == found.total["shared"]["activation_bytes"]


def test_report_of_oversized_group_counts_its_cached_prompt_once():
    group = ROLLOUTS.select([0, 1, 2])  # 20 tokens of prompt, and 2 + 1 + 2 + 1
    batches = pack(group, 24)
    assert len(batches) > 1 and {batch.cached_tokens for batch in batches} == {20}
    row, whole = report(group, SHAPE, max_tokens=[24, 100]).by_max_tokens
    assert (row["micro_batches"], row["tokens"]) == (len(batches), encoded_work(batches).num_tokens)
    assert row["recomputed_tokens"] == recomputed_tokens(batches) <= 2  # what completions have in common
    prompt = update_flops(Work(torch.ones(20, dtype=torch.int64)), 0, SHAPE).total
    flops = [update_flops(packed_work(b.tree), int(b.loss_mask.sum()), SHAPE).total for b in batches]
    assert row["flops"] == sum(flops) - (len(batches) - 1) * prompt
    assert row["activation_bytes"] < whole["activation_bytes"]


def test_report_names_recurrent_layers_and_windows():
    shape = replace(SHAPE, attention_layers=1, recurrent_layers=1, windowed_layers=1, window=512)
    assert "model: 2 layers (1 recurrent, 1 with a window of 512) of width 8" in printed(report(ROLLOUTS, shape))


def test_report_of_lengths_shares_prompts_only():
    found = report(rollouts_from_lengths([20, 15], [[3, 4, 1, 1], [2, 1]]), SHAPE)
    expected = report(ROLLOUTS, SHAPE).total
    assert found.total["baseline"] == expected["baseline"]
    assert found.total["shared"] == found.total["prompts_once"] == expected["prompts_once"]


def test_report_as_dict_is_json():
    plain = report(ROLLOUTS, SHAPE, max_tokens=[23, 1000]).as_dict()
    assert json.loads(json.dumps(plain)) == plain


def printed(found):
    console = pytest.importorskip("rich.console").Console(width=100)
    with console.capture() as captured:
        console.print(found.table())
    return captured.get()


def test_report_tables_of_large_numbers_fit_100_columns():
    large = dict.fromkeys(("tokens", "images", "pairs", "flops"), 10**16) | {"activation_bytes": 2**54}
    large |= {f"{name}_ratio": 123.4 for name in [*large]}
    total = {"rollouts": 1_234_567, "baseline": large, "prompts_once": large, "shared": large}
    packed = {"max_tokens": 1_048_576, "flops_ratio": 123.4, "activation_bytes": 2**40 - 1}
    packed |= dict.fromkeys(("baseline_micro_batches", "micro_batches", "tokens", "recomputed_tokens"), 12_345_678_901)
    found = replace(
        report(ROLLOUTS, SHAPE, max_tokens=[23]),
        total=total,
        by_group_size=[{"group_size": size, **total} for size in (1, 1024)],
        by_max_tokens=[packed, {"max_tokens": 23}],
    )
    text = printed(found)
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    assert "12.3 G" in text and "does not fit: rollout 1 has 24 tokens" in text
    html = found._repr_html_()
    assert html.count("<table>") == 3 and "<td>12.3 G</td>" in html


def test_report_omits_the_group_size_table_for_groups_of_one():
    found = report(ROLLOUTS.select([0, 4]), SHAPE)
    assert len(found.by_group_size) == 1
    assert "By group size" not in printed(found) and "By group size" not in found._repr_html_()
    assert "By group size" in printed(report(ROLLOUTS, SHAPE))


def test_report_omits_the_group_size_table_for_turns_of_conversations():
    names = [f"line {n}, turn {n % 2}" for n in range(len(ROLLOUTS))]
    found = report(ROLLOUTS, SHAPE, names=names)
    assert found.by_group_size == [] and "By group size" not in printed(found)
    assert found.total == report(ROLLOUTS, SHAPE).total


@pytest.mark.skipif(not SOLUTIONS.exists(), reason="the GSM8K solutions of four models are not here")
def test_report_of_real_gsm8k_solutions_shares_their_questions(tmp_path):
    with open(tmp_path / "solutions.jsonl", "w") as file:
        for row in map(json.loads, SOLUTIONS.read_text(encoding="utf-8").splitlines()[:40]):
            solutions = [value["solution"] for value in row.values() if isinstance(value, dict)]
            print(json.dumps({"prompt": row["question"] + "\n", "completions": solutions}), file=file)
    rollouts, _ = read_rollouts(tmp_path / "solutions.jsonl", encode=lambda text: list(text.encode()))
    found = report(rollouts, ModelShape(24, 896, 14, 2, 64, 4864, 151936, 14_909_440))
    assert (len(rollouts), found.prompts, [row["group_size"] for row in found.by_group_size]) == (160, 40, [1, 2, 4])
    prompt, completion = found.prompt_tokens, found.completion_tokens
    assert found.total["baseline"]["tokens"] == 4 * prompt + completion
    assert found.total["prompts_once"]["tokens"] == prompt + completion
    assert 0.95 * (prompt + completion) < found.total["shared"]["tokens"] < prompt + completion
    ratios = [row["shared"]["flops_ratio"] for row in found.by_group_size]
    assert 1 <= ratios[0] < ratios[1] < ratios[2] < 2
    row = found.by_max_tokens[0]
    assert row["baseline_micro_batches"] > row["micro_batches"] > 1
    assert row["recomputed_tokens"] < 0.01 * row["tokens"]  # groups are not split


@pytest.mark.parametrize("checkpointing", [False, True])
def test_report_by_ranks_divides_activations_and_adds_what_is_gathered(checkpointing):
    found = report(
        ROLLOUTS,
        SHAPE,
        max_tokens=[64],
        itemsize=4,
        activation_checkpointing=checkpointing,
        context_parallel=3,
        budget_bytes=100_000,
    )
    largest = ROLLOUTS.select(range(4))
    tokens, loss_tokens = largest.tree.num_tokens, largest.num_loss_tokens
    assert [row["ranks"] for row in found.by_ranks] == [1, 2, 3]
    for row in found.by_ranks:
        ranks = row["ranks"]
        kept = activation_bytes(
            math.ceil(tokens / ranks),
            loss_tokens,
            SHAPE,
            itemsize=4,
            activation_checkpointing=checkpointing,
        )
        keys = tokens * 2 * 1 * 4 * 4  # one key/value head of 4, in float32
        layers = 1 if checkpointing else 2
        assert row["activation_bytes"] == kept + (keys * (layers + 2) if ranks > 1 else 0)

        def total(prompt: int, ranks: int = ranks) -> int:
            whole = rollouts_from_lengths([prompt], [largest.completion_lens.tolist()])
            options = {"itemsize": 4, "activation_checkpointing": checkpointing, "context_parallel": ranks}
            return report(whole, SHAPE, **options).by_ranks[-1]["activation_bytes"] if ranks > 1 else -1

        if ranks > 1:
            assert total(row["largest_prompt"]) <= 100_000 < total(row["largest_prompt"] + 1)
    assert found._tables()[-1][1][0] == "ranks"
    assert not report(ROLLOUTS, SHAPE, max_tokens=[64]).by_ranks
