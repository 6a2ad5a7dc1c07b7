"""Episodes of several turns, against the turns that flexpg.conversations reads from the finished conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from chat_tokenizers import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from omegaconf import OmegaConf
from torch import Tensor
from trl.chat_template_utils import add_response_schema, parse_response

from flexpg import PrefixTree
from flexpg.conversations.chat_template import assistant_turns
from flexpg.sampling import Samples
from flexpg.training import causal_lm
from flexpg.training.causal_lm import CheckpointTokenizer
from flexpg.training.dialogues import next_prompt, sample_dialogues
from flexpg.training.distributed import World
from flexpg.training.environments import EnvironmentConfig, build_environment
from flexpg.training.episodes import build_rollouts, episode_advantages, subtract_kl
from flexpg.training.prompts import assistant_message, prompt_tokens
from flexpg.training.tasks import ByteTokenizer, Problem

PROBLEM = Problem("What is 6 times 7?", "42")


class Script:
    """A sampler that writes given texts, each with a stop token unless it ends with an ellipsis."""

    def __init__(self, tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.seeds: list[int] = []

    def __call__(self, prompts: Sequence[Tensor], group_size: int, seeds: Sequence[int]) -> Samples:
        drawn = [self.texts.pop(0) for _ in range(len(prompts) * group_size)]
        self.seeds += seeds
        stop = self.tokenizer.stop_tokens[:1]
        tokens = [torch.tensor(self.tokenizer.encode(text) + stop * (not text.endswith("..."))) for text in drawn]
        logprobs = torch.zeros(len(drawn), max(map(len, tokens), default=0))
        return Samples(tokens, logprobs, torch.tensor([not text.endswith("...") for text in drawn]))


def tool(messages: list, problem: Problem) -> tuple[list, float]:
    """Answer every turn but one that says `done`."""
    is_done = "done" in messages[-1]["content"]
    return ([], 1.0) if is_done else ([{"role": "tool", "content": f"saw {len(messages)} messages"}], 0.125)


def played(tokenizer, texts: Sequence[str], group_size: int = 1, max_turns: int = 5, **options):
    environment = EnvironmentConfig(lambda problem: lambda messages: tool(messages, problem), max_turns)
    options = {"prompt_format": "chat", "max_prompt": 10_000, "world": None} | options
    prompt = torch.tensor(prompt_tokens(tokenizer, PROBLEM.prompt, options["prompt_format"]))
    script = Script(tokenizer, texts)
    (group,) = sample_dialogues(environment, script, tokenizer, [PROBLEM], [prompt], group_size, [7], **options)
    assert not script.texts
    return group, script


def checkpoint_tokenizer(family: str) -> CheckpointTokenizer:
    tokenizer = chat_tokenizer(family, family)
    return CheckpointTokenizer(tokenizer, [tokenizer.eos_token_id], {})


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3"])
def test_turns_equal_those_read_from_the_finished_conversation(family):
    tokenizer = checkpoint_tokenizer(family)
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""  # its template writes one in any case
    texts = [f"{thought}{text}" for text in ("I multiply.", "Again.", "It is done.")]
    ([episode], _) = played(tokenizer, texts)
    messages = [{"role": "user", "content": PROBLEM.prompt}]
    for n, text in enumerate(texts):
        messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": f"saw {2 * n + 2} messages"}]
    expected = assistant_turns(tokenizer.tokenizer, messages[:-1])
    assert len(expected) == len(episode.turns) == 3
    for turn, read in zip(episode.turns, expected, strict=True):
        assert turn.prompt.tolist() == read.history.tolist()
        assert turn.completion.tolist() == read.completion.tolist()
    assert (episode.reward, episode.is_finished) == (0.125 + 0.125 + 1.0, True)


def test_template_that_drops_reasoning_makes_prompts_without_it():
    tokenizer = checkpoint_tokenizer("qwen3")

    def asks_again(messages: list) -> tuple[list, float]:
        return [{"role": "user", "content": "And now?"}] if len(messages) == 2 else [], 0.0

    prompt = torch.tensor(prompt_tokens(tokenizer, PROBLEM.prompt, "chat"))
    texts = ["<think>\nhm\n</think>\n\nIt is 42.", "<think>\nok\n</think>\n\nStill 42."]
    [[episode]] = sample_dialogues(
        EnvironmentConfig(lambda problem: asks_again, 3),
        Script(tokenizer, texts),
        tokenizer,
        [PROBLEM],
        [prompt],
        1,
        [0],
        prompt_format="chat",
        max_prompt=1000,
        world=None,
    )
    first, second = episode.turns
    assert "hm" in tokenizer.decode(first.completion.tolist())
    seen = tokenizer.decode_all(second.prompt.tolist())
    assert "hm" not in seen and "It is 42." in seen and "And now?" in seen


def test_plain_format_appends_the_answers_text():
    ([episode], _) = played(ByteTokenizer(), ["a", "done"], prompt_format="plain")
    assert [bytes(turn.prompt.tolist()).decode(errors="replace") for turn in episode.turns[:1]] == [PROBLEM.prompt]
    stop = ByteTokenizer().stop_tokens[0]
    after = [*PROBLEM.prompt.encode(), *b"a", stop, *b"saw 2 messages"]
    assert episode.turns[1].prompt.tolist() == after


def test_episodes_of_a_group_end_at_different_turns():
    texts = [
        "one",
        "done",
        "cut off...",
        "one",
        "done",
        "one",
    ]  # the first turns of four episodes, then two second ones
    group, script = played(ByteTokenizer(), texts, group_size=4, max_turns=2, prompt_format="plain")
    assert [len(episode.turns) for episode in group] == [2, 1, 1, 2]
    assert [episode.reward for episode in group] == [0.125 + 1.0, 1.0, 0.125, 0.25]
    assert [episode.is_finished for episode in group] == [True, True, False, True]
    assert len(set(script.seeds)) == 3  # of the problem, and of each second turn


def test_prompt_over_the_limit_ends_the_episode_unfinished():
    size = len(PROBLEM.prompt)
    (group, _) = played(ByteTokenizer(), ["one"], max_prompt=size + 5, prompt_format="plain")
    assert (len(group[0].turns), group[0].is_finished, group[0].reward) == (1, False, 0.125)


def test_rollouts_of_turns_share_their_histories():
    group, _ = played(ByteTokenizer(), ["x" * 50, "y" * 50, "done", "done"], group_size=2, prompt_format="plain")
    data = build_rollouts([group], torch.tensor([[3.0, 1.0]]), torch.device("cpu"), with_logprobs=True)
    assert data.episode.tolist() == [0, 0, 1, 1] and data.problem.tolist() == [0] * 4
    assert data.rollouts.rewards.tolist() == [3.0, 3.0, 1.0, 1.0]
    assert data.rollouts.group_ids.tolist() == [0, 1, 0, 2]
    tree = PrefixTree.from_sequences(data.rollouts.sequences)
    longest = [len(episode.turns[-1].prompt) + 5 for episode in group]
    assert tree.num_tokens <= sum(longest) - len(PROBLEM.prompt)


def test_episode_advantages_count_an_episode_once():
    group, _ = played(ByteTokenizer(), ["x", "done", "done"], group_size=2, prompt_format="plain")
    data = build_rollouts([group], torch.tensor([[3.0, 1.0]]), torch.device("cpu"), with_logprobs=False)
    assert episode_advantages(data, "none").tolist() == [1.0, 1.0, -1.0]  # a mean over turns would be 7 / 3


def test_subtract_kl_sums_over_the_turns_of_an_episode():
    group, _ = played(ByteTokenizer(), ["x", "done", "done"], group_size=2, prompt_format="plain")
    data = build_rollouts([group], torch.tensor([[3.0, 1.0]]), torch.device("cpu"), with_logprobs=False)
    assert data.episode.tolist() == [0, 0, 1]
    mask = data.rollouts.loss_mask
    tables = {"old_logprobs": mask * -1.0, "ref_logprobs": mask * torch.tensor([-1.5, -2.0, -0.75])[:, None]}
    data = replace(data, rollouts=replace(data.rollouts, **tables))
    shifted, mean = subtract_kl(data, 2.0, World(0, 1, torch.device("cpu")))
    first = 0.5 * len("x\n") + 1.0 * len("done\n")
    second = -0.25 * len("done\n")
    assert mean == (first + second) / 2
    assert shifted.rollouts.rewards.tolist() == [3 - 2 * first] * 2 + [1 - 2 * second]


# Tool calls


CALL = (
    '<tool_call>\n{"name":"price",  "arguments": {"item": "egg"}}\n</tool_call>'  # not as the template would write it
)
PRICE = {"type": "function", "function": {"name": "price", "arguments": {"item": "egg"}}}
CALLS = {  # by family, in the format of its template; the stop token follows
    "qwen3": f"I look.\n{CALL}\n{CALL}",
    "llama3": '{"name": "price", "parameters": {"item": "egg"}}',
    "gptoss": "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant to=functions.price<|channel|>commentary "
    'json<|message|>{"item": "egg"}',
}
TEMPLATES = {"qwen3": "qwen3", "llama3": "llama3_2", "gptoss": "gptoss"}
STOPS = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gptoss": "<|call|>"}


def parsing_tokenizer(family: str) -> CheckpointTokenizer:
    tokenizer = add_response_schema(chat_tokenizer(family, TEMPLATES[family]))
    return CheckpointTokenizer(tokenizer, tokenizer.encode(STOPS[family], add_special_tokens=False), {})


def conversation(tokenizer, texts: Sequence[str], role: str = "tool"):
    """Return the only episode, and the messages that its environment has got at each turn."""
    seen = []

    def answers_twice(messages: list) -> tuple[list, float]:
        seen.append(messages)
        return ([] if len(seen) == 2 else [{"role": role, "name": "price", "content": "3"}]), 0.0

    prompt = torch.tensor(prompt_tokens(tokenizer, PROBLEM.prompt, "chat"))
    options = {"prompt_format": "chat", "max_prompt": 10_000, "world": None}
    environment = EnvironmentConfig(lambda problem: answers_twice, 3)
    script = Script(tokenizer, texts)
    [[episode]] = sample_dialogues(environment, script, tokenizer, [PROBLEM], [prompt], 1, [0], **options)
    return episode, seen


@pytest.mark.parametrize("family", CALLS)
def test_environment_gets_tool_calls_as_trl_parses_them(family):
    tokenizer = parsing_tokenizer(family)
    episode, (first, second) = conversation(tokenizer, [CALLS[family], "It costs 3."])
    user, message = first
    assert user == {"role": "user", "content": PROBLEM.prompt}
    assert message["tool_calls"] == [PRICE] * (2 if family == "qwen3" else 1)
    turn = episode.turns[0]
    assert message == parse_response(tokenizer.tokenizer, turn.completion.tolist(), turn.prompt.tolist())
    assert second[:-1] == [user, message, {"role": "tool", "name": "price", "content": "3"}]
    assert "tool_calls" not in second[-1]


def test_parsing_tool_calls_changes_no_token():
    thought = "<think>\nhm\n</think>\n\n"
    texts = [f"{thought}{CALLS['qwen3']}", f"{thought}It costs 3."]
    parsing, plain = parsing_tokenizer("qwen3"), parsing_tokenizer("qwen3")
    plain.tokenizer.response_template = None
    (parsed, seen), (other, seen_as_text) = conversation(parsing, texts), conversation(plain, texts)
    assert seen[0][-1]["tool_calls"] and seen_as_text[0][-1]["content"] == texts[0]
    for turn, expected in zip(parsed.turns, other.turns, strict=True):
        assert torch.equal(turn.prompt, expected.prompt) and torch.equal(turn.completion, expected.completion)
    first, second = parsed.turns
    sampled = torch.cat([first.prompt, first.completion])
    assert torch.equal(second.prompt[: len(sampled)], sampled)


def test_calls_of_special_tokens_are_written_by_the_template():
    tokenizer = parsing_tokenizer("gptoss")
    episode, _ = conversation(tokenizer, [CALLS["gptoss"], "<|channel|>final<|message|>3"])
    seen = tokenizer.decode_all(episode.turns[1].prompt.tolist())
    assert 'to=functions.price<|channel|>commentary json<|message|>{"item": "egg"}<|call|>' in seen
    assert "<|start|>functions.price to=assistant<|channel|>commentary<|message|>" in seen


def test_turn_that_the_template_refuses_with_calls_is_written_as_text():
    tokenizer = parsing_tokenizer("gptoss")
    answer, call = "<|start|>assistant<|channel|>final<|message|>3<|return|>", "<|start|>assistant to="
    text = CALLS["gptoss"].replace(call, answer + call)  # reasoning, an answer and a call
    episode, (first, _) = conversation(tokenizer, [text, "<|channel|>final<|message|>3"], role="user")
    assert first[-1]["content"] == "3" and first[-1]["thinking"] == "I look." and first[-1]["tool_calls"] == [PRICE]
    assert 'assistant to=functions.pricecommentary json{"item": "egg"}' in tokenizer.decode_all(
        episode.turns[1].prompt.tolist()
    )
    with pytest.raises(TemplateError, match="no previous assistant message with a tool call"):
        conversation(tokenizer, ["<|channel|>final<|message|>3", "3"])


MALFORMED = {
    "cut off": '<tool_call>\n{"name": "price", "argu',
    "no JSON": "<tool_call>\nprice(egg)\n</tool_call>",
    "a list": "<tool_call>\n[1, 2]\n</tool_call>",
    "no name": '<tool_call>\n{"arguments": {}}\n</tool_call>',
    "name of another type": '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
    "arguments as text": '<tool_call>\n{"name": "price", "arguments": "egg"}\n</tool_call>',
    "one of two": f"{CALL}\n<tool_call>\nprice(egg)\n</tool_call>",
    "a thousand brackets": f"<tool_call>{'[' * 100_000}",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_tool_calls_are_content(text):
    tokenizer = parsing_tokenizer("qwen3")
    prompt = prompt_tokens(tokenizer, PROBLEM.prompt, "chat")
    completion = tokenizer.encode(text) + tokenizer.stop_tokens
    assert assistant_message(tokenizer, prompt, completion) == {"role": "assistant", "content": text}


PARTS = (
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        '"name"',
        '"price"',
        '"arguments"',
        '"parameters"',
        "null",
        "1e999",
        "\n",
        "text",
    ),
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<|channel|>", "<|message|>", " to=functions.", "<|end|>"),
    *CALLS.values(),
)


@pytest.mark.parametrize("family", CALLS)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=12), is_finished=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_text_becomes_a_message(family, parts, is_finished):
    tokenizer = parsing_tokenizer_once(family)
    prompt = prompt_tokens(tokenizer, PROBLEM.prompt, "chat")
    completion = tokenizer.encode(f"{''.join(parts)}.") + tokenizer.stop_tokens * is_finished
    message = assistant_message(tokenizer, prompt, completion)
    assert message["role"] == "assistant" and isinstance(message["content"], str)
    for call in message.get("tool_calls", []):
        assert call["type"] == "function" and set(call["function"]) == {"name", "arguments"}
        assert isinstance(call["function"]["name"], str) and isinstance(call["function"]["arguments"], dict)


parsing_tokenizer_once = cache(parsing_tokenizer)


def test_stop_token_that_the_template_does_not_know_is_not_content():
    tokenizer = parsing_tokenizer("qwen3")
    tokenizer.stop_tokens = tokenizer.tokenizer.encode("<|endoftext|>")
    completion = tokenizer.encode("It is 42.") + tokenizer.stop_tokens
    assert assistant_message(tokenizer, [], completion) == {"role": "assistant", "content": "It is 42."}


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    parsing_tokenizer("qwen3").tokenizer.save_pretrained(folder)
    return str(folder)


def test_functions_are_tools_of_prompt_and_environment(qwen3_folder):
    loaded = causal_lm.tokenizer(qwen3_folder, tools=["test_dialogues.add"])
    prompt = loaded.decode_all(prompt_tokens(loaded, PROBLEM.prompt, "chat"))
    assert '"name": "add"' in prompt and "Add two numbers." in prompt
    environment = build_environment({"_component_": "flexpg.training.tools.Tools", "functions": ["test_dialogues.add"]})
    called = [("add", {"a": 6, "b": 7}), ("add", {"a": 6}), ("remove", {})]
    calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in called]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    found, reward = environment.begin(PROBLEM)([message])
    sum_, missing, unknown = (message["content"] for message in found)
    assert (sum_, reward) == ("13", 0.0)
    assert missing.startswith("error: TypeError") and unknown == "error: there is no tool remove, the tools are add"
    assert environment.begin(PROBLEM)([{"role": "assistant", "content": "13"}]) == ([], 0.0)


def test_wrong_or_missing_response_template_raises_value_error(qwen3_folder, tmp_path):
    wrong = parsing_tokenizer("qwen3").tokenizer
    wrong.response_template = {"start_anchor": "<|im_start|>", "fields": {"content": {"content": "yaml"}}}
    wrong.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown content parser 'yaml'"):
        causal_lm.tokenizer(str(tmp_path))
    wrong.response_template = None
    wrong.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tools need a tokenizer with a response_template"):
        causal_lm.tokenizer(str(tmp_path), tools=["test_dialogues.add"])


def test_template_options_of_a_configuration_are_plain_objects(qwen3_folder):
    tools = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
    loaded = causal_lm.tokenizer(qwen3_folder, template_options=OmegaConf.create({"tools": tools}))
    assert loaded.template_options == {"tools": tools} and type(loaded.template_options["tools"][0]) is dict
    assert '"name": "price"' in loaded.decode_all(prompt_tokens(loaded, PROBLEM.prompt, "chat"))


def test_system_prompt_is_in_front_of_every_turn(qwen3_folder):
    loaded = causal_lm.tokenizer(qwen3_folder, system_prompt="Be brief.")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM.prompt}
    first = torch.tensor(prompt_tokens(loaded, PROBLEM.prompt, "chat"))
    chat = loaded.tokenizer.apply_chat_template
    assert first.tolist() == chat([system, user], add_generation_prompt=True, return_dict=False)
    turn, answer = {"role": "assistant", "content": "four"}, {"role": "user", "content": "Sure?"}
    seen = torch.cat([first, torch.tensor(loaded.encode("four<|im_end|>"))])
    messages = [user, turn, answer]
    later = next_prompt(loaded, seen, messages, messages, 1, "chat")
    assert later.tolist() == chat([system, *messages], add_generation_prompt=True, return_dict=False)
    assert later[: len(seen)].tolist() == seen.tolist()


def test_system_prompt_that_is_no_text_or_that_a_template_refuses_raises_value_error(qwen3_folder):
    with pytest.raises(ValueError, match="system_prompt must be a text, got 5"):
        causal_lm.tokenizer(qwen3_folder, system_prompt=5)
    loaded = causal_lm.tokenizer(qwen3_folder, system_prompt="Be brief.")
    loaded.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"  # as Gemma 2's
    with pytest.raises(ValueError, match="the chat template refuses the prompt: System role not supported"):
        prompt_tokens(loaded, PROBLEM.prompt, "chat")
