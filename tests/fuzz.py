"""Hypothesis strategies: sequences that form prefix trees of any shape, rollouts, conversations, files and options.

What has structure (which sequence begins as which, lengths, groups) is drawn by hypothesis, which shrinks a failing
case; numbers come from a seed that is drawn. The suite runs 500 cases, always the same. For more, random ones:

    FUZZ_CASES=10000 pytest tests/test_fuzz.py

A failing case is printed with a line `@reproduce_failure(...)` that repeats it; keep it as an `@example`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from flexpg.conversations import Conversation
from flexpg.conversations.messages import ROLES
from flexpg.rollouts import Rollouts

SUITE_CASES = 500
CASES = int(os.environ.get("FUZZ_CASES", SUITE_CASES))
WEIGHTS = {  # cases of the suite for each property: the cheaper, the more
    **{
        "sequences": 50,
        "groups": 30,
        "mask": 40,
        "attention": 60,
        "pack": 100,
        "recurrent": 20,
        "loss": 30,
        "advantages": 25,
    },
    **{"logprobs": 30, "model": 25, "sampling": 15, "options": 35, "file": 15, "conversations": 25},
}
BASE = settings(
    database=None,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)

SMALL_IDS = ([7], [0, 1], [0, 1, 2, 3], list(range(50)))  # of [7], all sequences are prefixes of one another
LARGE_IDS = ([0, 255, 256, 65535, 65536], [0, 2**31, 2**32 - 1, 2**32, 2**62])  # their order depends on the byte order
BLOCK_EDGES = st.sampled_from([1, 50, 127, 128, 129, 255])
SEEDS = st.integers(0, 2**32 - 1)


def cases(name: str) -> settings:
    """Return settings with the property's number of cases."""
    return settings(BASE, max_examples=max(1, CASES * WEIGHTS[name] // sum(WEIGHTS.values())))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Trees and rollouts.


@st.composite
def forests(draw, min_count=1, max_count=8, alphabets=SMALL_IDS, max_runs=5, lengths=st.integers(1, 2)):  # noqa: B008
    """Draw sequences that begin as others do, equal them, are prefixes of them, or share nothing."""
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
    """Draw trees of several blocks whose segments end at or next to the edge of a block."""
    return forests(max_count=4, alphabets=([0, 1],), max_runs=2, lengths=BLOCK_EDGES)


@st.composite
def groups(draw, alphabets=SMALL_IDS):
    """Draw prompts, some of them equal, and the completions of each."""
    prompts = draw(forests(max_count=4, alphabets=alphabets, lengths=st.integers(1, 3)))
    sizes = [draw(st.integers(1, 5)) for _ in prompts]
    completions = draw(forests(sum(sizes), sum(sizes), alphabets=alphabets))
    return prompts, [[completions.pop() for _ in range(size)] for size in sizes]


@st.composite
def rollouts(draw, alphabets=SMALL_IDS):
    """Draw groups with their rollouts in any order and all, some or none of the tokens in the loss."""
    prompts, completions = draw(groups(alphabets))
    whole = Rollouts.from_groups(prompts, completions, [[1.0] * len(group) for group in completions])
    whole = whole.select(draw(st.permutations(range(len(whole)))))
    fraction = draw(st.sampled_from([None, 0.0, 0.3, 0.8]))
    if fraction is None:
        return whole
    chosen = torch.rand(whole.loss_mask.shape, generator=torch.Generator().manual_seed(draw(SEEDS))) < fraction
    return replace(whole, loss_mask=chosen & whole.completion_mask)


@st.composite
def loss_batches(draw):
    """Draw off-policy inputs of `grpo_loss` with NaN or Inf outside the loss mask; some rollouts have no loss token."""
    rows = draw(st.integers(1, 6))
    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=rows, max_size=rows)))
    mask[0, 0] = True  # a step without loss tokens raises
    seed, away = draw(SEEDS), draw(st.sampled_from([0.0, 0.3, 3.0]))
    logprobs = -normal(seed, rows, 5).abs()
    tables = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + away * normal(seed + 1, rows, 5),
        "ref_logprobs": logprobs + away * normal(seed + 2, rows, 5),
        "entropies": normal(seed + 4, rows, 5).abs(),
    }
    tables["sampler_logprobs"] = tables["old_logprobs"] + away * normal(seed + 5, rows, 5)
    for table in tables.values():
        table[~mask] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    if draw(st.booleans()):
        tables["old_logprobs"] = None
    if draw(st.booleans()):
        tables["sampler_logprobs"] = None
    return tables | {"advantages": normal(seed + 3, rows).round(decimals=1), "loss_mask": mask}


# Conversations.


class LetterChat:
    """A tokenizer with one token per letter, and a template: a role's letter, the text, the end of the turn, a newline.

    A dollar sign, in a text too, is the token that ends turns.
    """

    eos_token_id, name_or_path = ord("$"), ""
    added_tokens_decoder: ClassVar = {}
    roles: ClassVar = dict(zip(ROLES, "SDUAL", strict=True))

    def apply_chat_template(self, conversation, *, tools, add_generation_prompt, **_) -> str:
        turns = [f"{self.roles[message['role']]}{message['content']}$\n" for message in conversation]
        return "T" * len(tools or []) + "".join(turns) + "A" * add_generation_prompt

    def encode(self, text: str, **_) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids, **_) -> str:
        return "".join(map(chr, token_ids))


def ends_once(message: dict[str, str]) -> bool:
    """Return whether a text does not end with the stop token, which would be there twice and is refused."""
    return message["role"] != "assistant" or not message["content"].endswith("$")


TEXTS = st.text("ab$", max_size=4)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXTS}).filter(ends_once)
ANSWERS = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS}).filter(ends_once)


@st.composite
def conversations(draw):
    """Draw a conversation with at least one assistant message, anywhere."""
    messages = [*draw(st.lists(MESSAGES, max_size=3)), draw(ANSWERS), *draw(st.lists(MESSAGES, max_size=3))]
    tools = draw(st.sampled_from([None, [], [{"name": "f"}]]))
    return Conversation(messages, draw(st.floats(-9, 9, width=32)), tools=tools)


# Files and options.

TOKENS = st.lists(st.integers(0, 60), min_size=1, max_size=4)
WORDS = st.text("aé\u2028 ", min_size=1, max_size=3)
VALUES = st.recursive(  # what YAML can write
    st.none() | st.booleans() | st.sampled_from([-1, 0, 1, 2**31, 0.5, float("nan")]) | st.text("a1é", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
)


@st.composite
def file_rows(draw):
    """Draw rows of a file, and the (prompt, completion) of each rollout in them."""
    rows, pairs = [], []
    for _ in range(draw(st.integers(1, 5))):
        prompt, completions = draw(TOKENS | WORDS), draw(st.lists(TOKENS | WORDS, min_size=1, max_size=3))
        is_single = len(completions) == 1 and draw(st.booleans())
        row = {"completion": completions[0]} if is_single else {"completions": completions}
        rows.append({"prompt": prompt} | row)
        pairs += [(prompt, completion) for completion in completions]
    return rows, pairs
