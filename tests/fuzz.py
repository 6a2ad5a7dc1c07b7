"""What fuzzing draws from: sequences that make prefix trees of any shape, rollouts, transcripts, files and options.

What has a shape (who begins as whom, lengths, groups) is drawn by hypothesis, which makes a failing case small; numbers
come from a seed that is drawn. The suite runs 500 cases, the same ones each time. As many as one likes, random ones:

    FUZZ_CASES=10000 pytest tests/test_fuzz.py

A case that fails is printed with a line `@reproduce_failure(...)` that repeats it. It stays as an `@example`.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from flexpg.conversations import ROLES, Conversation
from flexpg.rollouts import Rollouts

IN_THE_SUITE = 500
CASES = int(os.environ.get("FUZZ_CASES", IN_THE_SUITE))
SHARES = {  # of the suite's cases, by property: the cheaper, the more
    **{"sequences": 45, "groups": 25, "mask": 35, "attention": 45, "pack": 75, "budget": 10},
    **{"loss": 25, "advantages": 20, "logprobs": 25, "model": 20, "sampling": 10, "options": 25},
    **{"lines": 10, "broken lines": 70, "transcripts": 15, "broken transcripts": 45},
}
ANY_CASE = settings(
    database=None,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)

SMALL_IDS = ([7], [0, 1], [0, 1, 2, 3], list(range(50)))  # 7 alone: all are prefixes of one another
LARGE_IDS = ([0, 255, 256, 65535, 65536], [0, 2**31, 2**32 - 1, 2**32, 2**62])  # in bytes, larger is not always later
BLOCK_EDGES = st.sampled_from([1, 50, 127, 128, 129, 255])
SEEDS = st.integers(0, 2**32 - 1)


def cases(name: str) -> settings:
    """The property's share of all cases."""
    return settings(ANY_CASE, max_examples=max(1, CASES * SHARES[name] // IN_THE_SUITE))


def normal(seed: int, *shape: int) -> Tensor:
    """Float64 numbers of a seed."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- trees -----------------------------------------------------------------------------------------------------------


@st.composite
def forests(draw, min_count=1, max_count=8, alphabets=SMALL_IDS, max_runs=5, lengths=st.integers(1, 2)):  # noqa: B008
    """Sequences that begin as others do, equal them, are prefixes of them, or share nothing."""
    token = st.sampled_from(draw(st.sampled_from(alphabets)))
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(min_count, max_count))):
        other = draw(st.sampled_from([[], *sequences]))
        tokens = other[: draw(st.integers(0, len(other)))]
        for _ in range(draw(st.integers(0 if tokens else 1, max_runs))):
            tokens = tokens + [draw(token)] * draw(lengths)
        sequences.append(tokens)
    return sequences


def long_forests():
    """Of several blocks, with segments that end at a block's edge and beside it."""
    return forests(max_count=4, alphabets=([0, 1],), max_runs=2, lengths=BLOCK_EDGES)


@st.composite
def groups(draw, alphabets=SMALL_IDS, lengths=st.integers(1, 3)):  # noqa: B008
    """Prompts, equal ones among them, and the completions of each."""
    prompts = draw(forests(max_count=4, alphabets=alphabets, lengths=lengths))
    sizes = [draw(st.integers(1, 5)) for _ in prompts]
    completions = draw(forests(sum(sizes), sum(sizes), alphabets=alphabets))
    return prompts, [[completions.pop() for _ in range(size)] for size in sizes]


@st.composite
def rollouts(draw, alphabets=SMALL_IDS):
    """Groups whose rollouts stand in any order, trained on all, some or none of their tokens."""
    prompts, completions = draw(groups(alphabets))
    pairs = [(g, own) for g, group in enumerate(completions) for own in group]
    pairs = draw(st.permutations(pairs))
    drawn = Rollouts(
        prompts=[torch.tensor(prompt) for prompt in prompts],
        completions=[torch.tensor(own) for _, own in pairs],
        group_ids=torch.tensor([g for g, _ in pairs]),
        rewards=torch.ones(len(pairs)),
    )
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.8]))
    if share is None:
        return drawn
    chosen = torch.rand(drawn.trained.shape, generator=torch.Generator().manual_seed(draw(SEEDS))) < share
    return replace(drawn, loss_mask=chosen & drawn.completion_mask)


# ---- losses ----------------------------------------------------------------------------------------------------------


@st.composite
def loss_batches(draw):
    """Off-policy inputs of `grpo_loss`, some with rollouts that are not trained; what is not trained is no number."""
    rows = draw(st.integers(1, 6))
    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=rows, max_size=rows)))
    mask[0, 0] = True  # a step without a trained token is refused
    seed, away = draw(SEEDS), draw(st.sampled_from([0.0, 0.3, 3.0]))
    logprobs = -normal(seed, rows, 5).abs()
    tables = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + away * normal(seed + 1, rows, 5),
        "ref_logprobs": logprobs + away * normal(seed + 2, rows, 5),
    }
    for table in tables.values():
        table[~mask] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    if draw(st.booleans()):
        tables["old_logprobs"] = None
    return tables | {"advantages": normal(seed + 3, rows).round(decimals=1), "mask": mask}


# ---- transcripts -----------------------------------------------------------------------------------------------------

END, AFTER, FIRST_ROLE, FIRST_LETTER = 1, 2, 10, 100


class LetterChat:
    """A chat template of one token a letter: a role, the text, the end, and one that belongs to no turn.

    A dollar sign is the token that ends turns, wherever it stands.
    """

    eos_token_id = END

    def apply_chat_template(self, conversation, *, tools, add_generation_prompt, **_) -> list[int]:
        ids = [] if tools is None else [FIRST_LETTER] * len(tools)
        for message in conversation:
            ids += [role_token(message["role"]), *letters(message), END, AFTER]
        return ids + [role_token("assistant")] * add_generation_prompt


def role_token(role: str) -> int:
    return FIRST_ROLE + ROLES.index(role)


def letters(message: dict) -> list[int]:
    """A message's tokens between its role and its end."""
    text = str(message.get("content") or "") + json.dumps(message.get("tool_calls") or "")[1:-1]
    return [END if letter == "$" else FIRST_LETTER + ord(letter) for letter in text]


TEXTS = st.text("ab$", max_size=4)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXTS})
ANSWERS = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS})


@st.composite
def conversations(draw):
    """With one answer of the assistant or more, wherever it stands."""
    messages = [*draw(st.lists(MESSAGES, max_size=3)), draw(ANSWERS), *draw(st.lists(MESSAGES, max_size=3))]
    return Conversation(messages, draw(st.floats(-9, 9, width=32)), tools=draw(st.sampled_from([None, [], [{}]])))


# ---- files and options -----------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 60), min_size=1, max_size=4)
WORDS = st.text("aé\u2028 ", min_size=1, max_size=3)


@st.composite
def whole_rows(draw):
    """Rows of a file, and the (prompt, completion) of each rollout in it."""
    rows, pairs = [], []
    for _ in range(draw(st.integers(1, 5))):
        prompt, completions = draw(TOKENS | WORDS), draw(st.lists(TOKENS | WORDS, min_size=1, max_size=3))
        one = len(completions) == 1 and draw(st.booleans())
        rows.append({"prompt": prompt} | ({"completion": completions[0]} if one else {"completions": completions}))
        pairs += [(prompt, own) for own in completions]
    return rows, pairs


# Of any type: what JSON and YAML can write, and some that only one of them can.
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2**31, 10**400, 0.5, 1e39, float("nan"), float("inf")])
    | st.text("a1\x00\ud800é", max_size=3)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\ud800", max_size=2), inner)
)
CALLS = st.fixed_dictionaries({"function": st.fixed_dictionaries({"arguments": VALUES | st.just('{"a": 1}')}) | VALUES})
ROUGH_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | VALUES},
    optional={"content": TEXTS | VALUES, "tool_calls": st.lists(CALLS | VALUES, max_size=2) | VALUES},
)


@st.composite
def rough_transcripts(draw):
    """Messages of which one may be anything, in its parts or as a whole."""
    right = st.lists(MESSAGES | ANSWERS, max_size=2)
    return [*draw(right), draw(ROUGH_MESSAGES | VALUES), *draw(right), *draw(st.lists(ANSWERS, max_size=1))]


ROWS = (  # each field beside what is half right
    {"prompt": (TOKENS, st.lists(VALUES)), "completion": (TOKENS, st.lists(VALUES))},
    {"prompt": (TOKENS, VALUES), "completions": (st.lists(TOKENS, min_size=1, max_size=3), st.lists(TOKENS | VALUES))},
    {
        "messages": (st.lists(MESSAGES | ANSWERS, max_size=4), st.lists(MESSAGES | ANSWERS | ROUGH_MESSAGES)),
        "reward": (st.floats(-1, 1), VALUES),
        "tools": (st.just([]), st.lists(VALUES)),
    },
)


@st.composite
def rough_lines(draw):
    """A file of rows of one kind, of which fields are broken or left out, lines cut off or no JSON at all."""
    fields, lines = draw(st.sampled_from(ROWS)), []
    for _ in range(draw(st.integers(0, 4))):
        row = {key: draw(right) for key, (right, _) in fields.items()}
        how = draw(st.sampled_from(["right", "right", "half", "wrong", "gone", "other", "cut", "bytes"]))
        key = draw(st.sampled_from([*fields]))
        if how in ("half", "wrong"):
            row[key] = draw(fields[key][1] if how == "half" else VALUES)
        if how == "gone":
            del row[key]
        line = json.dumps(draw(VALUES) if how == "other" else row).encode()
        lines.append({"cut": line[: len(line) // 2], "bytes": draw(st.binary(max_size=3))}.get(how, line))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + draw(st.sampled_from([b"\n", b"\r\n"])).join(lines)
