"""Tasks, the byte tokenizer, and the committed tiny model."""

from __future__ import annotations

import json
import logging
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from flexpg.training.tasks import ByteTokenizer, arithmetic, arithmetic_reward, gsm8k, problems
from flexpg.training.tasks.arithmetic import worked
from recipes import warm_start

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "recipes" / "assets"
REAL = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
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


def test_broken_utf8_is_replaced():
    assert ByteTokenizer().decode([0xFF, 97]) == "\ufffda"


def test_stop_tokens_are_the_end_of_sequence_and_the_stop_characters():
    assert ByteTokenizer().stop_tokens == [258, ord("\n")]
    assert ByteTokenizer(stop="").stop_tokens == [258]


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


# --- problems of any data set

ROWS = [{"q": f"{n}+{n}", "a": 2 * n} for n in range(6)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The `datasets` library, with a cache that goes with the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def asked(found: list) -> list[str]:
    return [problem.prompt.rpartition("\n")[2] for problem in found]


def test_a_row_becomes_a_prompt_and_an_answer(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"q": "2020-01-01?", "options": ["no", "yes"], "a": "007"}, ROWS[1]])
    (problem,) = problems(file, "{{A}} {q} {options[1]}", "{a}", size=1)
    assert (problem.prompt, problem.answer) == ("{A} 2020-01-01? yes", "007")
    assert problems(file, "{q}", lambda row: f"<{row['a']}>")[1].answer == "<2>"


def test_worked_examples_are_the_first_rows_and_are_not_asked(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", ROWS)
    found = problems(file, "{q} =", "{a}", shots=2)
    assert [problem.prompt for problem in found[:1]] == ["0+0 = 0\n\n1+1 = 2\n\n2+2 ="]
    assert asked(found) == ["2+2 =", "3+3 =", "4+4 =", "5+5 ="]
    assert asked(problems(file, "{q} =", "{a}", shots=2, skip=1, size=2)) == ["3+3 =", "4+4 ="]
    assert found == problems(file, "{q} =", "{a}", shots=2, shots_source=file)  # the same data by name
    (problem,) = problems(file, "{q} =", "{a}", shots=1, shot_template="{q} is {a}!\n", size=1)
    assert problem.prompt == "0+0 is 0!\n1+1 ="


def test_worked_examples_of_other_data_leave_every_row_to_be_asked(tmp_path):
    file, other = jsonl(tmp_path / "rows.jsonl", ROWS), jsonl(tmp_path / "other.jsonl", [{"q": "9+9", "a": 18}])
    found = problems(file, "{q} =", "{a}", shots=1, shots_source=other)
    assert len(found) == 6 and found[0].prompt == "9+9 = 18\n\n0+0 ="


@pytest.mark.parametrize("kind", ["json list", "json lines", "json list with a byte-order mark", "parquet", "csv"])
def test_every_kind_of_file_gives_the_same_problems(cache, tmp_path, kind):
    data = cache.Dataset.from_list(ROWS)
    file = tmp_path / {"parquet": "rows.parquet", "csv": "rows.csv"}.get(kind, "rows.json")
    if kind.startswith("json list"):
        file.write_text("\ufeff" * ("mark" in kind) + json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        data.to_parquet(file)
    elif kind == "csv":
        data.to_csv(file)
    else:
        file.write_text("\n".join(map(json.dumps, ROWS)))
    assert [(p.prompt, p.answer) for p in problems(str(file), "{q}", "{a}")] == [(r["q"], str(r["a"])) for r in ROWS]


@pytest.fixture
def directory(cache, tmp_path):
    """Parquet files of a train and a test split."""
    (tmp_path / "data").mkdir()
    cache.Dataset.from_list(ROWS[:4]).to_parquet(tmp_path / "data" / "train.parquet")
    cache.Dataset.from_list(ROWS[4:]).to_parquet(tmp_path / "data" / "test.parquet")
    return tmp_path / "data"


def test_a_directory_has_splits_and_worked_examples_may_come_from_another(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    assert asked(problems("data", "{q} =", "{a}")) == ["0+0 =", "1+1 =", "2+2 =", "3+3 ="]
    found = problems("./data", "{q} =", "{a}", split="test", shots=1, shots_split="train")
    assert [problem.prompt for problem in found] == ["0+0 = 0\n\n4+4 =", "0+0 = 0\n\n5+5 ="]
    other = jsonl(directory.parent / "other.jsonl", [{"q": "9+9", "a": 18}])
    found = problems("data", "{q} =", "{a}", split="test", shots=1, shots_source=other)
    assert [problem.prompt for problem in found] == ["9+9 = 18\n\n4+4 =", "9+9 = 18\n\n5+5 ="]
    with pytest.raises(ValueError, match="data has no split 'dev'; it has 'train', 'test'"):
        problems("data", "{q}", "{a}", split="dev")
    with pytest.raises(ValueError, match="could not load 'data': ValueError: BuilderConfig 'main' not found"):
        problems("data", "{q}", "{a}", subset="main")


def test_reading_is_quiet_and_leaves_nothing_beside_the_data(cache, directory, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # so that caplog sees it
    (directory / "broken.csv").write_text("q,a\n1,2\n1,2,3,4\n")
    before = sorted(directory.iterdir()), cache.are_progress_bars_disabled(), cache.logging.get_verbosity()
    problems(str(directory / "train.parquet"), "{q}", "{a}")
    with pytest.raises(ValueError, match=r"could not load '.*broken.csv': ParserError: .*Expected 2 fields in line 3"):
        problems(str(directory / "broken.csv"), "{q}", "{a}")
    assert before == (sorted(directory.iterdir()), cache.are_progress_bars_disabled(), cache.logging.get_verbosity())
    assert not before[1]
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_name_on_the_hub_without_network_fails_quickly_and_says_what_to_do(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    for call in (gsm8k, lambda: problems("no_such_owner/no_such_data", "{q}", "{a}")):
        with pytest.raises(
            ValueError, match=r"could not load '.*/.*': .*Couldn't reach .* no such file .* in /.*download"
        ):
            call()
    assert time.perf_counter() - started < 5


# --- GSM8K


def test_gsm8k_prompts_are_few_shot_and_do_not_ask_their_own_examples():
    found = gsm8k(SAMPLE)
    assert len(found) == 12
    for problem in found:
        assert len(problem.prompt.encode()) >= 2000
        assert problem.prompt.count("Question: ") == 9 and problem.prompt.endswith("\nAnswer:")
        assert problem.prompt.count(problem.prompt.rpartition("Question: ")[2]) == 1
    assert len(gsm8k(SAMPLE, size=3)) == 3
    assert gsm8k(SAMPLE, skip=1) == found[1:]


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(Path(SAMPLE), id="sample"),
        pytest.param(
            REAL, id="real", marks=pytest.mark.skipif(not REAL.exists(), reason="GSM8K's train.jsonl is not beside us")
        ),
    ],
)
def test_a_gsm8k_prompt_shows_whole_answers_and_its_answer_is_what_follows_the_mark(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:8])
    expected = [(f"{shown}Question: {r['question']}\nAnswer:", r["answer"].split("#### ")[1]) for r in rows[8:]]
    assert [(problem.prompt, problem.answer) for problem in gsm8k(str(file))] == expected


def test_a_directory_with_gsm8ks_rows_gives_the_prompts_of_the_file(cache, tmp_path):
    rows = [json.loads(line) for line in Path(SAMPLE).read_text().splitlines()]
    cache.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert gsm8k(str(tmp_path), subset=None) == gsm8k(SAMPLE)


def test_a_gsm8k_answer_is_what_follows_the_last_mark(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "#### is a mark\n#### 1,002 "}])
    assert gsm8k(file, shots=0)[0].answer == "1,002"


def test_gsm8k_takes_another_template():
    problem = gsm8k(SAMPLE, shots=1, size=1, template="Q: {question} A:")[0]
    assert problem.prompt.startswith("Q: ") and problem.prompt.count(" A:") == 2 and "####" in problem.prompt


@pytest.mark.parametrize("answer", ["2", "2 ####", "2 #### two", "2 #### 2 of 3"])
@pytest.mark.parametrize("shots", [0, 1, 2])
def test_a_gsm8k_answer_without_a_final_number_is_named_also_in_a_worked_example(tmp_path, answer, shots):
    good, bad = {"question": "1+1?", "answer": "2\n#### 2"}, {"question": "1+1?", "answer": answer}
    file = jsonl(tmp_path / "rows.jsonl", [good, bad, good])
    with pytest.raises(ValueError, match=r"rows.jsonl line 2: the answer has no number after '####'"):
        gsm8k(file, shots=shots)


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


def test_the_tiny_folder_holds_less_than_2_million_bytes():
    assert sum(file.stat().st_size for file in (ASSETS / "tiny").iterdir()) < 2_000_000


def test_the_tiny_folder_is_what_the_warm_start_writes(tmp_path):
    warm_start.save(warm_start.tiny_model(), tmp_path)
    written = {file.name: file for file in tmp_path.iterdir()}
    assert written.keys() == {file.name for file in (ASSETS / "tiny").iterdir()}
    for name in written.keys() - {"model.safetensors"}:
        assert written[name].read_text() == (ASSETS / "tiny" / name).read_text()


def test_the_tiny_folders_tokenizer_gives_the_ids_of_byte_tokenizer():
    saved, own = AutoTokenizer.from_pretrained(ASSETS / "tiny"), ByteTokenizer()
    for text in (arithmetic(size=1)[0].prompt, " =643\n", "two  spaces\tand \u00e9, \u4f60, \U0001f600"):
        assert saved(text)["input_ids"] == own.encode(text)
        assert saved.decode(own.encode(text)) == text
    assert (saved.pad_token_id, saved.bos_token_id, saved.eos_token_id) == (own.pad_id, own.bos_id, own.eos_id)
    assert len(saved) == own.vocab_size
    assert GenerationConfig.from_pretrained(ASSETS / "tiny").eos_token_id == own.stop_tokens


def test_the_tiny_model_knows_the_format_and_forgets_carries(tiny_models):
    problems = arithmetic("test", size=64, seed=11)
    completions = greedy_completions(tiny_models[1], [problem.prompt for problem in problems], max_tokens=40)
    rewards = [arithmetic_reward(c, problem.answer) for c, problem in zip(completions, problems, strict=True)]
    finished = [c.count("=") == 4 and c.endswith("\n") for c in completions]
    assert 0.05 < sum(rewards) / 64 < 0.5
    assert sum(finished) >= 62
