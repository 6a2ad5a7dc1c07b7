"""Rollouts of conversations have only assistant tokens in the loss, and an update on them equals the baseline's."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baseline import relative_error
from chat_tokenizers import chat_tokenizer, published_template
from hf_models import in_float64

import flexpg
from examples import agent_conversations
from examples.agent_conversations import small_model, trained_tokenizer
from flexpg import group_advantages, pack
from flexpg.conversations import Conversation, conversation_rollouts, read_conversations, template_messages

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "data" / "tau_bench_sample.json"
REAL = ROOT.parent / "shared" / "data" / "tau_bench" / "gpt-4o-airline.json"
END = "<|im_end|>"
DOCS = (ROOT / "docs" / "conversations.md").read_text()

# Like Qwen3's template: the reasoning of an assistant is shown until the next assistant message follows.
FORGETFUL = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and m.reasoning and loop.last %}{{- '<think>' + m.reasoning + '</think>' }}{%- endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def conversations():
    return read_conversations(SAMPLE)


@pytest.fixture(scope="module")
def tokenizer(conversations):
    return trained_tokenizer(conversations, vocab_size=1024)


def with_template(tokenizer, template):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    other.chat_template = template
    return other


def chat(*turns: tuple[str, str], **fields) -> Conversation:
    return Conversation([{"role": role, "content": text} for role, text in turns], **fields)


def generated_text(message) -> str:
    """Return what the model would have generated for an assistant message, by hand."""
    text = message["content"]
    for call in message.get("tool_calls", []):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        text += f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return text + END


def assistant_texts(conversation) -> list[str]:
    messages = template_messages(conversation.messages)
    return [generated_text(message) for message in messages if message["role"] == "assistant"]


def texts_in_loss(tokenizer, completion, mask) -> list[str]:
    """Return the text of each contiguous range of tokens in the loss."""
    ranges, inside = [], False
    for token, in_loss in zip(completion.tolist(), mask.tolist(), strict=False):  # [C] is as long as the longest
        if in_loss and not inside:
            ranges.append([])
        if in_loss:
            ranges[-1].append(token)
        inside = in_loss
    return [tokenizer.decode(tokens) for tokens in ranges]


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(template_messages(messages), tokenize=False, **options)


def distinct_prefixes(sequences) -> int:
    """Count the nodes of a trie by brute force."""
    nodes: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node = -1
        for token in sequence.tolist():
            node = nodes.setdefault((node, token), len(nodes))
    return len(nodes)


# What is in the loss


def check_whole(tokenizer, conversations):
    rollouts, origin = conversation_rollouts(conversations, tokenizer)
    assert origin.tolist() == list(range(len(conversations))) and origin.dtype == torch.int64
    for n, conversation in enumerate(conversations):
        assert texts_in_loss(tokenizer, rollouts.completions[n], rollouts.loss_mask[n]) == assistant_texts(conversation)
        first = [message["role"] for message in conversation.messages].index("assistant")
        prompt = tokenizer.decode(rollouts.prompts[rollouts.group_ids[n]])
        assert prompt == render(tokenizer, conversation.messages[:first], add_generation_prompt=True)
        text, whole = tokenizer.decode(rollouts.sequences[n]), render(tokenizer, conversation.messages)
        assert whole.startswith(text) and text.endswith(assistant_texts(conversation)[-1])
        assert rollouts.loss_mask[n, rollouts.completion_lens[n] - 1]  # nothing after the last token in the loss


def check_per_turn(tokenizer, conversations):
    rollouts, origin = conversation_rollouts(conversations, tokenizer, per_turn=True)
    assert rollouts.rewards.tolist() == [conversations[i].reward for i in origin]
    texts = [tokenizer.decode(completion) for completion in rollouts.completions]
    assert texts == [text for conversation in conversations for text in assistant_texts(conversation)]
    assert torch.equal(rollouts.loss_mask, rollouts.completion_mask)
    histories = [
        render(tokenizer, conversation.messages[:j], add_generation_prompt=True)
        for conversation in conversations
        for j, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    assert [tokenizer.decode(rollouts.prompts[g]) for g in rollouts.group_ids] == histories


def test_whole_conversations_have_only_assistant_tokens_in_the_loss(tokenizer, conversations):
    check_whole(tokenizer, conversations)


def test_per_turn_completions_are_assistant_messages_after_their_history(tokenizer, conversations):
    check_per_turn(tokenizer, conversations)
    rollouts, origin = conversation_rollouts(conversations, tokenizer, per_turn=True)
    assert set(origin.tolist()) == {0, 1, 2, 3}
    for n in range(1, len(rollouts)):
        if origin[n] == origin[n - 1]:
            before = rollouts.sequences[n - 1]
            assert torch.equal(rollouts.prompts[rollouts.group_ids[n]][: len(before)], before)


@pytest.mark.skipif(not REAL.exists(), reason="the 200 real conversations are not here")
def test_tau_bench_conversations_have_only_assistant_tokens_in_the_loss(tokenizer):
    conversations = read_conversations(REAL)
    assert len(conversations) == 200
    assert sorted({each.task for each in conversations}) == list(range(50))
    assert sum(each.reward for each in conversations) == 84
    some = sorted(conversations, key=lambda each: len(str(each.messages)))[:60:10]
    check_whole(tokenizer, some)
    check_per_turn(tokenizer, some)
    raw = json.loads(REAL.read_text())
    assert all(entry in raw for entry in json.loads(SAMPLE.read_text()))


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


def as_items(messages) -> list[dict]:
    """Return messages as OpenAI's Responses API writes them."""
    items = []
    for message in messages:
        kind = "output_text" if message["role"] == "assistant" else "input_text"
        content = [{"type": kind, "text": message["content"]}] if message["content"] else []
        if message["role"] == "tool":
            output = {"call_id": message["tool_call_id"], "output": message["content"]}
            items.append({"type": "function_call_output", **output})
        elif content:
            items.append({"type": "message", "role": message["role"], "content": content})
        for call in message.get("tool_calls") or []:
            items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    return items


@pytest.mark.parametrize("per_turn", [False, True])
def test_items_of_the_responses_api_give_the_rollouts_of_messages(tokenizer, conversations, per_turn):
    others = [replace(conversation, messages=as_items(conversation.messages)) for conversation in conversations]
    ours, expected = (conversation_rollouts(rows, tokenizer, per_turn=per_turn)[0] for rows in (others, conversations))
    assert all(torch.equal(*each) for each in zip(ours.sequences, expected.sequences, strict=True))
    assert torch.equal(ours.loss_mask, expected.loss_mask)
    assert torch.equal(ours.group_ids, expected.group_ids)


def test_consecutive_assistant_messages_are_turns_and_tool_results_context(tokenizer):
    call = '<tool_call>\n{"name": "find", "arguments": {"id": "QUERY"}}\n</tool_call>'
    expected = [f"ONE{END}", f"{call}{call}{END}", f"TWO{END}"]
    rollouts, _ = conversation_rollouts([MIXED], tokenizer)
    assert texts_in_loss(tokenizer, rollouts.completions[0], rollouts.loss_mask[0]) == expected
    completion = tokenizer.decode(rollouts.completions[0])
    assert "RESULT" in completion and "OTHER" in completion and "BYE" not in completion
    turns, _ = conversation_rollouts([MIXED], tokenizer, per_turn=True)
    assert [tokenizer.decode(each) for each in turns.completions] == expected


def test_assistant_messages_of_weight_zero_are_context(tokenizer):
    first = {"role": "assistant", "content": "ONE", "weight": 0}
    conversation = replace(MIXED, messages=[MIXED.messages[0], first, *MIXED.messages[2:]])
    rollouts, _ = conversation_rollouts([conversation], tokenizer)
    assert "ONE" in tokenizer.decode(rollouts.prompts[0])
    turns, _ = conversation_rollouts([conversation], tokenizer, per_turn=True)
    whole, _ = conversation_rollouts([MIXED], tokenizer)
    assert len(turns) == 2 and torch.equal(whole.sequences[0], rollouts.sequences[0])
    with pytest.raises(ValueError, match="must have one of role assistant in the loss"):
        conversation_rollouts([Conversation([*MIXED.messages[:1], first])], tokenizer)


def test_conversation_may_begin_with_the_assistant(tokenizer):
    conversation = chat(("assistant", "Hello!"), ("user", "hi"), ("assistant", "Yes?"))
    rollouts, _ = conversation_rollouts([conversation], tokenizer)
    assert tokenizer.decode(rollouts.prompts[0]) == "<|im_start|>assistant\n"
    texts = texts_in_loss(tokenizer, rollouts.completions[0], rollouts.loss_mask[0])
    assert texts == [f"Hello!{END}", f"Yes?{END}"]
    default = with_template(tokenizer, "{{- 'You help.\n' }}" + tokenizer.chat_template)
    rollouts, _ = conversation_rollouts([conversation], default, per_turn=True)
    assert tokenizer.decode(rollouts.prompts[0]) == "You help.\n<|im_start|>assistant\n"
    assert tokenizer.decode(rollouts.completions[0]) == f"Hello!{END}"


def test_opening_assistant_message_after_second_generation_prompt_raises(tokenizer):
    example = with_template(tokenizer, "{{- 'As in <|im_start|>assistant\nYes.' }}" + tokenizer.chat_template)
    message = r"messages\[0\]: where it begins is unknown: .* 2 times; put a system or user message in front"
    for template, text in ((example, "Hello!"), (tokenizer, "I am <|im_start|>assistant\n")):
        with pytest.raises(ValueError, match=message):
            conversation_rollouts([chat(("assistant", text), ("user", "hi"))], template)
    rollouts, _ = conversation_rollouts([chat(("user", "hi"), ("assistant", "Hello!"))], example)
    assert tokenizer.decode(rollouts.completions[0]) == f"Hello!{END}"


def test_template_that_ends_turns_only_between_them_has_no_end_in_the_loss(tokenizer):
    between = "{% for m in messages %}{{ m.role + m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
    prompted = with_template(tokenizer, between + "{% if add_generation_prompt %}<|im_end|>assistant{% endif %}")
    rollouts, _ = conversation_rollouts([chat(("user", "a"), ("assistant", "b"))], prompted)
    assert tokenizer.decode(rollouts.completions[0]) == "b"


def test_tools_and_template_options_reach_the_template(tokenizer):
    conversation = chat(("system", "S"), ("user", "a"), ("assistant", "b"), tools=[{"name": "refund_by_mail"}])
    rollouts, _ = conversation_rollouts([conversation], tokenizer)
    assert '{"name": "refund_by_mail"}' in tokenizer.decode(rollouts.prompts[0])
    greeting = with_template(tokenizer, "{{- greeting }}" + tokenizer.chat_template)
    rollouts, _ = conversation_rollouts([conversation], greeting, template_options={"greeting": "HEY"})
    assert tokenizer.decode(rollouts.prompts[0]).startswith("HEY<|im_start|>")


# What is shared


def test_equal_prompts_share_a_group_and_tasks_are_compared_by_group_ids(tokenizer, conversations):
    rollouts, origin = conversation_rollouts(conversations, tokenizer)
    assert rollouts.group_ids.tolist() == [0, 0, 1, 2]  # both trials of task 43 open with the same words
    assert [each.task for each in conversations] == [43, 43, 44, 44]
    tasks = torch.tensor([each.task for each in conversations])
    advantages = group_advantages(rollouts, group_ids=tasks[origin])
    assert [value > 0 for value in advantages.tolist()] == [each.reward == 1 for each in conversations]


def test_tree_of_all_turns_has_the_tokens_of_whole_conversations(tokenizer, conversations):
    whole, turns = (conversation_rollouts(conversations, tokenizer, per_turn=per_turn)[0] for per_turn in (False, True))
    assert whole.tree.num_tokens == turns.tree.num_tokens == distinct_prefixes(whole.sequences)
    policy = len(tokenizer.apply_chat_template(conversations[0].messages[:1], tokenize=True, return_dict=False))
    assert whole.tree.num_tokens <= whole.tree.baseline_tokens - 3 * policy
    assert turns.tree.baseline_tokens > 4 * whole.tree.baseline_tokens


# Templates that rewrite earlier turns


FORGOTTEN = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning": "hm"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "reasoning": "oh"},
]


def test_template_that_rewrites_history_raises_if_per_turn_is_false(tokenizer):
    forgetful = with_template(tokenizer, FORGETFUL)
    message = r"messages\[1\] is generated as .*<think>.*, and becomes .* once messages\[3\] follows; per_turn=True"
    with pytest.raises(ValueError, match=message) as caught:
        conversation_rollouts(
            [chat(("user", "a"), ("assistant", "b")), Conversation(FORGOTTEN)], forgetful, per_turn=False
        )
    assert caught.value.__notes__ == ["in conversations[1]"]


@pytest.mark.parametrize("per_turn", [True, None])
def test_template_that_rewrites_history_is_stored_turn_by_turn(tokenizer, per_turn):
    forgetful = with_template(tokenizer, FORGETFUL)
    whole = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollouts, origin = conversation_rollouts([whole, Conversation(FORGOTTEN)], forgetful, per_turn=per_turn)
    texts = [tokenizer.decode(each) for each in rollouts.completions]
    assert texts[-2:] == [f"<think>hm</think>b{END}", f"<think>oh</think>d{END}"]
    second = tokenizer.decode(rollouts.prompts[rollouts.group_ids[-1]])
    assert second == render(forgetful, FORGOTTEN[:3], add_generation_prompt=True) and "hm" not in second
    if per_turn:
        assert origin.tolist() == [0, 0, 1, 1] and not caught
        return
    assert origin.tolist() == [0, 1, 1]  # the first is stored whole
    (warning,) = caught
    assert warning.filename == __file__
    assert "1 conversation stored turn by turn, because" in str(warning.message)
    assert "; conversation 1: messages[1] is generated as " in str(warning.message)


def test_turn_whose_newlines_merge_in_the_history_is_stored_turn_by_turn():
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    conversation = chat(("user", "a"), ("assistant", "\n\nreply"), ("user", "b"), ("assistant", "two"))
    with pytest.warns(UserWarning, match="turn by turn, .*reply"):
        rollouts, origin = conversation_rollouts([conversation], tokenizer)
    assert origin.tolist() == [0, 0]
    expected = [f"\n\nreply{END}", f"two{END}"]
    assert [tokenizer.decode(each) for each in rollouts.completions] == expected
    assert torch.equal(
        rollouts.prompts[1],
        torch.tensor(tokenizer.encode(render(tokenizer, conversation.messages[:3], add_generation_prompt=True))),
    )
    plain = chat(("user", "a"), ("assistant", "reply"), ("user", "b"), ("assistant", "two"))
    assert conversation_rollouts([plain], tokenizer)[1].tolist() == [0]


def test_qwen2_5_template_is_cut_exactly(tokenizer, conversations):
    qwen = with_template(tokenizer, published_template("qwen2_5"))
    rollouts, _ = conversation_rollouts(conversations[:1], qwen, per_turn=False)
    texts = texts_in_loss(tokenizer, rollouts.completions[0], rollouts.loss_mask[0])
    expected = assistant_texts(conversations[0])
    assert [text.replace("\n", "") for text in texts] == [text.replace("\n", "") for text in expected]
    assert tokenizer.decode(rollouts.sequences[0]) in render(qwen, conversations[0].messages)


def test_qwen3_template_stores_conversations_turn_by_turn(tokenizer, conversations):
    qwen = with_template(tokenizer, published_template("qwen3"))
    with pytest.warns(UserWarning, match=r"4 conversations stored turn by turn, .* conversation 0: messages\[2\] is"):
        rollouts, origin = conversation_rollouts(conversations, qwen, template_options={"enable_thinking": False})
    texts = [tokenizer.decode(each) for each in rollouts.completions]
    assert texts == [text for conversation in conversations for text in assistant_texts(conversation)]
    assert origin.unique().tolist() == [0, 1, 2, 3]
    assert tokenizer.decode(rollouts.prompts[0]).endswith("<think>\n\n</think>\n\n")


# The update


def baseline_gradients(model, rollouts, advantages):
    """Return log-probabilities [N, C] and gradients of the policy-gradient loss, one sequence after the other."""
    table = torch.zeros(rollouts.loss_mask.shape, dtype=torch.float64)
    for n, (tokens, prompt_len) in enumerate(zip(rollouts.sequences, rollouts.prompt_lens.tolist(), strict=True)):
        mask = rollouts.loss_mask[n, : len(tokens) - prompt_len]
        logits = model(tokens[None], use_cache=False).logits[0, prompt_len - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[prompt_len:, None])[:, 0][mask]
        (-advantages[n] * logprobs.sum() / rollouts.num_loss_tokens).backward()
        table[n, : len(mask)][mask] = logprobs.detach()
    return table, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("per_turn", [False, True])
def test_update_on_real_conversations_equals_baseline(tokenizer, conversations, per_turn):
    short = [  # with a short policy, and the first messages only
        replace(each, messages=[each.messages[0] | {"content": each.messages[0]["content"][:200]}, *each.messages[1:9]])
        for each in conversations
    ]
    rollouts, origin = conversation_rollouts(short, tokenizer, per_turn=per_turn)
    rollouts = replace(rollouts, rewards=rollouts.rewards.double())
    tasks = torch.tensor([each.task for each in short])
    advantages = group_advantages(rollouts, group_ids=tasks[origin])
    expected_logprobs, expected = baseline_gradients(in_float64(small_model(tokenizer)), rollouts, advantages)
    assert expected_logprobs[rollouts.loss_mask].max() < -1e-3

    model = in_float64(flexpg.enable(small_model(tokenizer)))
    table = torch.zeros_like(expected_logprobs)
    assert len(pack(rollouts, 16384)) < len(rollouts)
    for batch, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=16384):
        values, mask = advantages[batch.indices], batch.loss_mask
        flexpg.grpo_loss(logprobs, values, mask, total_tokens=rollouts.num_loss_tokens).backward()
        table[batch.indices, : mask.shape[1]] = logprobs.detach()
    assert (table - expected_logprobs).abs().max() < 1e-10
    assert max(relative_error(p.grad, expected[name]) for name, p in model.named_parameters()) < 1e-9


# Mistakes

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BODY = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
PROMPTED = BODY + "{% if add_generation_prompt %}<tool_call>{% endif %}"
USERS_ONLY = "{% for m in messages if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([USER], BODY, "messages must have one of role assistant"),
        ([USER, {"role": "assistnat", "content": "b"}], BODY, "messages[1] must have a role of system, developer, "),
        ([USER, {"role": "assistant", "text": "b"}], BODY, "messages[1] must have content, tool_calls or reasoning"),
        ([USER, ASSISTANT], PROMPTED, "messages[1]: where it begins is unknown: the template's generation prompt"),
        ([ASSISTANT], PROMPTED, "messages[0]: where it begins is unknown: the template writes its generation prompt"),
        ([ASSISTANT], BODY, "messages[0] must have a token before it; put a system or user message in front"),
        ([USER, ASSISTANT], USERS_ONLY, "messages[1]: the template leaves out its text 'b'"),
        ([USER, ASSISTANT | {"content": ""}], USERS_ONLY, "messages[1] must have a token as the template renders it"),
        ([USER, ASSISTANT], "{{ raise_exception('no tools here') }}", "no tools here"),
    ],
)
def test_conversation_that_cannot_be_cut_raises(tokenizer, messages, template, message):
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        conversation_rollouts([Conversation(messages)], with_template(tokenizer, template), per_turn=True)
    assert caught.value.__notes__ == ["in conversations[0]"]


def test_reward_that_is_not_finite_in_float32_raises(tokenizer):
    for reward in (float("nan"), 1e39):
        with pytest.raises(ValueError, match="rewards must be finite"):
            conversation_rollouts([chat(("user", "a"), ("assistant", "b"), reward=reward)], tokenizer)


def test_missing_reward_raises_with_its_conversation(tokenizer):
    given = [chat(("user", "a"), ("assistant", "b"), reward=reward) for reward in (1.0, None)]
    with pytest.raises(ValueError, match="reward must be a number, got None") as caught:
        conversation_rollouts(given, tokenizer)
    assert caught.value.__notes__ == ["in conversations[1]"]


# The example and docs/conversations.md


def test_example_agent_conversations_prints_savings(monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(agent_conversations, "trained_tokenizer", lambda conversations: tokenizer)
    monkeypatch.setattr("sys.argv", ["agent_conversations.py"])
    agent_conversations.main()
    printed = capsys.readouterr().out
    assert "a rollout per turn: 23" in printed and "a rollout per conversation: 4" in printed
    assert float(printed.split("gradient norm ")[1]) > 0


def test_docs_conversations_snippets_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL):
        exec(snippet, names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_no_conversations_raise():
    with pytest.raises(ValueError, match="conversations must not be empty"):
        conversation_rollouts([], chat_tokenizer("qwen2_5", "qwen2_5"))


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([[{"role": "user", "content": "a"}]], r"must be Conversation\(messages, reward\), got list"),
        (Conversation([{"role": "user", "content": "a"}]), "must be a list of Conversation, got one"),
    ],
    ids=["messages", "one"],
)
def test_conversations_of_another_type_raise(conversations, message):
    with pytest.raises(TypeError, match=message):
        conversation_rollouts(conversations, None)
