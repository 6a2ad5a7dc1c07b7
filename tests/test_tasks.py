"""Tests of tasks and the byte tokenizer, and of the tiny model in recipes/assets."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torchtune import training
from torchtune.models.qwen2 import qwen2
from transformers import AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from flexpg.training.tasks import ByteTokenizer, Problem, arithmetic, arithmetic_reward, gsm8k, problems
from flexpg.training.tasks.arithmetic import worked
from recipes.assets import make_tiny_model

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes/assets/tiny"
SAMPLE = str(ROOT / "recipes/assets/gsm8k_sample.jsonl")

# The tokenizer.


@pytest.mark.parametrize("text", ["", "356+287:", "naïve 数学 🙂\r\n\x00", "<|eos|>"])
def test_utf8_text_round_trips(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_follow_the_bytes_and_have_no_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a", add_bos=True, add_eos=True)
    assert ids == [tokenizer.bos_id, 97, tokenizer.eos_id]
    assert tokenizer.decode(torch.tensor([*ids, tokenizer.pad_id])) == "a"
    assert sorted(tokenizer.special_tokens.values()) == list(range(256, tokenizer.vocab_size))
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"  # broken UTF-8


def test_stop_tokens_are_eos_and_the_stop_characters():
    assert ByteTokenizer().stop_tokens == [258, ord("\n")]
    assert ByteTokenizer(stop="").stop_tokens == [258]
    with pytest.raises(ValueError, match="stop must be ASCII, got '。'"):
        ByteTokenizer(stop="。")


def test_messages_become_tokens_with_torchtunes_mask():
    user, assistant = (
        SimpleNamespace(role=role, content=[{"type": "text", "content": text}], masked=masked)
        for role, text, masked in (("user", "1+1:", True), ("assistant", "2", False))
    )
    sample = {"messages": [user, assistant], "id": 7}
    assert ByteTokenizer()(sample) == {"tokens": [*b"1+1:", *b"2", 258], "mask": [True] * 4 + [False] * 2, "id": 7}
    assert ByteTokenizer()(sample, inference=True)["tokens"] == [*b"1+1:2"]
    assert ByteTokenizer(max_seq_len=3).tokenize_messages([user, assistant]) == ([*b"1+1"], [True] * 3)
    image = SimpleNamespace(role="user", content=[{"type": "image"}], masked=True)
    with pytest.raises(ValueError, match="messages must have text content only, got 'image' from user"):
        ByteTokenizer().tokenize_messages([image])


# Arithmetic.


def test_arithmetic_prompts_show_correct_examples():
    for problem in arithmetic("train", size=64, seed=3):
        *examples, question = problem.prompt.splitlines()
        assert len(examples) == 8
        assert eval(question.rstrip(":")) == int(problem.answer)
        for example in examples:
            asked, completion = example.split(":")
            assert arithmetic_reward(completion, str(eval(asked))) == 1.0
    assert arithmetic(size=5, seed=1) == arithmetic(size=5, seed=1) != arithmetic(size=5, seed=2)
    with pytest.raises(ValueError, match="split must be train or test, got 'dev'"):
        arithmetic("dev")


def test_no_held_out_pair_is_asked_or_shown_in_training():
    def pairs(text: str) -> set[tuple[int, ...]]:
        return {tuple(sorted(map(int, line.split(":")[0].split("+")))) for line in text.splitlines()}

    asked = {min(pairs(problem.prompt.splitlines()[-1])) for problem in arithmetic("test", size=1000, seed=0)}
    shown = set().union(*(pairs(problem.prompt) for problem in arithmetic("train", size=1000, seed=0)))
    assert len(asked) > 950 and len(shown) > 8000
    assert not asked & shown


def test_completion_is_correct_exactly_if_no_carry_was_lost():
    rng = random.Random(0)
    for _ in range(500):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        correct, sloppy = worked(a, b), worked(a, b, forget=0.5, rng=rng)
        assert arithmetic_reward(correct, str(a + b)) == 1.0
        assert arithmetic_reward(sloppy, str(a + b)) == float(sloppy == correct)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (" 6+7=13 5+8+1=14 3+2+1=6 =643\n", 1.0),
        (" =643\n1+1: =2", 1.0),
        (" =6430\n", 0.0),
        (" =643 =533\n", 0.0),
        (" 6+7=13 5+8+1=643", 0.0),
        ("643", 0.0),
        ("", 0.0),
    ],
)
def test_arithmetic_reward_is_for_the_final_answer(completion, reward):
    assert arithmetic_reward(completion, "643") == reward


# Problems of any dataset.

ROWS = [{"q": f"{n}+{n}", "a": 2 * n} for n in range(6)]


@pytest.fixture(autouse=True)
def _cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def questions(found: list[Problem]) -> list[str]:
    return [problem.prompt.rpartition("\n")[2] for problem in found]


def test_row_becomes_a_prompt_and_an_answer(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"q": "what?", "options": ["no", "yes"], "a": "007"}, ROWS[1] | {"a": "2"}])
    (problem,) = problems(file, "{{A}} {q} {options[1]}", "{a}", size=1)
    assert (problem.prompt, problem.answer) == ("{A} what? yes", "007")
    assert problems(file, "{q}", lambda row: f"<{row['a']}>")[1].answer == "<2>"


def test_problem_has_the_columns_of_its_row_and_none_for_nulls(tmp_path):
    rows = [{"q": "1", "a": 1, "level": 3, "tags": ["x"]}, {"q": "2", "a": 2, "level": None, "tags": []}]
    found = problems(jsonl(tmp_path / "rows.jsonl", rows), "{q}", "{a}")
    assert [problem.columns for problem in found] == rows
    assert len({*found, *found}) == 2  # hashable


def test_few_shot_examples_are_the_first_rows_and_are_not_asked(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", ROWS)
    found = problems(file, "{q} =", "{a}", shots=2)
    assert found[0].prompt == "0+0 = 0\n\n1+1 = 2\n\n2+2 ="
    assert questions(found) == ["2+2 =", "3+3 =", "4+4 =", "5+5 ="]
    assert questions(problems(file, "{q} =", "{a}", shots=2, skip=1, size=2)) == ["3+3 =", "4+4 ="]
    assert found == problems(file, "{q} =", "{a}", shots=2, shots_source=file, shots_split="train")
    (problem,) = problems(file, "{q} =", "{a}", shots=1, shot_template="{q} is {a}!\n", size=1)
    assert problem.prompt == "0+0 is 0!\n1+1 ="


def test_few_shot_examples_of_other_data_leave_every_row_to_be_asked(tmp_path):
    file, other = jsonl(tmp_path / "rows.jsonl", ROWS), jsonl(tmp_path / "other.jsonl", [{"q": "9+9", "a": 18}])
    found = problems(file, "{q} =", "{a}", shots=1, shots_source=other)
    assert len(found) == 6 and found[0].prompt == "9+9 = 18\n\n0+0 ="


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv"])
def test_every_kind_of_file_gives_the_same_problems_whatever_the_split(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    data = datasets.Dataset.from_list(ROWS)
    if kind == "json":
        file.write_text(json.dumps(ROWS, indent=1))
    elif kind == "jsonl":
        jsonl(file, ROWS)
    else:
        {"parquet": data.to_parquet, "csv": data.to_csv}[kind](file)
    for split in ("train", "test"):
        found = problems(str(file), "{q}", "{a}", split=split)
        columns = [row | {"a": str(row["a"])} for row in ROWS] if kind == "csv" else ROWS
        assert found == [Problem(row["q"], str(row["a"]), row) for row in columns]


def test_values_of_a_file_are_as_written(tmp_path):
    texts = ["2024-01-05", "007", "1.50", "NA"]
    rows = [{"q": text, "a": text} for text in texts] + [{"q": "n", "a": 5}, {"q": "m", "a": 2.5}]
    found = problems(jsonl(tmp_path / "rows.jsonl", rows), "{q}", "{a}")
    assert [problem.answer for problem in found] == [*texts, "5", "2.5"]
    (tmp_path / "rows.csv").write_text("q,a\n" + "".join(f"{text},{text}\n" for text in texts))
    assert [problem.answer for problem in problems(str(tmp_path / "rows.csv"), "{q}", "{a}")] == texts


def test_json_numbers_and_booleans_become_text_as_written(tmp_path):
    texts = ["2.50", "1e5", "-0.0", "12345678901234567.25", "123456789012345678901234567890", "7", "true", "false"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"q": "x", "a": {text}}}\n' for text in texts))
    found = problems(str(tmp_path / "rows.jsonl"), "{q}", "{a}")
    assert [problem.answer for problem in found] == texts and found[0].columns["a"] == 2.5
    assert problems(str(tmp_path / "rows.jsonl"), "{a:.1f}", "{q}")[0].prompt == "2.5"


@pytest.mark.parametrize("value", ["[]", '{"b": 1}', "NaN"])
def test_answer_that_is_not_a_scalar_is_refused(value, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'{{"q": "x", "a": {value}}}\n')
    with pytest.raises(ValueError, match=r"row 0: .*the answer must be a text, a number, true or false, got "):
        problems(str(tmp_path / "rows.jsonl"), "{q}", "{a}")


def test_csv_with_a_column_twice_raises(tmp_path):
    (tmp_path / "rows.csv").write_text("q,a,a\n1,2,3\n")
    with pytest.raises(ValueError, match=r"rows.csv must name each column once in its first line, got 'a' twice"):
        problems(str(tmp_path / "rows.csv"), "{q}", "{a}")


@pytest.mark.parametrize("options", [{"skip": -2}, {"size": -1}, {"shots": -1}], ids=str)
def test_negative_numbers_of_rows_raise(options, tmp_path):
    with pytest.raises(ValueError, match="skip, size and shots must be at least 0, got "):
        problems(jsonl(tmp_path / "rows.jsonl", ROWS), "{q}", "{a}", **options)


def test_csv_with_too_many_cells_or_broken_text_raises(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"q,a\n1,2,3\n")
    with pytest.raises(ValueError, match="row 0 has more cells than the first line has names"):
        problems(str(tmp_path / "rows.csv"), "{q}", "{a}")
    (tmp_path / "rows.csv").write_bytes(b"q,a\n\xff,2\n")
    with pytest.raises(ValueError, match=r"could not load .*rows.csv': 'utf-8'"):
        problems(str(tmp_path / "rows.csv"), "{q}", "{a}")


def test_changed_file_is_read_again(tmp_path):
    """`datasets` caches what it has read."""
    for n in range(2):
        assert questions(problems(jsonl(tmp_path / "rows.jsonl", ROWS[n:]), "{q}", "{a}"))[0] == f"{n}+{n}"


def test_folder_has_splits_and_few_shot_examples_may_come_from_another(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in (("train", ROWS[:4]), ("test", ROWS[4:])):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    assert questions(problems("data", "{q} =", "{a}")) == ["0+0 =", "1+1 =", "2+2 =", "3+3 ="]
    found = problems("./data", "{q} =", "{a}", split="test", shots=1, shots_split="train")
    assert [problem.prompt for problem in found] == ["0+0 = 0\n\n4+4 =", "0+0 = 0\n\n5+5 ="]
    with pytest.raises(ValueError, match="could not load 'data', split 'dev'"):
        problems("data", "{q}", "{a}", split="dev")
    with pytest.raises(ValueError, match="could not load 'data', split 'train': BuilderConfig 'main' not found"):
        problems("data", "{q}", "{a}", subset="main")


GOOD = b'{"q": "1", "a": 2}\n'
MISTAKES = {  # file content, options, message
    "empty file": (b"", {}, "source must have rows, got the empty file .*rows.jsonl"),
    "truncated line": (GOOD + b'{"q": "1",', {}, "rows.jsonl:2: must be JSON: "),
    "invalid utf-8": (GOOD + b'{"q": "\xb7", "a": 2}\n', {}, "rows.jsonl:2: must be UTF-8: "),
    "blank answer": (GOOD + b'{"q": "x", "a": " "}\n', {}, "rows.jsonl, row 1: the answer is empty; fill it in"),
    "null": (GOOD + b'{"q": null, "a": 2}\n', {}, r"rows.jsonl, row 1: '\{q\}' cannot .*columns a; null: q: KeyError"),
    "other column": (
        GOOD,
        {"template": "{x}"},
        r"row 0: '\{x\}' cannot be filled from the columns q, a: KeyError: 'x'",
    ),
    "unquoted braces": (
        GOOD,
        {"answer": {"a": None}},
        "answer must be a string, got {'a': None}; .*quote braces: 'train_problems.answer=",
    ),
    "open brace": (GOOD, {"template": "{q"}, "cannot be filled .*: ValueError: expected '}'"),
    "too few rows": (
        GOOD * 2,
        {"shots": 1, "skip": 1},
        "must have more than 2 rows .*, got 2 and .* at least 1 examples, got 1",
    ),
    "too few shots": (GOOD, {"shots": 2}, "must have more than 2 rows .*, got 1 and .* at least 2 examples, got 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_data_that_does_not_give_problems_is_named(tmp_path, mistake):
    content, options, message = MISTAKES[mistake]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        problems(str(tmp_path / "rows.jsonl"), **{"template": "{q}", "answer": "{a}"} | options)


def test_missing_file_and_unknown_kind_are_named(tmp_path):
    for source in ("no.jsonl", "a/b/c", "/nowhere/no"):
        with pytest.raises(FileNotFoundError, match=f"no file or folder '{source}' .working directory /"):
            problems(source, "{q}", "{a}")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"source must be a \.jsonl, .json, .parquet, .csv file, got "):
        problems(str(tmp_path / "a.txt"), "{q}", "{a}")


def test_hub_name_without_network_fails_quickly_and_names_the_data():
    started = time.perf_counter()
    for call in (gsm8k, lambda: problems("no_such_owner/no_such_data", "{q}", "{a}")):
        with pytest.raises(ValueError, match=r"could not load '\w+/\w+', split 'train': "):
            call()
    assert time.perf_counter() - started < 5


# GSM8K and tau-bench.


@pytest.mark.parametrize("file", [Path(SAMPLE), ROOT.parent / "shared/data/gsm8k/train.jsonl"], ids=["sample", "full"])
def test_gsm8k_prompts_show_whole_answers_and_ask_the_other_rows(file):
    if not file.exists():
        pytest.skip("GSM8K is not on this machine")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:8])
    expected = [(f"{shown}Question: {r['question']}\nAnswer:", r["answer"].split("#### ")[1]) for r in rows[8:]]
    found = gsm8k(str(file))
    assert [(problem.prompt, problem.answer) for problem in found] == expected
    assert min(len(problem.prompt.encode()) for problem in found) >= 2000
    assert gsm8k(str(file), skip=1, size=3) == found[1:4]


def test_gsm8k_takes_another_template():
    problem = gsm8k(SAMPLE, shots=1, size=1, template="Q: {question} A:")[0]
    assert problem.prompt.startswith("Q: ") and problem.prompt.count(" A:") == 2 and "####" in problem.prompt


def test_gsm8k_answer_is_what_follows_the_last_mark(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "#### is a mark\n#### 1,002 "}])
    assert gsm8k(file, shots=0)[0].answer == "1,002"


@pytest.mark.parametrize("answer", ["2", "2 ####", "2 #### two"])
@pytest.mark.parametrize("shots", [0, 2])
def test_gsm8k_answer_without_a_number_is_named(tmp_path, answer, shots):
    good, bad = {"question": "1+1?", "answer": "2\n#### 2"}, {"question": "1+1?", "answer": answer}
    file = jsonl(tmp_path / "rows.jsonl", [good, bad, good])
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: .* the answer must end in '####' and a number"):
        gsm8k(file, shots=shots)


# The tiny model.


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """Return the tiny model in float32, as torchtune and as transformers load it."""
    checkpointer = training.FullModelHFCheckpointer(
        str(TINY), ["model.safetensors"], model_type="QWEN2", output_dir=str(tmp_path_factory.mktemp("out"))
    )
    model = qwen2(**make_tiny_model.SHAPE)
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY])
    return model.eval(), Qwen2ForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_tiny_model_is_the_same_in_torchtune_and_transformers(tiny_models):
    model, reference = tiny_models
    tokens = torch.tensor([ByteTokenizer().encode(arithmetic(size=1)[0].prompt)])
    with torch.no_grad():
        expected = reference(tokens).logits
        torch.testing.assert_close(model(tokens), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_tiny_folder_is_what_make_tiny_model_writes(tmp_path):
    make_tiny_model.save(make_tiny_model.tiny_model(), tmp_path)
    written = {file.name: file for file in tmp_path.iterdir() if file.is_file()}
    assert written.keys() == {file.name for file in TINY.iterdir()}
    for name in written.keys() - {"model.safetensors"}:
        assert written[name].read_text() == (TINY / name).read_text()
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 2_000_000


def test_tiny_tokenizer_of_transformers_equals_byte_tokenizer():
    saved, plain = AutoTokenizer.from_pretrained(TINY), ByteTokenizer()
    for text in (arithmetic(size=1)[0].prompt, " =643\n", "two  spaces\tand \u00e9, \u4f60, \U0001f600"):
        assert saved(text)["input_ids"] == plain.encode(text)
        assert saved.decode(plain.encode(text)) == text
    assert (saved.pad_token_id, saved.bos_token_id, saved.eos_token_id) == (plain.pad_id, plain.bos_id, plain.eos_id)
    assert len(saved) == plain.vocab_size
    assert GenerationConfig.from_pretrained(TINY).eos_token_id == plain.stop_tokens


def test_tiny_model_knows_the_format_and_forgets_carries(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    asked = arithmetic("test", size=64, seed=11)
    inputs = tokenizer([problem.prompt for problem in asked], return_tensors="pt", padding=True)
    tokens = tiny_models[1].generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs.input_ids.shape[1] :]
    completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    rewards = [arithmetic_reward(text, problem.answer) for text, problem in zip(completions, asked, strict=True)]
    assert 0.05 < sum(rewards) / 64 < 0.5
    assert sum(text.count("=") == 4 and text.endswith("\n") for text in completions) >= 62
