"""The report counts what brute force counts, and a broken line of its file is named with its number."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from flexpg.__main__ import main
from flexpg.analysis.flops import Cost, ModelShape, activation_bytes, shared_cost, update_flops
from flexpg.analysis.report import Comparison, Packed, Work, report, short_bytes, short_count
from flexpg.analysis.rollout_files import read_rollouts
from flexpg.conversations import Conversation, conversation_rollouts
from flexpg.packing import encoded_tokens, pack, recomputed_tokens
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

ROOT = Path(__file__).parent.parent
TINY, TINY_YAML = ROOT / "recipes/assets/tiny", ROOT / "recipes/configs/tiny_cpu.yaml"
SOLUTIONS = Path(__file__).parents[2] / "shared/data/gsm8k/example_model_solutions.jsonl"
SHAPE = ModelShape(2, 8, 2, 1, 4, 16, 50, 576)
PROMPTS = [[*range(20)], [*range(10), *range(30, 35)]]  # ten tokens in common
COMPLETIONS = [[[1, 2, 3], [1, 2, 4, 5], [6], [6]], [[7, 8], [9]]]
GROUPS = [group for group, own in enumerate(COMPLETIONS) for _ in own]
ROLLOUTS = Rollouts(
    [torch.tensor(prompt) for prompt in PROMPTS],
    [torch.tensor(completion) for own in COMPLETIONS for completion in own],
    torch.tensor(GROUPS),
    torch.zeros(6),
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Six."},
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def chat_folder(tmp_path):
    """A tokenizer with a chat template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    shutil.copy(TINY / "tokenizer.json", folder)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def write(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def counted(sequences):
    """Tokens and pairs of a trie: every different beginning is a token, which sees as many as it is long."""
    beginnings = {tuple(sequence[:t]) for sequence in sequences for t in range(1, len(sequence) + 1)}
    return Cost(len(beginnings), sum(map(len, beginnings)))


def unshared(sequences):
    return Cost(sum(map(len, sequences)), sum(t for sequence in sequences for t in range(1, len(sequence) + 1)))


def prompts_once(groups):
    """Each completion gets tokens of its own, so that nothing but the prompt is shared, and each prompt, too."""
    sequences = [
        [(g, token) for token in prompt] + [(g, c, token) for token in completion]
        for g, (prompt, completions) in enumerate(groups)
        for c, completion in enumerate(completions)
    ]
    return counted(sequences)


def expected_work(cost, predicted, **options):
    return (
        cost.tokens,
        cost.attention_pairs,
        update_flops(cost, predicted, SHAPE, **options).total,
        activation_bytes(cost, predicted, SHAPE, itemsize=4, **options),
    )


def values(work):
    return (work.tokens, work.attention_pairs, work.flops, work.activation_bytes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_group_size_counts_the_first_completions_of_every_prompt(checkpointing):
    found = report(ROLLOUTS, SHAPE, itemsize=4, activation_checkpointing=checkpointing)
    assert list(found.by_group_size) == [1, 2, 4]
    for size, each in found.by_group_size.items():
        groups = [(prompt, own[:size]) for prompt, own in zip(PROMPTS, COMPLETIONS, strict=True)]
        sequences = [prompt + tokens for prompt, own in groups for tokens in own]
        predicted = sum(len(tokens) for _, own in groups for tokens in own)
        assert each.rollouts == len(sequences)
        for way, cost in (
            (each.unshared, unshared(sequences)),
            (each.prompts_once, prompts_once(groups)),
            (each.tree, counted(sequences)),
        ):
            assert values(way) == expected_work(cost, predicted, activation_checkpointing=checkpointing)
    assert found.by_group_size[4] == found.whole


def test_the_largest_group_is_shown_if_it_is_no_power_of_two():
    assert list(report(ROLLOUTS.select([0, 1, 2, 4]), SHAPE).by_group_size) == [1, 2, 3]
    assert list(report(ROLLOUTS.select([0, 4]), SHAPE).by_group_size) == [1]


def test_rollouts_of_a_group_need_not_stand_together():
    order = [4, 0, 5, 1, 2, 3]
    assert report(ROLLOUTS.select(order), SHAPE).by_group_size == report(ROLLOUTS, SHAPE).by_group_size


def test_only_trained_tokens_have_logits():
    mask = ROLLOUTS.completion_mask.clone()
    mask[0, 1:] = False
    masked = Rollouts(ROLLOUTS.prompts, ROLLOUTS.completions, ROLLOUTS.group_ids, ROLLOUTS.rewards, mask)
    with_all, without = report(ROLLOUTS, SHAPE), report(masked, SHAPE)
    assert (with_all.trained_tokens, without.trained_tokens) == (12, 10)
    logits = [update_flops(Cost(0, 0), predicted, SHAPE).total for predicted in (12, 10)]
    assert with_all.whole.tree.flops - without.whole.tree.flops == logits[0] - logits[1] > 0


def test_a_budget_counts_its_micro_batches_and_what_they_encode_again():
    found = report(ROLLOUTS, SHAPE, max_tokens=[1000, 30, 30]).by_max_tokens
    assert list(found) == [30, 1000]
    small, large = found[30], found[1000]
    assert (large.micro_batches, large.recomputed_tokens, large.tokens) == (1, 0, 34)
    assert (small.micro_batches, small.recomputed_tokens, small.tokens) == (2, 10, 44)  # what the prompts share
    assert (small.unshared_micro_batches, large.unshared_micro_batches) == (6, 1)
    assert small.peak_activation_bytes < large.peak_activation_bytes < large.unshared_peak_activation_bytes
    assert 1 < small.expected_speedup < large.expected_speedup
    whole = report(ROLLOUTS, SHAPE).whole
    assert large.flops == whole.tree.flops and large.expected_speedup == whole.unshared.flops / whole.tree.flops
    assert large.peak_activation_bytes == whole.tree.activation_bytes
    batches = pack(ROLLOUTS, 30)
    flops = [update_flops(shared_cost(each.tree), int(each.rollouts.trained.sum()), SHAPE).total for each in batches]
    assert small.flops == sum(flops)


def test_a_group_over_the_budget_has_its_prompt_encoded_once():
    alone = ROLLOUTS.select([0, 1, 2])  # 20 tokens of prompt, and 2 + 1 + 2 + 1
    batches = pack(alone, 24)
    assert len(batches) > 1 and {batch.prefix_tokens for batch in batches} == {20}
    found = report(alone, SHAPE, max_tokens=[24, 100]).by_max_tokens
    assert found[24].tokens == encoded_tokens(batches)
    assert found[24].recomputed_tokens == recomputed_tokens(batches) <= 2  # what completions have in common
    prompt = update_flops(Cost(20, 210), 0, SHAPE).total
    flops = [update_flops(shared_cost(each.tree), int(each.rollouts.trained.sum()), SHAPE).total for each in batches]
    assert found[24].flops == sum(flops) - (len(batches) - 1) * prompt
    assert found[24].micro_batches == len(batches)
    assert found[24].peak_activation_bytes < found[100].peak_activation_bytes


def test_a_budget_below_the_longest_rollout_names_it():
    assert report(ROLLOUTS, SHAPE, max_tokens=[23]).by_max_tokens == {23: "rollout 1 has 24 tokens"}
    named = report(ROLLOUTS, SHAPE, max_tokens=[23], names=[f"line {n}" for n in range(6)])
    assert named.by_max_tokens == {23: "line 1 has 24 tokens"}


@pytest.mark.parametrize(
    "tree",
    [
        PrefixTree.from_sequences(ROLLOUTS.sequences),
        PrefixTree.from_groups(PROMPTS, COMPLETIONS),
        PrefixTree.from_lengths([20, 15], [[3, 4, 1, 1], [2, 1]]),
    ],
)
def test_a_tree_is_reported_as_the_row_that_it_is(tree):
    found = report(tree, SHAPE, prompt_lens=ROLLOUTS.prompt_lens)
    assert found.whole.tree.tokens == tree.num_tokens
    assert found.whole.tree.attention_pairs == int((tree.position_ids[: tree.num_tokens] + 1).sum())
    assert found.whole.unshared == report(ROLLOUTS, SHAPE).whole.unshared
    assert (found.prompts, found.trained_tokens) == (2, 12)


def test_the_dict_is_plain_and_holds_the_ratios():
    found = report(ROLLOUTS, SHAPE, max_tokens=[23, 1000])
    plain = found.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["tree"]["expected_speedup"] == found.whole.unshared.flops / found.whole.tree.flops
    assert plain["tree"]["tokens_ratio"] == plain["unshared"]["tokens"] / 34
    assert plain["by_group_size"][0]["group_size"] == 1
    assert plain["by_max_tokens"][0] == {"max_tokens": 23, "not_possible": "rollout 1 has 24 tokens"}
    assert isinstance(found.by_max_tokens[1000], Packed)


def test_counts_are_written_short():
    assert [short_count(n) for n in (0, 999, 1000, 9994, 9996, 999_499, 999_600)] == [
        *("0", "999", "1.00 k", "9.99 k", "10.0 k", "999 k", "1.00 M")
    ]
    assert short_bytes(1023 * 2**20) == "1.00 GiB" and short_bytes(2**60) == "1024 PiB"


def test_a_table_of_millions_of_tokens_fits_a_hundred_columns():
    rich = pytest.importorskip("rich.console")
    found = report(ROLLOUTS, SHAPE, max_tokens=[23, 100])
    large = Work(12_345_678_901, 10**18, 10**21, 2**44)
    whole = Comparison(1_234_567, large, large, large)
    packed = Packed(1_234_567, 12_345_678_901, 12_345_678_901, 1, 2**40 - 1, 1_234_567, 1, 123.4)
    found = replace(found, whole=whole, by_group_size={1024: whole}, by_max_tokens={1_048_576: packed})
    console = rich.Console(width=100)
    with console.capture() as captured:
        console.print(found.table())
    assert "…" not in captured.get() and max(map(len, captured.get().splitlines())) <= 100
    assert "12.3 G" in captured.get()


GOOD = {"prompt": [1, 2], "completions": [[3]]}


def test_equal_prompts_are_one_group_wherever_they_stand(tmp_path):
    rows = [
        {"prompt": [1, 2], "completions": [[3], [4, 5]]},
        {"prompt": [9], "completion": [3], "id": "not looked at"},
        {"prompt": [1, 2], "completion": [6]},
    ]
    rollouts, names = read_rollouts(write(tmp_path / "rollouts.jsonl", rows[0], b"", *rows[1:]))
    assert [prompt.tolist() for prompt in rollouts.prompts] == [[1, 2], [9]]
    assert [completion.tolist() for completion in rollouts.completions] == [[3], [4, 5], [3], [6]]
    assert rollouts.group_ids.tolist() == [0, 0, 1, 0]
    assert rollouts.trained.sum(1).tolist() == [1, 2, 1, 1]
    assert names == ["line 1, completions[0]", "line 1, completions[1]", "line 3", "line 4"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "rollouts.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read_rollouts(tmp_path / "rollouts.jsonl")[0]) == 1


@pytest.mark.parametrize("per_turn", [False, True])
def test_conversations_are_those_of_conversation_rollouts(per_turn, chat_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    chat = transformers.AutoTokenizer.from_pretrained(chat_folder)
    other = [CHAT[0], {"role": "assistant", "content": "4"}]
    path = write(tmp_path / "rollouts.jsonl", {"messages": CHAT, "reward": 1}, {"messages": other})
    rollouts, names = read_rollouts(path, chat=chat, per_turn=per_turn)
    wanted, _ = conversation_rollouts([Conversation(CHAT, 1.0), Conversation(other)], chat, per_turn=per_turn)
    assert [tokens.tolist() for tokens in rollouts.sequences] == [tokens.tolist() for tokens in wanted.sequences]
    assert torch.equal(rollouts.trained, wanted.trained) and torch.equal(rollouts.group_ids, wanted.group_ids)
    assert torch.equal(rollouts.rewards, wanted.rewards)
    assert names == (["line 1, turn 0", "line 1, turn 1", "line 2, turn 0"] if per_turn else ["line 1", "line 2"])


def texts(path):
    """Two prompts with two completions each, as texts of a byte per token."""
    rows = [{"prompt": f"{n} + {n} =", "completions": [f" {2 * n}", f" {n}, no"]} for n in (1, 2)]
    return write(path, *rows)


@pytest.mark.parametrize("model", [TINY, TINY / "config.json", TINY_YAML], ids=["folder", "config.json", "yaml"])
def test_the_command_prints_a_table_and_draws_a_picture(model, tmp_path, capsys):
    pytest.importorskip("torchtune" if model.suffix == ".yaml" else "transformers")
    texts(tmp_path / "rollouts.jsonl")
    bytes_alone = ["--tokenizer", "bytes"] if model.suffix == ".yaml" else []
    main(["report", "rollouts.jsonl", "--model", str(model), "--max-tokens", "8,64", "--json", "r.json", *bytes_alone])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "4 rollouts of 2 prompts: 14 prompt tokens, 16 completion tokens, 16 of them trained" in out
    assert "4 layers of width 128, vocabulary 260" in out
    assert "not possible: line 1, completions[1] has 13 tokens" in " ".join(out.split())
    assert "…" not in out  # nothing is cut
    assert out.splitlines()[-2:] == ["numbers: r.json", "picture: report.png"]
    assert imread("report.png").std() > 0.05
    rollouts, names = read_rollouts(tmp_path / "rollouts.jsonl", encode=lambda text: list(text.encode()))
    written = json.loads(Path("r.json").read_text())
    shape = ModelShape(**written["model"])
    assert (shape.num_layers, shape.embed_dim, shape.intermediate_dim, shape.vocab_size) == (4, 128, 384, 260)
    assert written == report(rollouts, shape, max_tokens=[8, 64], names=names).as_dict()


def test_conversations_need_a_tokenizer_with_a_chat_template(chat_folder, tmp_path, capsys):
    pytest.importorskip("transformers")
    write(tmp_path / "chats.jsonl", {"messages": CHAT})
    command = ["report", "chats.jsonl", "--model", str(TINY), "--out", "chats.svg"]
    with pytest.raises(
        SystemExit, match=r"^error: chats.jsonl, line 1: messages need a tokenizer with a chat template"
    ):
        main(command)
    main([*command, "--tokenizer", str(chat_folder)])
    assert "1 rollouts of 1 prompts" in capsys.readouterr().out
    main([*command, "--tokenizer", str(chat_folder), "--per-turn"])
    assert "2 rollouts of 2 prompts" in capsys.readouterr().out
    assert Path("chats.svg").read_text().startswith("<?xml")


@pytest.mark.skipif(not SOLUTIONS.exists(), reason="the GSM8K solutions of four models are not here")
def test_four_real_solutions_of_each_problem_share_their_question(tmp_path):
    rows = []
    for line in SOLUTIONS.read_text(encoding="utf-8").splitlines()[:40]:
        row = json.loads(line)
        solutions = [value["solution"] for value in row.values() if isinstance(value, dict)]
        rows.append({"prompt": row["question"] + "\n", "completions": solutions})
    path = write(tmp_path / "solutions.jsonl", *rows)
    rollouts, _ = read_rollouts(path, encode=lambda text: list(text.encode()))
    found = report(rollouts, ModelShape(24, 896, 14, 2, 64, 4864, 151936, 14_909_440))
    assert (found.whole.rollouts, found.prompts, list(found.by_group_size)) == (160, 40, [1, 2, 4])
    prompt, completion = found.prompt_tokens, found.completion_tokens
    assert found.whole.unshared.tokens == 4 * prompt + completion
    assert found.whole.prompts_once.tokens == prompt + completion
    assert 0.95 * (prompt + completion) < found.whole.tree.tokens < prompt + completion  # they begin alike, at times
    speedups = [each.unshared.flops / each.tree.flops for each in found.by_group_size.values()]
    assert 1 <= speedups[0] < speedups[1] < speedups[2] < 2
    packed = [each for each in found.by_max_tokens.values() if isinstance(each, Packed)]
    assert len(packed) == 4 and packed[0].unshared_micro_batches > packed[0].micro_batches > 1
    assert packed[0].recomputed_tokens < 0.01 * packed[0].tokens  # groups stay whole
