"""Rollouts of chats train what the assistant wrote and nothing else, and an update on them is the unshared one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from baseline import relative_error

from benchmarks.conversations import in_float64, shared_logprobs, baseline_logprobs
from examples import agent_conversations
from examples.agent_conversations import small_model, trained_tokenizer
from flexpg import PrefixTree, dense_cost, group_advantages, pack, shared_cost
from flexpg.conversations import Conversation, conversation_rollouts, template_messages
from flexpg.integrations.transformers import register
from flexpg.training.tasks import tau_bench

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "data" / "tau_bench_sample.json"
REAL = ROOT.parent / "shared" / "data" / "tau_bench" / "gpt-4o-airline.json"
END = "<|im_end|>"
DOCS = (ROOT / "docs" / "conversations.md").read_text()

# A template in the manner of Qwen3's: the reasoning of an assistant is shown until the next assistant message follows.
FORGETFUL = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and m.reasoning and loop.last %}{{- '<think>' + m.reasoning + '</think>' }}{%- endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def conversations():
    return tau_bench(SAMPLE)


@pytest.fixture(scope="module")
def tokenizer(conversations):
    return trained_tokenizer(conversations, vocab_size=1024)


def with_template(tokenizer, template):
    """The same tokenizer with another chat template."""
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    other.chat_template = template
    return other


def chat(*turns: tuple[str, str], **fields) -> Conversation:
    return Conversation([{"role": role, "content": text} for role, text in turns], **fields)


def written(message) -> str:
    """What the model would have generated for an assistant message, by hand."""
    text = message["content"]
    for call in message.get("tool_calls", []):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        text += f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return text + END


def assistant_texts(conversation) -> list[str]:
    return [written(message) for message in conversation.messages if message["role"] == "assistant"]


def trained_runs(tokenizer, completion, mask) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs, inside = [], False
    for token, trained in zip(completion.tolist(), mask.tolist(), strict=False):  # [C] is as long as the longest
        if trained and not inside:
            runs.append([])
        if trained:
            runs[-1].append(token)
        inside = trained
    return [tokenizer.decode(run) for run in runs]


def rendered(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def distinct_prefixes(sequences) -> int:
    """Nodes of a trie, by brute force."""
    nodes: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node = -1
        for token in sequence.tolist():
            node = nodes.setdefault((node, token), len(nodes))
    return len(nodes)


# --- what is trained


def assert_whole(tokenizer, conversations):
    rollouts, origin = conversation_rollouts(conversations, tokenizer)
    assert origin.tolist() == list(range(len(conversations))) and origin.dtype == torch.int64
    for n, conversation in enumerate(conversations):
        assert trained_runs(tokenizer, rollouts.completions[n], rollouts.trained[n]) == assistant_texts(conversation)
        first = [message["role"] for message in conversation.messages].index("assistant")
        prompt = tokenizer.decode(rollouts.prompts[rollouts.group_ids[n]])
        assert prompt == rendered(tokenizer, conversation.messages[:first], add_generation_prompt=True)
        text, whole = tokenizer.decode(rollouts.sequences[n]), rendered(tokenizer, conversation.messages)
        assert whole.startswith(text) and text.endswith(assistant_texts(conversation)[-1])
        assert rollouts.trained[n, rollouts.completion_lens[n] - 1]  # nothing after the last trained token


def assert_per_turn(tokenizer, conversations):
    rollouts, origin = conversation_rollouts(conversations, tokenizer, per_turn=True)
    assert rollouts.rewards.tolist() == [conversations[i].reward for i in origin]
    texts = [tokenizer.decode(completion) for completion in rollouts.completions]
    assert texts == [text for conversation in conversations for text in assistant_texts(conversation)]
    assert torch.equal(rollouts.trained, rollouts.completion_mask)
    histories = [
        rendered(tokenizer, conversation.messages[:j], add_generation_prompt=True)
        for conversation in conversations
        for j, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    assert [tokenizer.decode(rollouts.prompts[g]) for g in rollouts.group_ids] == histories


def test_whole_conversations_train_the_assistants_texts_calls_and_ends_and_nothing_else(tokenizer, conversations):
    assert_whole(tokenizer, conversations)


def test_turn_by_turn_every_completion_is_one_assistant_message_behind_its_history(tokenizer, conversations):
    assert_per_turn(tokenizer, conversations)


@pytest.mark.skipif(not REAL.exists(), reason="the 200 real conversations are not here")
def test_so_it_is_for_real_conversations_of_many_tasks(tokenizer):
    conversations = tau_bench(REAL)
    assert len(conversations) == 200
    assert sorted({each.task for each in conversations}) == list(range(50))
    assert sum(each.reward for each in conversations) == 84
    some = sorted(conversations, key=lambda each: len(str(each.messages)))[:60:10]
    assert_whole(tokenizer, some)
    assert_per_turn(tokenizer, some)


def test_turn_by_turn_each_prompt_extends_the_turn_before_it(tokenizer, conversations):
    rollouts, origin = conversation_rollouts(conversations, tokenizer, per_turn=True)
    assert set(origin.tolist()) == {0, 1, 2, 3}
    for n in range(1, len(rollouts)):
        if origin[n] == origin[n - 1]:
            before = rollouts.sequences[n - 1]
            assert torch.equal(rollouts.prompts[rollouts.group_ids[n]][: len(before)], before)


CALL = {"function": {"name": "find", "arguments": {"id": "QUERY"}}}
MIXED = Conversation(
    [
        {"role": "user", "content": "ASK"},
        {"role": "assistant", "content": "ONE"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "RESULT"},
        {"role": "tool", "content": "OTHER"},
        {"role": "assistant", "content": "TWO"},
        {"role": "user", "content": "BYE"},
    ]
)


def test_assistant_messages_in_a_row_are_turns_of_their_own_and_tool_results_are_context(tokenizer):
    call = '<tool_call>\n{"name": "find", "arguments": {"id": "QUERY"}}\n</tool_call>'
    expected = [f"ONE{END}", f"{call}{call}{END}", f"TWO{END}"]
    rollouts, _ = conversation_rollouts([MIXED], tokenizer)
    assert trained_runs(tokenizer, rollouts.completions[0], rollouts.trained[0]) == expected
    completion = tokenizer.decode(rollouts.completions[0])
    assert "RESULT" in completion and "OTHER" in completion and "BYE" not in completion
    turns, _ = conversation_rollouts([MIXED], tokenizer, per_turn=True)
    assert [tokenizer.decode(each) for each in turns.completions] == expected


def test_an_end_of_turn_token_in_a_text_ends_nothing(tokenizer):
    end = tokenizer.eos_token_id
    conversation = chat(("user", f"say {END} twice {END}"), ("assistant", f"it is {END}, see"), ("user", END))
    conversation.messages.append({"role": "assistant", "content": "fine"})
    rollouts, _ = conversation_rollouts([conversation], tokenizer)
    assert (rollouts.prompts[0] == end).sum() == 3  # two in the text, one that ends it
    expected = [f"it is {END}, see{END}", f"fine{END}"]
    assert trained_runs(tokenizer, rollouts.completions[0], rollouts.trained[0]) == expected
    turns, _ = conversation_rollouts([conversation], tokenizer, per_turn=True)
    assert [tokenizer.decode(each) for each in turns.completions] == expected


def test_stop_tokens_decide_where_a_turn_ends(tokenizer):
    conversation = chat(("user", "a"), ("assistant", "one. two"))
    dot = tokenizer.encode(".", add_special_tokens=False)

    def trained(**options) -> str:
        rollouts, _ = conversation_rollouts([conversation], tokenizer, **options)
        return tokenizer.decode(rollouts.completions[0][rollouts.trained[0]])

    assert trained() == f"one. two{END}"
    assert trained(stop_tokens=dot) == "one."
    assert trained(stop_tokens=[]) == f"one. two{END}\n"  # the template's own newline counts, too


def test_a_tokenizer_without_an_end_of_sequence_token_trains_all_of_a_turn(tokenizer):
    class Plain:
        eos_token_id = None
        apply_chat_template = tokenizer.apply_chat_template

    rollouts, _ = conversation_rollouts([chat(("user", "a"), ("assistant", "b"))], Plain())
    assert tokenizer.decode(rollouts.completions[0]) == f"b{END}\n"


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    conversation = chat(("assistant", "Hello!"), ("user", "hi"), ("assistant", "Yes?"))
    rollouts, _ = conversation_rollouts([conversation], tokenizer)
    assert tokenizer.decode(rollouts.prompts[0]) == "<|im_start|>assistant\n"
    runs = trained_runs(tokenizer, rollouts.completions[0], rollouts.trained[0])
    assert runs == [f"Hello!{END}", f"Yes?{END}"]
    default = with_template(tokenizer, "{{- 'You help.\n' }}" + tokenizer.chat_template)
    rollouts, _ = conversation_rollouts([conversation], default, per_turn=True)
    assert tokenizer.decode(rollouts.prompts[0]) == "You help.\n<|im_start|>assistant\n"
    assert tokenizer.decode(rollouts.completions[0]) == f"Hello!{END}"


def test_an_opening_assistant_behind_a_second_generation_prompt_is_refused(tokenizer):
    example = with_template(tokenizer, "{{- 'As in <|im_start|>assistant\nYes.' }}" + tokenizer.chat_template)
    message = "conversation 0 of 1, message 0: the template does not .* and once, so where it begins is unknown"
    for template, said in ((example, "Hello!"), (tokenizer, "I am <|im_start|>assistant\n")):
        with pytest.raises(ValueError, match=message):
            conversation_rollouts([chat(("assistant", said), ("user", "hi"))], template)
    rollouts, _ = conversation_rollouts([chat(("user", "hi"), ("assistant", "Hello!"))], example)
    assert tokenizer.decode(rollouts.completions[0]) == f"Hello!{END}"  # behind a message, it is known


def test_a_template_that_ends_turns_only_where_another_follows_has_no_end_trained(tokenizer):
    between = "{% for m in messages %}{{ m.role + m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
    prompted = with_template(tokenizer, between + "{% if add_generation_prompt %}<|im_end|>assistant{% endif %}")
    rollouts, _ = conversation_rollouts([chat(("user", "a"), ("assistant", "b"))], prompted)
    assert tokenizer.decode(rollouts.completions[0]) == "b"


@pytest.mark.parametrize("reward", [1, 0.5, np.float32(0.5), -3e38])
def test_a_reward_that_float32_holds_is_kept(tokenizer, reward):
    rollouts, _ = conversation_rollouts([replace(GOOD, reward=reward)], tokenizer)
    assert torch.equal(rollouts.rewards, torch.tensor([float(reward)]))


def test_tools_and_options_reach_the_template(tokenizer):
    conversation = chat(("system", "S"), ("user", "a"), ("assistant", "b"), tools=[{"name": "refund_by_mail"}])
    rollouts, _ = conversation_rollouts([conversation], tokenizer)
    assert '{"name": "refund_by_mail"}' in tokenizer.decode(rollouts.prompts[0])
    shouting = with_template(tokenizer, "{{- greeting }}" + tokenizer.chat_template)
    rollouts, _ = conversation_rollouts([conversation], shouting, template_options={"greeting": "HEY"})
    assert tokenizer.decode(rollouts.prompts[0]).startswith("HEY<|im_start|>")


# --- what is shared


def test_equal_prompts_share_a_group_whatever_their_task(tokenizer, conversations):
    rollouts, origin = conversation_rollouts(conversations, tokenizer)
    assert rollouts.group_ids.tolist() == [0, 0, 1, 2]  # both trials of task 43 open with the same words
    assert [each.task for each in conversations] == [43, 43, 44, 44]
    advantages = group_advantages(rollouts.rewards, torch.tensor([each.task for each in conversations])[origin])
    assert [value > 0 for value in advantages.tolist()] == [each.reward == 1 for each in conversations]


def test_one_tree_holds_every_distinct_beginning_once_and_turn_by_turn_not_one_token_more(tokenizer, conversations):
    whole, _ = conversation_rollouts(conversations, tokenizer)
    turns, _ = conversation_rollouts(conversations, tokenizer, per_turn=True)
    trees = [PrefixTree.from_sequences(rollouts.sequences) for rollouts in (whole, turns)]
    assert [shared_cost(tree).tokens for tree in trees] == [distinct_prefixes(whole.sequences)] * 2
    policy = len(tokenizer.apply_chat_template(conversations[0].messages[:1], tokenize=True, return_dict=False))
    assert trees[0].num_tokens <= int(trees[0].lengths.sum()) - 3 * policy
    assert dense_cost(trees[1]).tokens > 4 * dense_cost(trees[0]).tokens


# --- templates that rewrite


REASONED = Conversation(
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "hm"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning": "oh"},
    ]
)


def test_a_template_that_rewrites_history_is_refused_whole_and_exact_turn_by_turn(tokenizer):
    forgetful = with_template(tokenizer, FORGETFUL)
    message = re.escape("conversation 1 of 2, message 1: its tokens, or those before them, are others once message 3")
    with pytest.raises(ValueError, match=message + ".*per_turn=True"):
        conversation_rollouts([chat(("user", "a"), ("assistant", "b")), REASONED], forgetful)
    rollouts, origin = conversation_rollouts([REASONED], forgetful, per_turn=True)
    assert origin.tolist() == [0, 0]
    texts = [tokenizer.decode(each) for each in rollouts.completions]
    assert texts == [f"<think>hm</think>b{END}", f"<think>oh</think>d{END}"]
    second = tokenizer.decode(rollouts.prompts[1])
    assert second == rendered(forgetful, REASONED.messages[:3], add_generation_prompt=True) and "hm" not in second


def published(name: str) -> str:
    """A published chat template, as TRL carries it."""
    return (Path(find_spec("trl").origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def test_qwen2_5s_own_template_is_cut_exactly(tokenizer, conversations):
    qwen = with_template(tokenizer, published("qwen2_5"))
    rollouts, _ = conversation_rollouts(conversations[:1], qwen)
    runs = trained_runs(tokenizer, rollouts.completions[0], rollouts.trained[0])
    assert [run.replace("\n", "") for run in runs] == [t.replace("\n", "") for t in assistant_texts(conversations[0])]
    assert tokenizer.decode(rollouts.sequences[0]) in rendered(qwen, conversations[0].messages)


def test_qwen3s_own_template_is_refused_whole_and_exact_turn_by_turn(tokenizer, conversations):
    qwen = with_template(tokenizer, published("qwen3"))
    with pytest.raises(ValueError, match=r"conversation 0 of 4, message 2: its tokens.*once message 4 follows"):
        conversation_rollouts(conversations, qwen)
    rollouts, _ = conversation_rollouts(conversations, qwen, per_turn=True, template_options={"enable_thinking": False})
    texts = [tokenizer.decode(each) for each in rollouts.completions]
    assert texts == [text for conversation in conversations for text in assistant_texts(conversation)]
    assert tokenizer.decode(rollouts.prompts[0]).endswith("<think>\n\n</think>\n\n")


# --- the update


@pytest.fixture(scope="module")
def double(conversations, tokenizer):
    """Rollouts of the sample's beginnings with a short policy, both ways, and float64 models that share or do not."""
    register()
    short = [
        replace(each, messages=[each.messages[0] | {"content": each.messages[0]["content"][:200]}, *each.messages[1:9]])
        for each in conversations
    ]
    tasks = torch.tensor([each.task for each in short])
    ways = {}
    for per_turn in (False, True):
        rollouts, origin = conversation_rollouts(short, tokenizer, per_turn=per_turn)
        ways[per_turn] = rollouts, group_advantages(rollouts.rewards.double(), tasks[origin])
    return ways, [in_float64(small_model(tokenizer, attention)) for attention in ("sdpa", "flexpg")]


def gradients(model, step, *args):
    model.zero_grad()
    logprobs = step(model, *args)
    return logprobs, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_error(values, expected) -> float:
    return max(relative_error(values[name], expected[name]) for name in expected)


@pytest.mark.parametrize("per_turn", [False, True])
def test_an_update_on_real_conversations_is_the_unshared_one(double, per_turn):
    ways, (ordinary, shared) = double
    rollouts, advantages = ways[per_turn]
    expected_logprobs, expected = gradients(ordinary, baseline_logprobs, rollouts, advantages)
    logprobs, values = gradients(shared, shared_logprobs, rollouts, advantages, 16384)
    assert len(pack(rollouts, 16384)) < len(rollouts)
    assert expected_logprobs[rollouts.trained].max() < -1e-3 and logprobs.dtype == torch.float64
    assert (logprobs - expected_logprobs).abs().max() < 1e-10
    assert largest_error(values, expected) < 1e-9


def test_training_tool_results_or_flat_positions_would_be_another_update(double, monkeypatch):
    ways, (ordinary, shared) = double
    rollouts, advantages = ways[False]
    expected_logprobs, expected = gradients(ordinary, baseline_logprobs, rollouts, advantages)
    everything = replace(rollouts, loss_mask=None)
    logprobs, values = gradients(shared, shared_logprobs, everything, advantages, 16384)
    # A token's value does not depend on what else is trained: the mask alone decides what is learnt.
    assert (logprobs - expected_logprobs)[rollouts.trained].abs().max() < 1e-10
    assert largest_error(values, expected) > 0.1
    monkeypatch.setattr(PrefixTree, "position_ids", property(lambda tree: torch.arange(len(tree))))
    logprobs, values = gradients(shared, shared_logprobs, rollouts, advantages, 16384)
    assert (logprobs - expected_logprobs).abs().max() > 1e-3
    assert largest_error(values, expected) > 1e-3


# --- what is refused


USER, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD = Conversation([USER, SAID])


BODY = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (
            BODY + "{% if add_generation_prompt %}<tool_call>{% endif %}",
            GOOD,
            "conversation 0 of 1, message 1: the template does not render it as its generation prompt and what follows",
        ),
        (
            BODY + "{% if add_generation_prompt %}<tool_call>{% endif %}",
            Conversation([SAID]),
            "conversation 0 of 1, message 0: the template does not render it as its generation prompt",
        ),
        (BODY, Conversation([SAID]), "conversation 0 of 1, message 0: no token stands before it; put a system or user"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% endfor %}",
            GOOD,
            "conversation 0 of 1, message 1 has no token, as the template renders it; drop the message",
        ),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(tokenizer, template, conversation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        conversation_rollouts([conversation], with_template(tokenizer, template), per_turn=True)


def test_an_error_of_the_template_names_the_conversation(tokenizer):
    strict = with_template(tokenizer, "{{ raise_exception('no tools here') }}")
    with pytest.raises(Exception, match="no tools here") as caught:
        conversation_rollouts([GOOD], strict)
    note = "conversation 0 of 1: the tokenizer's chat template was given its messages 0 to 1"
    assert caught.value.__notes__ == [note]


# --- transcripts of an API, and tau-bench's files


def test_messages_of_an_api_become_those_of_a_template_and_stay_as_they_were():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "x"}]
    before = json.dumps(messages)
    first, second = template_messages(messages)
    assert first["content"] == "" and first["tool_calls"][0]["function"]["arguments"] == {"a": [1, "é"]}
    assert (first["tool_calls"][0]["id"], second) == ("1", {"role": "tool", "content": "x"})
    assert json.dumps(messages) == before
    assert template_messages([first, second]) == [first, second]
    assert template_messages([{"role": "assistant", "tool_calls": [call]}])[0]["content"] == ""


def test_tau_benchs_sample_is_read_with_its_calls_parsed(conversations):
    assert [each.reward for each in conversations] == [1.0, 0.0, 0.0, 1.0]
    raw = json.loads(SAMPLE.read_text())
    for entry, conversation in zip(raw, conversations, strict=True):
        assert conversation.tools is None
        for theirs, ours in zip(entry["traj"], conversation.messages, strict=True):
            assert (ours["role"], ours["content"]) == (theirs["role"], theirs["content"] or "")
            for text, call in zip(theirs.get("tool_calls") or [], ours.get("tool_calls") or [], strict=True):
                assert json.loads(text["function"]["arguments"]) == call["function"]["arguments"]
    assert sum(len(m.get("tool_calls") or []) for each in conversations for m in each.messages) > 4


@pytest.mark.skipif(not REAL.exists(), reason="the 200 real conversations are not here")
def test_the_sample_is_taken_from_the_real_file_unchanged():
    real = json.loads(REAL.read_text())
    assert all(entry in real for entry in json.loads(SAMPLE.read_text()))


# --- the example and the page


def test_the_example_prints_what_it_saves(monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(agent_conversations, "trained_tokenizer", lambda conversations: tokenizer)
    monkeypatch.setattr("sys.argv", ["agent_conversations.py"])
    agent_conversations.main()
    printed = capsys.readouterr().out
    assert "a rollout per turn: 23" in printed and "a rollout per conversation: 4" in printed
    assert float(printed.split("gradient norm ")[1]) > 0


def test_the_page_quotes_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks" / "results" / "conversations_cpu.json").read_text())
    assert f"Of {result['conversations']} conversations" in DOCS


def test_the_pages_snippets_run(conversations, tokenizer, monkeypatch, tmp_path):
    register()
    model = small_model(tokenizer)
    monkeypatch.chdir(ROOT)
    names = {"tokenizer": tokenizer, "model": model}
    for snippet in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL):
        exec(snippet, names)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_file_that_the_page_names_exists():
    targets = re.findall(r"\]\(((?!http)[^)]+)\)", DOCS)
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target


class DataSet:
    """Conversations with a length, by their number, as `datasets` has rows; no Sequence."""

    def __init__(self, rows: list[Conversation]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Conversation:
        return self.rows[number]


def test_conversations_need_no_more_than_a_length_and_numbers(conversations, tokenizer):
    ours, theirs = (conversation_rollouts(given, tokenizer) for given in (DataSet(conversations), conversations))
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0].rewards, theirs[0].rewards)
    assert all(map(torch.equal, ours[0].completions, theirs[0].completions))
