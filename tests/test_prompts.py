"""Tests of problems as prompt tokens and of completions as text, with tokenizers of Qwen, Llama and bytes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline import tiny_model
from omegaconf import OmegaConf
from torchtune.models.llama3 import llama3_tokenizer
from torchtune.models.qwen2._tokenizer import bytes_to_unicode
from torchtune.models.qwen2_5 import qwen2_5_tokenizer

from flexpg.training.components import component
from flexpg.training.prompts import build_problems, completion_text, prompt_tokens, shown_prompt, tokenize_problems
from flexpg.training.tasks import ByteTokenizer, Problem


@pytest.fixture
def qwen_tokenizer(tmp_path):
    alphabet = bytes_to_unicode()
    merges = ["h i", "u s", "e r", "us er", "Ċ Ċ"]
    words = [*alphabet.values(), *(merge.replace(" ", "") for merge in merges)]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return qwen2_5_tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))


@pytest.fixture
def llama_tokenizer(tmp_path):
    words = [*(bytes([i]) for i in range(256)), b"hi", b"us", b"er", b"user", b"\n\n"]
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    return llama3_tokenizer(str(tmp_path / "tokenizer.model"))


def test_qwen_chat_prompt_ends_with_the_assistant_header(qwen_tokenizer):
    tokens = prompt_tokens(qwen_tokenizer, "hi", "chat")
    assert qwen_tokenizer.decode(tokens) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens[-1] not in qwen_tokenizer.stop_tokens
    assert tokens.count(qwen_tokenizer.im_start_id) == 2 and tokens.count(qwen_tokenizer.im_end_id) == 1
    qwen_tokenizer.max_seq_len = len(tokens)
    with pytest.raises(ValueError, match=f"max_seq_len={len(tokens)} truncates the prompt; set it to null"):
        prompt_tokens(qwen_tokenizer, "hi", "chat")


def test_llama_chat_prompt_ends_with_the_assistant_header(llama_tokenizer):
    tokens = prompt_tokens(llama_tokenizer, "hi", "chat")
    text = llama_tokenizer.decode(tokens, truncate_at_eos=False, skip_special_tokens=False)
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    assert text == f"<|begin_of_text|>{user}hi<|eot_id|>{assistant}"
    assert tokens[0] == llama_tokenizer.bos_id and tokens[-1] not in llama_tokenizer.stop_tokens
    assert shown_prompt(llama_tokenizer, tokens) == text


def test_long_prompt_is_shown_without_its_middle(qwen_tokenizer):
    tokens = prompt_tokens(qwen_tokenizer, "hi" * 100, "chat")
    shown = "<|im_start|>user\nhihihihihihih ... m_end|>\n<|im_start|>assistant\n"
    assert shown_prompt(qwen_tokenizer, tokens, 60) == shown


def test_plain_and_bos_prompts_add_at_most_the_bos_token(qwen_tokenizer, llama_tokenizer):
    assert qwen_tokenizer.decode(prompt_tokens(qwen_tokenizer, "hi user", "plain")) == "hi user"
    assert prompt_tokens(qwen_tokenizer, "hi", "bos") == prompt_tokens(qwen_tokenizer, "hi", "plain")  # Qwen has none
    plain = prompt_tokens(llama_tokenizer, "hi user", "plain")
    assert prompt_tokens(llama_tokenizer, "hi user", "bos") == [llama_tokenizer.bos_id, *plain]
    assert prompt_tokens(ByteTokenizer(), "hi\n", "chat") == [*b"hi\n"]


def test_completion_text_has_no_stop_token_and_a_mark_for_ids_without_text(qwen_tokenizer, llama_tokenizer):
    for tokenizer, unknown in ((qwen_tokenizer, 151_700), (llama_tokenizer, 128_011)):
        words = prompt_tokens(tokenizer, "hi h\u00e9", "plain")
        for stop in tokenizer.stop_tokens:
            assert completion_text(tokenizer, [*words, stop]) == "hi h\u00e9"
            assert completion_text(tokenizer, [stop]) == ""
        assert completion_text(tokenizer, words) == "hi h\u00e9"
        assert completion_text(tokenizer, [*words, unknown, unknown, *words]) == "hi h\u00e9\ufffd\ufffdhi h\u00e9"
    assert completion_text(ByteTokenizer(), [*b"5\n"]) == "5"


TOKENIZERS = {
    "qwen": {"_component_": "torchtune.models.qwen2_5.qwen2_5_tokenizer", "path": "vocab.json"}
    | {"merges_file": "merges.txt"},
    "llama": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "tokenizer.model"},
}


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("qwen", "vocab.json", b'{"a": 0, "b', r"tokenizer: .*vocab\.json"),
        ("qwen", "merges.txt", b"#version: 0.2\n\xff\xfe", r"tokenizer: .*utf-8.*merges\.txt"),
        ("llama", "tokenizer.model", b"YQ== 0\nYg", r"tokenizer: .*b'Yg' in tokenizer\.model"),
        ("llama", "tokenizer.model", b"", r"tokenizer: .*tokenizer\.model"),
    ],
)
def test_damaged_tokenizer_file_is_named_in_one_line(tmp_path, monkeypatch, name, file, content, message):
    monkeypatch.chdir(tmp_path)
    Path("vocab.json").write_text('{"a": 0}')
    Path("merges.txt").write_text("#version: 0.2\n")
    Path(file).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        component(OmegaConf.create({"tokenizer": TOKENIZERS[name]}), "tokenizer")
    assert "\n" not in str(caught.value)


def tokenize(prompts: list[str], **changes: Any) -> list[list[int]]:
    cfg = {"prompt_format": "plain", "max_tokens": 100, "max_cache_tokens": 100, "compile": False}
    cfg = OmegaConf.create(cfg | {"sampling": {"max_new_tokens": 10}} | changes)
    found = [Problem(prompt, "") for prompt in prompts]
    model = tiny_model("qwen2", vocab_size=260)
    return [
        tokens.tolist()
        for tokens in tokenize_problems(
            cfg, ByteTokenizer(), model, "train_problems", found, at_least=2, device=torch.device("cpu")
        )
    ]


def test_problems_become_prompt_tokens_that_fit_the_model_and_the_budgets():
    assert tokenize(["1+1", "2+2"]) == [[*b"1+1"], [*b"2+2"]]
    assert tokenize(["x" * 90, "y"])[0] == [*b"x" * 90]
    mistakes = [
        ({"prompts": ["1"]}, "train_problems must have at least 2 problems, got 1"),
        ({"prompts": ["1", ""]}, "train_problems, problem 1: its prompt is empty"),
        ({"prompts": ["1", "x" * 91]}, "problem 1: prompt and completion need 101 tokens, more than max_tokens=100"),
        ({"prompts": ["1", "2"], "max_cache_tokens": 10}, "problem 0: .* 11 tokens, more than max_cache_tokens=10"),
        ({"prompts": ["1", "2"], "compile": True}, "need 138 tokens, more than max_cache_tokens=100"),  # whole blocks
    ]
    for options, message in mistakes:
        with pytest.raises(ValueError, match=message):
            tokenize(**options)


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ((problem for problem in [Problem("1+1=", "2")]), "must return a list of problems, got generator"),
        ([{"prompt": "1+1="}], r"problem 0 must be a flexpg.training.tasks.Problem, got dict \{'prompt': '1"),
        ([Problem("1+1=", "2"), Problem("1+1=", 2)], "problem 1: its answer must be text, got int 2"),
        ([Problem(None, "2")], "problem 0: its prompt must be text, got NoneType None"),
    ],
    ids=["generator", "dicts", "int answer", "no prompt"],
)
def test_problems_of_a_function_are_checked_and_named(monkeypatch, problems, message):
    monkeypatch.setattr("recipe_runs.sums", lambda: problems)
    with pytest.raises(ValueError, match=f"^test_problems.*{message}"):
        build_problems(OmegaConf.create({"test_problems": {"_component_": "recipe_runs.sums"}}), "test_problems")
