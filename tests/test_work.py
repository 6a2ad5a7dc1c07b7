"""What an update costs, in calls and tensors made: a guard against slowness that no clock is needed for.

The limits are what was counted when they were written, and a few percent more: a change that needs more is seen here,
and may raise them for a reason. FLOPs are held by test_shapes.py, compilations by test_attention.py, logits by
test_logprobs.py.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.qwen2 import qwen2
from transformers import AutoModelForCausalLM, Qwen2Config

from flexpg import PrefixTree, block_mask, token_logprobs
from flexpg.integrations import torchtune as shared
from flexpg.integrations import transformers as transformers_integration

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = FORWARD + "_backward"
PROMPT, COMPLETION, WIDTH = 50, 10, 64
# Of a layer without completions, of each completion, of each token; of a mask's entry, per block of queries and keys.
LAYER_CALLS, COMPLETION_CALLS, TOKEN_BYTES, MASK_BYTES = 136, 9, 24_000, 140


class Made(TorchDispatchMode):
    """Counts calls of kernels, and bytes of what they give back; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes, self.largest = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls[func.overloadpacket.__name__] += 1
            for made in out if isinstance(out, tuple | list) else [out]:
                if isinstance(made, torch.Tensor) and not any(made is given for given in args):
                    size = made.numel() * made.element_size()
                    self.bytes, self.largest = self.bytes + size, max(self.largest, size)
        return out


def groups(num_groups, group_size):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(50, (n,), generator=generator) for n in [PROMPT] * num_groups]
    completions = [
        [torch.randint(50, (COMPLETION,), generator=generator) for _ in range(group_size)] for _ in range(num_groups)
    ]
    return PrefixTree.from_groups(draw, completions)


def update(num_layers, tree):
    """What one update makes, after one that is not counted."""
    model = qwen2(
        vocab_size=50,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=WIDTH,
        intermediate_dim=128,
        max_seq_len=512,
    )
    prompt_lens = torch.full((len(tree.lengths),), PROMPT)
    made = Made()
    for counter in (Made(), made):
        model.zero_grad()
        with counter:
            hidden = shared.forward(model, tree)
            token_logprobs(hidden, shared.output(model), tree, prompt_lens=prompt_lens).sum().backward()
    return made


def of_a_layer(tree):
    """Kernel calls and bytes of one layer, forward and backward."""
    more, fewer = update(3, tree), update(2, tree)
    return more.calls - fewer.calls, more.bytes - fewer.bytes


@pytest.mark.parametrize(("num_groups", "group_size"), [(1, 2), (1, 8), (3, 4)])
def test_a_layer_calls_attentions_kernels_once_per_segment_and_once_per_prompt(num_groups, group_size):
    calls, _ = of_a_layer(groups(num_groups, group_size))
    pieces = num_groups * (1 + group_size + 1)
    assert calls[FORWARD] == calls[BACKWARD] == pieces
    assert calls["mm"] + calls["addmm"] == 3 * 7  # seven matrices, forward and twice in the backward


def test_a_completion_adds_few_kernel_calls_to_a_layer():
    few, many = (of_a_layer(groups(1, size))[0].total() for size in (4, 12))
    assert few <= LAYER_CALLS + 4 * COMPLETION_CALLS and many - few <= 8 * COMPLETION_CALLS


def test_a_token_adds_few_bytes_to_a_layer():
    few, many = (groups(1, size) for size in (4, 12))
    more = of_a_layer(many)[1] - of_a_layer(few)[1]
    assert more / (many.num_tokens - few.num_tokens) <= TOKEN_BYTES


def torchtune_model():
    model = qwen2(
        vocab_size=50, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=128, max_seq_len=512
    )
    return model, shared.forward, model.layers


def transformers_model():
    transformers_integration.register()
    config = Qwen2Config(
        vocab_size=50,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        intermediate_size=128,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexpg")
    return model, transformers_integration.forward, model.model.layers


@pytest.mark.parametrize("make", [torchtune_model, transformers_model])
def test_a_row_goes_through_the_model_without_pads_unless_its_layers_are_compiled(make):
    seen = []
    model, forward, layers = make()
    layers[0].register_forward_hook(
        lambda layer, args, out: seen.append((out if torch.is_tensor(out) else out[0]).shape[1])
    )
    tree = groups(1, 3)
    for _ in range(2):
        assert forward(model, tree).shape[1] == len(tree) == 256
        layers[0].compile(backend="eager")
    assert seen == [tree.num_tokens, len(tree)] == [80, 256]


def test_a_mask_takes_as_many_calls_for_any_length_and_bytes_of_its_blocks_alone():
    made = []
    for blocks in (64, 128):
        tree = PrefixTree.from_lengths([blocks * 64], [[blocks * 8] * 8])
        with Made() as counter:
            block_mask(tree)
        made.append(counter)
    assert made[0].calls == made[1].calls
    assert made[1].largest <= 8 * 128**2 and made[1].bytes <= MASK_BYTES * 128**2
