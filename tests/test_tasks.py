"""Tasks, rewards, the byte tokenizer, and the committed tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexpg.tasks import ByteTokenizer, arithmetic, arithmetic_reward, gsm8k, gsm8k_reward
from flexpg.tasks.arithmetic import worked

ASSETS = Path(__file__).parents[1] / "recipes" / "assets"
SAMPLE = str(ASSETS / "gsm8k_sample.jsonl")


# --- tokenizer


@pytest.mark.parametrize("text", ["", "356+287:", "naïve 数学 🙂\r\n\x00", "<|eos|>"])
def test_any_utf8_text_round_trips(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_stand_after_the_bytes_and_are_left_out_of_the_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a", add_bos=True, add_eos=True)
    assert ids == [tokenizer.bos_id, 97, tokenizer.eos_id]
    assert tokenizer.decode(torch.tensor([*ids, tokenizer.pad_id])) == "a"
    assert sorted(tokenizer.special_tokens.values()) == list(range(256, tokenizer.vocab_size))


def test_broken_utf8_is_replaced_and_an_unknown_id_is_named():
    assert ByteTokenizer().decode([0xFF, 97]) == "\ufffda"
    with pytest.raises(ValueError, match="token id 260 is outside this tokenizer's 0 to 259"):
        ByteTokenizer().decode([97, 260])


def test_stop_tokens_are_the_end_of_sequence_and_the_stop_characters():
    assert ByteTokenizer().stop_tokens == [258, ord("\n")]
    assert ByteTokenizer(stop="").stop_tokens == [258]
    with pytest.raises(ValueError, match="must be ASCII"):
        ByteTokenizer(stop="。")


def message(role: str, text: str, masked: bool) -> SimpleNamespace:
    return SimpleNamespace(role=role, content=[{"type": "text", "content": text}], masked=masked)


def test_messages_become_tokens_with_torchtunes_mask():
    messages = [message("user", "1+1:", True), message("assistant", "2", False)]
    sample = {"messages": messages, "id": 7}
    assert ByteTokenizer()(sample) == {
        "tokens": [*b"1+1:", *b"2", 258],
        "mask": [True] * 4 + [False] * 2,
        "id": 7,
    }
    assert ByteTokenizer()(sample, inference=True)["tokens"] == [*b"1+1:2"]
    assert ByteTokenizer(max_seq_len=3).tokenize_messages(messages) == ([*b"1+1"], [True] * 3)


def test_a_message_that_is_not_text_is_refused():
    image = SimpleNamespace(role="user", content=[{"type": "image"}], masked=True)
    with pytest.raises(ValueError, match="a user message holds 'image'"):
        ByteTokenizer().tokenize_messages([image])


# --- arithmetic


def pairs(text: str) -> set[tuple[int, ...]]:
    return {tuple(sorted(map(int, line.split(":")[0].split("+")))) for line in text.splitlines()}


def test_prompts_are_long_and_their_worked_examples_are_right():
    for problem in arithmetic("train", size=64, seed=3):
        assert len(problem.prompt.encode()) >= 256
        *examples, question = problem.prompt.splitlines()
        assert len(examples) == 8
        assert eval(question.rstrip(":")) == int(problem.answer)
        for example in examples:
            asked, completion = example.split(":")
            assert arithmetic_reward(completion, str(eval(asked))) == 1.0


def test_no_held_out_pair_is_asked_or_shown_in_training():
    asked_in_test = {min(pairs(p.prompt.splitlines()[-1])) for p in arithmetic("test", size=1000, seed=0)}
    shown = set().union(*(pairs(p.prompt) for p in arithmetic("train", size=1000, seed=0)))
    assert len(asked_in_test) > 950 and len(shown) > 8000
    assert not asked_in_test & shown
    # The same check on problems of one split finds common pairs, so it can fail.
    assert asked_in_test & {min(pairs(p.prompt.splitlines()[-1])) for p in arithmetic("test", size=1000, seed=0)}


def test_problems_follow_from_the_seed():
    assert arithmetic(size=5, seed=1) == arithmetic(size=5, seed=1)
    assert arithmetic(size=5, seed=1) != arithmetic(size=5, seed=2)


def test_arithmetic_refuses_an_unknown_split_and_a_short_prompt():
    with pytest.raises(ValueError, match="split is 'dev'; arithmetic has 'train' and 'test'"):
        arithmetic("dev")
    with pytest.raises(ValueError, match=r"2 worked examples make a prompt of \d+ bytes, under 256; ask for"):
        arithmetic(size=1, examples=2)


def test_a_completion_is_right_exactly_when_no_carry_was_lost():
    rng = random.Random(0)
    for _ in range(500):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        right, sloppy = worked(a, b), worked(a, b, forget=0.5, rng=rng)
        assert arithmetic_reward(right, str(a + b)) == 1.0
        assert arithmetic_reward(sloppy, str(a + b)) == float(sloppy == right)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (" 6+7=13 5+8+1=14 3+2+1=6 =643\n", 1.0),
        (" =643", 1.0),
        (" =643\n1+1: =2", 1.0),
        (" =533\n", 0.0),
        (" =6430\n", 0.0),
        (" =643 =533\n", 0.0),
        (" 6+7=13 5+8+1=643", 0.0),
        ("643", 0.0),
        (" =", 0.0),
        ("", 0.0),
    ],
)
def test_arithmetic_reward_is_for_the_final_answer(completion, reward):
    assert arithmetic_reward(completion, "643") == reward


# --- GSM8K


def test_gsm8k_prompts_are_few_shot_and_do_not_ask_their_own_examples():
    problems = gsm8k(SAMPLE)
    assert len(problems) == 12
    for problem in problems:
        assert len(problem.prompt.encode()) >= 2000
        assert problem.prompt.count("Question: ") == 9 and problem.prompt.endswith("\nAnswer:")
        assert problem.prompt.count(problem.prompt.rpartition("Question: ")[2]) == 1
    assert len(gsm8k(SAMPLE, shots_path=SAMPLE, shots=2)) == 20
    assert len(gsm8k(SAMPLE, size=3)) == 3


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 2+70000 = <<2+70000=70002>>70,002\n#### 70,002", "70002", 1.0),
        ("#### $1,234.00", "1,234", 1.0),
        ("so she pays $18.50.", "18.5", 1.0),
        ("#### 5\n\nQuestion: next? Answer: 7", "5", 1.0),
        ("it is 5.\n\nQuestion: next? Answer: 7", "5", 1.0),
        ("#### -3", "-3", 1.0),
        ("10-3", "3", 1.0),
        ("#### 5 apples out of 9", "5", 1.0),
        ("#### 6", "5", 0.0),
        ("5 ####", "5", 0.0),
        ("none", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_gsm8k_reward_reads_numbers_tolerantly(completion, answer, reward):
    assert gsm8k_reward(completion, answer) == reward


def test_a_missing_gsm8k_file_is_named_with_the_working_directory():
    with pytest.raises(FileNotFoundError, match=r"no GSM8K file at 'nowhere.jsonl' \(working directory /"):
        gsm8k("nowhere.jsonl")


ROW = json.dumps({"question": "1+1?", "answer": "2\n#### 2"})


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 has no text under 'question'"),
        ('{"question": "1+1?"}', "line 2 has no text under 'answer'"),
        ('{"question": "1+1?", "answer": "2"}', "line 2: the answer has no number after '####'"),
    ],
)
def test_a_bad_gsm8k_line_is_named_by_its_number(tmp_path, line, error):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{ROW}\n{line}\n")
    with pytest.raises(ValueError, match=error):
        gsm8k(str(file), shots=1)


def test_too_few_gsm8k_rows_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{ROW}\n\n{ROW}\n")
    assert len(gsm8k(str(file), shots=1)) == 1
    with pytest.raises(ValueError, match="has 2 rows, too few for 2 shots and a question; lower `shots`"):
        gsm8k(str(file), shots=2)


# --- the committed model


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """The committed checkpoint in float32, read by torchtune and by transformers."""
    torchtune = pytest.importorskip("torchtune")
    transformers = pytest.importorskip("transformers")
    from torchtune.models.qwen2 import qwen2
    from torchtune.training import FullModelHFCheckpointer

    checkpointer = FullModelHFCheckpointer(
        str(ASSETS / "tiny"), ["model.safetensors"], model_type="QWEN2", output_dir=str(tmp_path_factory.mktemp("out"))
    )
    config = json.loads((ASSETS / "tiny" / "config.json").read_text())
    model = qwen2(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_base=config["rope_parameters"]["rope_theta"],
        tie_word_embeddings=True,
    )
    model.load_state_dict(checkpointer.load_checkpoint()[torchtune.training.MODEL_KEY])
    reference = transformers.Qwen2ForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32)
    return model.eval(), reference.eval()


def greedy_completions(model, prompts: list[str], max_tokens: int) -> list[str]:
    """Greedy decoding with transformers, prompts padded on the left."""
    tokenizer = ByteTokenizer()
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, ids))
    tokens = model.generate(
        torch.tensor([[tokenizer.pad_id] * (width - len(row)) + row for row in ids]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=tokenizer.stop_tokens,
        pad_token_id=tokenizer.pad_id,
    )
    return [tokenizer.decode(row) for row in tokens[:, width:]]


def test_the_tiny_model_is_the_same_in_torchtune_and_transformers(tiny_models):
    model, reference = tiny_models
    tokens = torch.tensor([ByteTokenizer().encode(arithmetic(size=1)[0].prompt)])
    with torch.no_grad():
        expected = reference(tokens).logits
        torch.testing.assert_close(model(tokens), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        # A wrong rope base or norm_eps would not pass: shifted positions already change the logits.
        moved = model(tokens, input_pos=2 * torch.arange(tokens.shape[1])[None])
    assert (moved - expected).abs().max() > 0.1


def test_the_tiny_folder_holds_two_files_of_less_than_2_million_bytes():
    files = list((ASSETS / "tiny").iterdir())
    assert {file.name for file in files} == {"config.json", "model.safetensors"}
    assert sum(file.stat().st_size for file in files) < 2_000_000


def test_the_tiny_model_knows_the_format_and_forgets_carries(tiny_models):
    problems = arithmetic("test", size=64, seed=11)
    completions = greedy_completions(tiny_models[1], [problem.prompt for problem in problems], max_tokens=40)
    rewards = [arithmetic_reward(c, problem.answer) for c, problem in zip(completions, problems, strict=True)]
    finished = [c.count("=") == 4 and c.endswith("\n") for c in completions]
    assert 0.05 < sum(rewards) / 64 < 0.5
    assert sum(finished) >= 62
