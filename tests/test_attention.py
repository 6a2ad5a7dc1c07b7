"""Attention over a packed row is attention of each sequence alone, forward and backward, in every backend."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from baseline import LargestTensor, random_sequences, relative_error, baseline_attention

from flexpg.backends import flex
from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask, block_mask, group_block_mask
from flexpg.tree import PrefixTree

TREES = {
    "group": PrefixTree.from_lengths([37], [[20, 5, 60]]),
    "five groups in a row": PrefixTree.from_lengths([9, 30, 1, 17, 4], [[8, 3], [5, 5, 2], [7], [1, 30], [6, 6, 6]]),
    "deep forest": PrefixTree.from_sequences(random_sequences(random.Random(0), 25, 30, 2)),
    "group of one": PrefixTree.from_lengths([12], [[15]]),
    "completions of one token": PrefixTree.from_lengths([10], [[1, 1, 4]]),
    "equal completions, merged": PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 5]]),
    "prefixes of one another": PrefixTree.from_sequences([[1], [1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 6]]),
    "one token and 255 pads": PrefixTree.from_sequences([[3]]),
    "no pad": PrefixTree.from_lengths([56], [[100, 50, 50]]),
}
HEADS = [(2, 2), (6, 2), (4, 1)]  # query, key/value: as many, three to one, one for all
WIDTH = 16


def qkv(tree: PrefixTree, heads=(4, 2), dtype=torch.float64, device="cpu", seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads[0], heads[1], heads[1])
    tensors = [torch.randn(1, n, len(tree), WIDTH, generator=generator, dtype=torch.float64) for n in sizes]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def out_and_grads(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Every output weighs differently in the gradient."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights.to(out))]


def largest_difference(values: list[Tensor], expected: list[Tensor]) -> float:
    return max((value - other).abs().max().item() for value, other in zip(values, expected, strict=True))


def on_packed_tokens(results: list[Tensor], tree: PrefixTree) -> list[Tensor]:
    return [x[:, :, : tree.num_tokens] for x in results]


# ---- equal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", TREES)
def test_split_is_dense_in_output_and_gradients(name, heads):
    mask, inputs = block_mask(TREES[name]), qkv(TREES[name], heads)
    expected = out_and_grads(attention(*inputs, mask, backend="dense"), inputs)
    values = out_and_grads(attention(*inputs, mask, backend="split"), inputs)
    assert largest_difference(values, expected) < 1e-13


@pytest.mark.parametrize("backend", ["split", "dense"])
@pytest.mark.parametrize("name", TREES)
def test_every_token_attends_as_if_its_sequence_were_alone(name, backend):
    tree, inputs = TREES[name], qkv(TREES[name])
    pads = slice(tree.num_tokens, None)
    used = [x[:, :, : tree.num_tokens] for x in inputs]
    weights = torch.randn_like(used[0])
    alone = baseline_attention(*used, tree.node)
    expected = [alone, *torch.autograd.grad(alone, inputs, weights)]
    out = attention(*inputs, block_mask(tree), backend=backend)
    shared = out[:, :, : tree.num_tokens]
    values = [shared, *torch.autograd.grad(shared, inputs, weights, retain_graph=True)]
    assert largest_difference(values, expected) < 1e-13
    assert torch.equal(out[:, :, pads], inputs[2][:, :, pads].repeat_interleave(2, dim=1))  # a pad sees itself alone


@pytest.mark.parametrize("scale", [0.07, 1.0])
def test_the_scale_is_honoured(scale):
    tree, inputs = TREES["group"], qkv(TREES["group"])
    rescaled = [inputs[0] * (scale * WIDTH**0.5), *inputs[1:]]
    expected = out_and_grads(attention(*rescaled, block_mask(tree)), inputs)
    for backend in ("split", "dense"):
        values = out_and_grads(attention(*inputs, block_mask(tree), scale=scale, backend=backend), inputs)
        assert largest_difference(values, expected) < 1e-13


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 11, 1000])
def test_auto_honours_window_and_softcap(window, softcap, device):
    # Triton has no float64; in float32, sums over some hundred tokens stay within 1e-4.
    dtype, tolerance = (torch.float64, 1e-13) if device == "cpu" else (torch.float32, 1e-4)
    tree = TREES["deep forest"].to(device)
    inputs = qkv(tree, dtype=dtype, device=device)
    alone = baseline_attention(*(x.double() for x in inputs), tree.node, window, softcap)
    expected = on_packed_tokens(out_and_grads(alone, inputs), tree)
    out = attention(*inputs, block_mask(tree), window=window, softcap=softcap)
    assert largest_difference(on_packed_tokens(out_and_grads(out, inputs), tree), expected) < tolerance


def test_a_windows_distance_is_counted_in_positions_and_not_in_the_row():
    tree, inputs = TREES["group"], qkv(TREES["group"])
    flat = replace(tree)
    vars(flat)["position_ids"] = torch.arange(len(tree))  # where the tree keeps them once they are derived
    right, wrong = (attention(*inputs, block_mask(t, 30)) for t in (tree, flat))
    expected = baseline_attention(*inputs, tree.node, window=30)
    used = slice(0, tree.num_tokens)
    assert (right - expected)[:, :, used].abs().max() < 1e-13
    assert (wrong - expected)[:, :, used].abs().max() > 1e-2


def test_the_masks_own_window_holds_unless_a_call_names_another():
    tree, inputs = TREES["group"], qkv(TREES["group"])
    windowed = attention(*inputs, block_mask(tree, 5))
    assert torch.equal(attention(*inputs, block_mask(tree), window=5), windowed)
    assert torch.equal(attention(*inputs, block_mask(tree, 9), window=5), windowed)
    assert (attention(*inputs, block_mask(tree)) - windowed).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["group", "five groups in a row", "deep forest"])
def test_split_is_as_accurate_as_unshared_attention_in_low_precision(name, dtype):
    assert_error_budget(qkv(TREES[name], dtype=dtype), TREES[name], "split")


def test_split_sums_the_gradients_of_many_pieces_in_float32():
    """A query at the end of this comb attends in sixty pieces, and as many roundings to bfloat16 would add up."""
    comb = PrefixTree.from_sequences([[0] * depth + [1] for depth in range(60)])
    assert_error_budget(qkv(comb, dtype=torch.bfloat16), comb, "split")


def assert_error_budget(inputs: list[Tensor], tree: PrefixTree, backend: str) -> None:
    """Output and gradients stray no further from float64 than those of the unshared path do, times 1.5."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = out_and_grads(baseline_attention(*exact, tree.node), exact)
    values = out_and_grads(attention(*inputs, block_mask(tree), backend=backend), inputs)
    unshared = out_and_grads(baseline_attention(*inputs, tree.node), inputs)
    for value, other, truth in zip(*(on_packed_tokens(r, tree) for r in (values, unshared, expected)), strict=True):
        assert relative_error(value, truth) < 1.5 * relative_error(other, truth)


# ---- as it is used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["split", "dense"])
def test_a_gradient_may_arrive_expanded_or_transposed(backend):
    mask, inputs = block_mask(TREES["group"]), qkv(TREES["group"])

    def grads(weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*inputs, mask, backend=backend), inputs, weights)

    ones = torch.ones(1, 4, len(mask.tree), WIDTH, dtype=torch.float64)
    for strange in (ones[:, :1, :1, :1].expand_as(ones), ones.mT.contiguous().mT):
        assert not strange.is_contiguous()
        assert largest_difference(grads(strange), grads(ones)) < 1e-13


def test_inputs_may_be_transposed_views():
    mask, inputs = block_mask(TREES["group"]), qkv(TREES["group"])
    expected = out_and_grads(attention(*inputs, mask), inputs)
    for dims in ((1, 2), (2, 3)):
        views = [x.detach().transpose(*dims).contiguous().transpose(*dims).requires_grad_() for x in inputs]
        assert largest_difference(out_and_grads(attention(*views, mask), views), expected) < 1e-14


def test_a_changed_completion_leaves_all_others_bitwise_the_same():
    tree = TREES["group"]
    before = qkv(tree, dtype=torch.float32)
    after = [x.detach().clone() for x in before]
    changed = slice(37, 57)  # the first completion, between the prompt and the others
    for x in after:
        x[:, :, changed] += 1
        x.requires_grad_()
    mask = block_mask(tree)
    results = zip(*(out_and_grads(attention(*x, mask), x) for x in (before, after)), strict=True)
    prompt, others = slice(0, 37), slice(57, None)
    for i, (value, other) in enumerate(results):
        assert torch.equal(value[:, :, others], other[:, :, others])
        assert not torch.equal(value[:, :, changed], other[:, :, changed])
        reaches_prompt = i in (2, 3)  # the changed completion's gradient of the prompt's keys and values
        assert torch.equal(value[:, :, prompt], other[:, :, prompt]) != reaches_prompt


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    mask, inputs = block_mask(TREES["deep forest"]), qkv(TREES["deep forest"])
    expected = out_and_grads(attention(*inputs, mask), inputs)
    out = checkpoint(lambda q, k, v: attention(q, k, v, mask), *inputs, use_reentrant=use_reentrant)
    values = [out.detach(), *_backward(out, inputs)]
    assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))


def _backward(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """By .backward(), the only way that reentrant checkpoints allow."""
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    return [x.grad for x in inputs]


def test_a_compiled_function_may_hold_it():
    mask, inputs = block_mask(TREES["group"]), qkv(TREES["group"])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.sin(), k.cos(), v * 2, mask).sin()

    expected = out_and_grads(layer(*inputs), inputs)
    values = out_and_grads(torch.compile(layer, backend="aot_eager")(*inputs), inputs)
    assert largest_difference(values, expected) < 1e-14


@pytest.mark.parametrize("window", [None, 5])
def test_a_compiled_function_refuses_a_row_of_another_tree(window):
    compiled = torch.compile(lambda q, k, v, mask: attention(q, k, v, mask), backend="aot_eager")
    for lengths in ([300], [900]):
        tree, other = (PrefixTree.from_lengths(prompt, [[60, 70]]) for prompt in ([600], lengths))
        with pytest.raises(
            Exception, match=rf"the mask's tree has {len(other)} packed tokens; got q .*, {len(tree)}, 16"
        ):
            compiled(*qkv(tree), block_mask(other, window))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"backend": "dense"}], ids=str)
def test_pads_may_be_left_out_on_a_cpu(options):
    tree = TREES["five groups in a row"]
    mask, inputs = block_mask(tree), qkv(tree)
    assert tree.num_tokens < len(tree)
    whole = out_and_grads(attention(*inputs, mask, **options)[:, :, : tree.num_tokens], inputs)
    cut = [x.detach()[:, :, : tree.num_tokens].requires_grad_() for x in inputs]
    rest = out_and_grads(attention(*cut, mask, **options), cut)
    assert largest_difference(on_packed_tokens(whole, tree), rest) < 1e-14
    with pytest.raises(ValueError, match=f"the mask's tree has {len(tree)} packed tokens"):
        attention(*(x.detach() for x in cut), mask, backend="flex")


@pytest.mark.parametrize(("backend", "is_small"), [("split", True), ("dense", False)])
def test_split_makes_no_tensor_of_row_by_row_elements(backend, is_small):
    mask = group_block_mask([900], [[50] * 8])
    inputs = qkv(mask.tree, dtype=torch.float32)
    with LargestTensor() as largest:
        out_and_grads(attention(*inputs, mask, backend=backend), inputs)
    assert (largest.numel < len(mask.tree) ** 2) == is_small
    if is_small:
        assert largest.numel == inputs[0].numel()


# ---- flex ----------------------------------------------------------------------------------------------------------


def forward_error(inputs: list[Tensor], mask: TreeBlockMask, **options) -> float:
    """Of flex, against dense; without gradients, which flex does not have on CPU."""
    with torch.no_grad():
        expected = attention(*inputs, mask, backend="dense", **options)
        return (attention(*inputs, mask, backend="flex", **options) - expected).abs().max().item()


@pytest.mark.slow
def test_flex_compiles_once_for_thirty_lengths_and_is_dense_at_each(device):
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    rng = random.Random(1)
    for blocks in [4, 2, 3, *range(5, 32)]:  # first as many blocks as query heads, then as key/value heads
        prompt = rng.randrange(1, 128 * blocks - 20)
        suffixes = [10, 128 * blocks - prompt - 10 - rng.randrange(0, 10)]
        tree = PrefixTree.from_lengths([prompt], [suffixes]).to(device)
        assert len(tree) == 128 * blocks
        inputs = qkv(tree, heads=(4, 2), dtype=torch.float32, device=device)
        assert forward_error(inputs, block_mask(tree)) < 1e-5  # outputs of some units, float32 steps of 1e-7
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_flex_is_dense_with_window_and_softcap(device):
    for name in ("deep forest", "five groups in a row", "one token and 255 pads"):
        tree = TREES[name].to(device)
        inputs = qkv(tree, heads=(2, 2), dtype=torch.float32, device=device)
        mask = block_mask(tree)
        assert forward_error(inputs, mask, window=11, softcap=1.5, scale=0.4) < 1e-5


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", TREES)
def test_flex_on_cuda_is_dense_in_output_and_gradients(name, heads, cuda):
    tree = TREES[name].to(cuda)
    mask, inputs = block_mask(tree), qkv(tree, heads, dtype=torch.float32, device=cuda)
    expected = out_and_grads(attention(*inputs, mask, backend="dense"), inputs)
    values = out_and_grads(attention(*inputs, mask, backend="flex"), inputs)
    assert largest_difference(values, expected) < 1e-4


def test_flex_on_cuda_is_as_accurate_as_unshared_attention_in_bfloat16(cuda):
    tree = TREES["deep forest"].to(cuda)
    inputs = qkv(tree, dtype=torch.bfloat16, device=cuda)
    assert_error_budget(inputs, tree, "flex")


# ---- mistakes, each far outside the tolerance ------------------------------------------------------------------------


def with_end(tree: PrefixTree, start: int, stop: int, value: Tensor | int) -> PrefixTree:
    end = tree.end.clone()
    end[start:stop] = value
    return replace(tree, end=end)


GROUP = TREES["group"]
MISTAKES = {
    "plain causal mask": with_end(GROUP, 0, GROUP.num_tokens, GROUP.num_tokens),
    "the first completion's end off by one": with_end(GROUP, 37, 57, 58),
    "the prompt's end off by one": with_end(GROUP, 0, 37, GROUP.num_tokens - 1),
    "no rectangle under the prompt": with_end(GROUP, 0, 37, 37),
}


@pytest.mark.parametrize("backend", ["split", "dense"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_tree_shows(mistake, backend):
    inputs = qkv(GROUP)
    expected = baseline_attention(*inputs, GROUP.node)[:, :, : GROUP.num_tokens]
    wrong = attention(*inputs, block_mask(MISTAKES[mistake]), backend=backend)[:, :, : GROUP.num_tokens]
    assert (wrong - expected).abs().max() > 1e-2


def test_a_window_that_hides_nothing_is_no_window():
    inputs, mask, longest = qkv(GROUP), block_mask(GROUP), GROUP.max_length
    values = [attention(*inputs, mask, window=window, backend="split") for window in (None, longest)]
    assert torch.equal(*values)
    with pytest.raises(ValueError, match="has no softcap or window"):
        attention(*inputs, mask, window=longest - 1, backend="split")
