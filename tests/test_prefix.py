"""A prefix that is encoded once for several micro-batches gives the outputs and gradients of one packed row."""

import random

import pytest
import torch
from unshared import VOCAB, in_float64, relative_error, tiny_model, unshared_logprobs

from flexpg.attention import attention
from flexpg.integrations import torchtune as tune
from flexpg.logprobs import token_logprobs
from flexpg.masks import block_mask, dense_mask, tree_mask_mod
from flexpg.prefix import EncodedPrefix, _apart
from flexpg.tree import PrefixTree, padded_size


def group(seed: int, prompt_len: int, count: int = 7) -> tuple[list[int], list[list[int]]]:
    """A prompt, and completions of which two begin alike, one is another's beginning and one has one token."""
    rng = random.Random(seed)
    prompt = [rng.randrange(VOCAB) for _ in range(prompt_len)]
    completions = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 20))] for _ in range(count - 3)]
    return prompt, [*completions, completions[0][:2] + [3, 4], completions[1][:1], [5]]


def scores(model, prompt, completions, weights, parts, prefix_of=tune.encode_prefix, forward=tune.forward):
    """Log-probabilities of every completion, and the gradients of their weighted sum, part by part."""
    model.zero_grad()
    found = torch.zeros(len(completions), max(map(len, completions)), dtype=torch.float64)
    with prefix_of(model, prompt) as prefix:
        for part in parts:
            tree = PrefixTree.from_sequences([prompt + completions[n] for n in part])
            hidden = forward(model, tree, prefix=prefix)
            logprobs = token_logprobs(hidden, model.output, tree, prompt_lens=torch.full((len(part),), len(prompt)))
            (logprobs * weights[part, : logprobs.shape[1]]).sum().backward()
            found[part, : logprobs.shape[1]] = logprobs.detach()
    return found, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


PARTS = [[0, 3, 5], [1], [2, 4, 6]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prompt_len", [1, 100, 128])
@pytest.mark.parametrize("name", ["llama3_2", "qwen2_tied", "gemma2"])
def test_micro_batches_on_one_prefix_equal_the_unshared_model(name, prompt_len, checkpointing):
    model = in_float64(tiny_model(name))
    if checkpointing:
        from torchtune.modules import TransformerSelfAttentionLayer
        from torchtune.training import set_activation_checkpointing

        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    prompt, completions = group(prompt_len, prompt_len)
    weights = torch.randn(len(completions), max(map(len, completions)), dtype=torch.float64)
    found, grads = scores(model, prompt, completions, weights, PARTS)
    model.zero_grad()
    expected = unshared_logprobs(model, [prompt + own for own in completions], [len(prompt)] * len(completions))
    (expected * weights).sum().backward()
    exact = 1e-12 if name != "gemma2" else 3e-6  # whose attention rounds to float32
    assert relative_error(found, expected) < exact
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert relative_error(grad, parameter.grad) < max(exact, 1e-12)
