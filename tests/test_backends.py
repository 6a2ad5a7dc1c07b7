"""Attention over a packed sequence equals attention of each sequence on its own, forward and backward, per backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from baseline import Operators, baseline_attention, random_sequences, relative_error
from cases import image_tree
from oracles import with_blocks
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from flexpg.backends import flex
from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask, block_mask, group_block_mask
from flexpg.tree import PrefixTree

TREES = {
    "group": PrefixTree.from_lengths([37], [[20, 5, 60]]),
    "five groups": PrefixTree.from_lengths([9, 30, 1, 17, 4], [[8, 3], [5, 5, 2], [7], [1, 30], [6, 6, 6]]),
    "deep forest": PrefixTree.from_sequences(random_sequences(random.Random(0), 25, 30, 2)),
    "group of one": PrefixTree.from_lengths([12], [[15]]),
    "completions of one token": PrefixTree.from_lengths([10], [[1, 1, 4]]),
    "equal completions": PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 5]]),
    "prefixes of one another": PrefixTree.from_sequences([[1], [1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 6]]),
    "one token": PrefixTree.from_sequences([[3]]),
    "no padding": PrefixTree.from_lengths([56], [[100, 50, 50]]),
}
GROUP = TREES["group"]
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (4, 1)}  # query and key/value heads
WIDTH = 16


def random_qkv(tree: PrefixTree, heads=(4, 2), dtype=torch.float64, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, tree.padded_length, WIDTH) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=generator).double().to(device, dtype).requires_grad_() for s in shapes]


def out_and_grads(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return an output and gradients in which every output has another weight."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights.to(out))]


def largest_difference(values: list[Tensor], expected: list[Tensor]) -> float:
    return max((value - other).abs().max().item() for value, other in zip(values, expected, strict=True))


def without_padding(results: list[Tensor], tree: PrefixTree) -> list[Tensor]:
    return [x[:, :, : tree.num_tokens] for x in results]


# Exactness


@pytest.mark.parametrize("backend", ["split", "dense"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", TREES)
def test_attention_float64_matches_baseline(name, heads, backend):
    tree, inputs = TREES[name], random_qkv(TREES[name], HEADS[heads])
    used, padding = without_padding(inputs, tree), slice(tree.num_tokens, None)
    expected = out_and_grads(baseline_attention(*used, tree.node), inputs)
    out = attention(*inputs, block_mask(tree), backend=backend)
    values = out_and_grads(out[:, :, : tree.num_tokens], inputs)
    assert largest_difference(values, expected) < 1e-13
    repeats = inputs[0].shape[1] // inputs[2].shape[1]
    assert torch.equal(out[:, :, padding], inputs[2][:, :, padding].repeat_interleave(repeats, dim=1))  # sees itself


def random_sinks(heads: int = 4, dtype=torch.float64, device="cpu") -> Tensor:
    """Return logits [Hq] around those of the scores, one that dominates the softmax and one that does not matter."""
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sinks[0], sinks[-1] = 8, -30
    return sinks.to(device, dtype).requires_grad_()


@pytest.mark.parametrize("backend", ["split", "dense"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", TREES)
def test_attention_sinks_float64_match_softmax_with_one_more_column(name, heads, backend):
    tree, inputs = TREES[name], [*random_qkv(TREES[name], HEADS[heads]), random_sinks(HEADS[heads][0])]
    *q_k_v, sinks = inputs
    used = without_padding(q_k_v, tree)
    expected = out_and_grads(baseline_attention(*used, tree.node, sinks=sinks), inputs)
    out = attention(*q_k_v, block_mask(tree), sinks=sinks, backend=backend)
    values = out_and_grads(out[:, :, : tree.num_tokens], inputs)
    assert largest_difference(values, expected) < 1e-13
    assert out.isfinite().all()  # padding too


@pytest.mark.parametrize("options", [{"window": 11}, {"softcap": 1.5}, {"window": 11, "softcap": 1.5}], ids=str)
def test_attention_sinks_with_sliding_window_and_softcap_match_baseline(options):
    tree = TREES["deep forest"]
    inputs = [*random_qkv(tree), random_sinks()]
    *q_k_v, sinks = inputs
    expected = out_and_grads(baseline_attention(*q_k_v, tree.node, sinks=sinks, **options), inputs)
    out = attention(*q_k_v, block_mask(tree), sinks=sinks, **options)
    values = out_and_grads(torch.where(tree_mask(tree), out, 0), inputs)
    assert largest_difference(values, expected) < 1e-13


def tree_mask(tree: PrefixTree) -> Tensor:
    """Return [S, 1] bool, False at padding."""
    return (torch.arange(tree.padded_length) < tree.num_tokens)[:, None]


def test_split_sinks_leave_padding_unchanged():
    inputs, sinks = random_qkv(GROUP), random_sinks()
    outs = [attention(*inputs, block_mask(GROUP), sinks=given, backend="split") for given in (None, sinks)]
    assert torch.equal(*(out[:, :, GROUP.num_tokens :] for out in outs))


def test_attention_sinks_of_minus_infinity_change_nothing():
    inputs, mask = random_qkv(GROUP), block_mask(GROUP)
    sinks = torch.full((4,), float("-inf"), dtype=torch.float64, requires_grad=True)
    for backend in ("split", "dense"):
        values = out_and_grads(attention(*inputs, mask, sinks=sinks, backend=backend), [*inputs, sinks])
        expected = out_and_grads(attention(*inputs, mask, backend=backend), inputs)
        assert largest_difference(values[:-1], expected) < 1e-14 and not values[-1].any()


def test_attention_sinks_of_another_head_count_raise():
    with pytest.raises(ValueError, match=r"sinks must be \[4\], one logit per query head, got \[2\]"):
        attention(*random_qkv(GROUP), block_mask(GROUP), sinks=random_sinks(2))


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("chunk", [1, 10, 16, 1000])
def test_attention_chunks_match_baseline(chunk, window, device):
    dtype, tolerance = (torch.float64, 1e-13) if device == "cpu" else (torch.float32, 1e-4)
    tree = TREES["deep forest"].to(device)
    inputs = random_qkv(tree, dtype=dtype, device=device)
    baseline = baseline_attention(*(x.double() for x in inputs), tree.node, window, chunk=chunk)
    expected = without_padding(out_and_grads(baseline, inputs), tree)
    out = attention(*inputs, block_mask(tree, window, chunk=chunk))
    assert largest_difference(without_padding(out_and_grads(out, inputs), tree), expected) < tolerance


IMAGES = {
    "one image": [(9, 20, 30)],
    "first in the prompt": [(0, 20, 3)],
    "last in the prompt": [(7, 20)],
    "two images and text": [(9, 20, 5, 14, 6), (9, 20, 8), (12,)],
}


@pytest.mark.parametrize("first_query", [0, 128])
@pytest.mark.parametrize("backend", ["split", "dense"])
@pytest.mark.parametrize("name", IMAGES)
def test_attention_bidirectional_images_match_softmax_over_visible_keys(name, backend, first_query):
    tree = image_tree(*IMAGES[name], completions=(40, 90, 60))
    q, k, v = random_qkv(tree)
    inputs = [q[:, :, first_query:].detach().requires_grad_(), k, v]
    visible = with_blocks(tree)[first_query:]
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (inputs[0] @ keys.transpose(-1, -2) * WIDTH**-0.5).masked_fill(~visible, float("-inf"))
    expected = out_and_grads(scores.softmax(-1) @ values, inputs)
    mask = block_mask(tree, first_query=first_query, bidirectional=True)
    assert largest_difference(out_and_grads(attention(*inputs, mask, backend=backend), inputs), expected) < 1e-13


@pytest.mark.parametrize("cut", [15, 29])
def test_split_image_with_the_first_query_inside_matches_dense(cut):
    """No model does this yet: a mask's first query begins a block of 128 tokens."""
    tree = image_tree((9, 20, 30))
    mask = block_mask(tree, bidirectional=True)
    q, k, v = random_qkv(tree)
    expected = attention(q, k, v, mask, backend="dense")[:, :, cut:]
    mask.first_query = cut
    assert largest_difference([attention(q[:, :, cut:], k, v, mask, backend="split")], [expected]) < 1e-13


def test_split_accepts_a_chunk_that_hides_nothing():
    inputs, longest = random_qkv(GROUP), GROUP.max_length
    masks = [block_mask(GROUP, chunk=chunk) for chunk in (None, longest)]
    assert torch.equal(*(attention(*inputs, mask, backend="split") for mask in masks))
    with pytest.raises(ValueError, match=f'"split" supports .* chunk .{longest - 1}.'):
        attention(*inputs, block_mask(GROUP, chunk=longest - 1), backend="split")


@pytest.mark.parametrize("scale", [0.07, 1.0])
def test_attention_scale_multiplies_scores(scale):
    inputs = random_qkv(GROUP)
    rescaled = [inputs[0] * (scale * WIDTH**0.5), *inputs[1:]]
    expected = out_and_grads(attention(*rescaled, block_mask(GROUP)), inputs)
    for backend in ("split", "dense"):
        values = out_and_grads(attention(*inputs, block_mask(GROUP), scale=scale, backend=backend), inputs)
        assert largest_difference(values, expected) < 1e-13


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 11, 1000])
def test_attention_sliding_window_and_softcap_match_baseline(window, softcap, device):
    # Triton has no float64; in float32, sums over some hundred tokens stay within 1e-4.
    dtype, tolerance = (torch.float64, 1e-13) if device == "cpu" else (torch.float32, 1e-4)
    tree = TREES["deep forest"].to(device)
    inputs = random_qkv(tree, dtype=dtype, device=device)
    baseline = baseline_attention(*(x.double() for x in inputs), tree.node, window, softcap)
    expected = without_padding(out_and_grads(baseline, inputs), tree)
    out = attention(*inputs, block_mask(tree), window=window, softcap=softcap)
    assert largest_difference(without_padding(out_and_grads(out, inputs), tree), expected) < tolerance


def test_attention_window_argument_overrides_the_masks_window():
    inputs = random_qkv(GROUP)
    windowed = attention(*inputs, block_mask(GROUP, 5))
    assert torch.equal(attention(*inputs, block_mask(GROUP), window=5), windowed)
    assert torch.equal(attention(*inputs, block_mask(GROUP, 9), window=5), windowed)
    assert (attention(*inputs, block_mask(GROUP)) - windowed).abs().max() > 1e-2


def test_split_accepts_a_window_that_hides_nothing():
    inputs, mask, longest = random_qkv(GROUP), block_mask(GROUP), GROUP.max_length
    assert torch.equal(*(attention(*inputs, mask, window=window, backend="split") for window in (None, longest)))
    with pytest.raises(ValueError, match=f'"split" supports neither a softcap .* nor a window .{longest - 1}'):
        attention(*inputs, mask, window=longest - 1, backend="split")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_attention_scale_and_softcap_must_be_finite_and_above_0(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number above 0, or None, got"):
        attention(*random_qkv(GROUP), block_mask(GROUP), **{name: value})


def test_attention_changed_completion_leaves_others_bitwise_identical():
    before = random_qkv(GROUP, dtype=torch.float32)
    after = [x.detach().clone() for x in before]
    changed = slice(37, 57)  # the first completion, between the prompt and the others
    for x in after:
        x[:, :, changed] += 1
        x.requires_grad_()
    mask = block_mask(GROUP)
    results = zip(*(out_and_grads(attention(*x, mask), x) for x in (before, after)), strict=True)
    prompt, others = slice(0, 37), slice(57, None)
    for i, (value, other) in enumerate(results):
        assert torch.equal(value[:, :, others], other[:, :, others])
        assert not torch.equal(value[:, :, changed], other[:, :, changed])
        reaches_prompt = i in (2, 3)  # gradients of the prompt's keys and values
        assert torch.equal(value[:, :, prompt], other[:, :, prompt]) != reaches_prompt


# Low precision


def assert_error_budget(inputs: list[Tensor], tree: PrefixTree, backend: str) -> None:
    """Check that errors of output and gradients against float64 are at most 1.5 times the baseline's.

    Args:
        inputs: Queries, keys, values and, if there are four, sinks.
        tree: The packed sequence.
        backend: What is checked.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def results(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        out = attend(*tensors[:3], sinks=tensors[3] if len(tensors) > 3 else None)
        return out_and_grads(torch.where(tree_mask(tree).to(out.device), out, 0), tensors)

    baseline = partial(baseline_attention, node=tree.node)
    shared = partial(attention, mask=block_mask(tree), backend=backend)
    expected, values, others = results(baseline, exact), results(shared, inputs), results(baseline, inputs)
    for value, other, truth in zip(values, others, expected, strict=True):
        assert relative_error(value, truth) < 1.5 * relative_error(other, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["group", "five groups", "deep forest"])
def test_split_low_precision_is_within_error_budget(name, dtype):
    assert_error_budget(random_qkv(TREES[name], dtype=dtype), TREES[name], "split")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["group", "five groups", "deep forest"])
def test_split_sinks_low_precision_is_within_error_budget(name, dtype):
    # Many heads: the error of four rounded numbers, the gradient of four sinks, varies by chance.
    sinks = torch.randn(32, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    assert_error_budget([*random_qkv(TREES[name], (32, 16), dtype), sinks], TREES[name], "split")


@pytest.mark.parametrize("name", ["group", "five groups", "deep forest"])
def test_split_sinks_float32_errors_are_a_few_roundings(name):
    *q_k_v, sinks = inputs = [*random_qkv(TREES[name], dtype=torch.float32), random_sinks(dtype=torch.float32)]
    *exact_q_k_v, exact_sinks = exact = [x.detach().double().requires_grad_() for x in inputs]
    used = slice(TREES[name].num_tokens)
    out = attention(*q_k_v, block_mask(TREES[name]), sinks=sinks)[:, :, used]
    truth = attention(*exact_q_k_v, block_mask(TREES[name]), sinks=exact_sinks, backend="dense")[:, :, used]
    errors = map(relative_error, out_and_grads(out, inputs), out_and_grads(truth, exact))
    assert max(errors) < 16 * torch.finfo(torch.float32).eps  # about 4 are found


def test_split_bfloat16_sums_gradients_of_many_parts_in_float32():
    # The last query of this comb attends in sixty parts, whose roundings to bfloat16 would add up.
    comb = PrefixTree.from_sequences([[0] * depth + [1] for depth in range(60)])
    assert_error_budget(random_qkv(comb, dtype=torch.bfloat16), comb, "split")


# Layouts, checkpointing, compilation


@pytest.mark.parametrize("backend", ["split", "dense"])
def test_attention_backward_accepts_non_contiguous_gradients(backend):
    mask, inputs = block_mask(GROUP), random_qkv(GROUP)

    def grads(weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*inputs, mask, backend=backend), inputs, weights)

    ones = torch.ones(1, 4, GROUP.padded_length, WIDTH, dtype=torch.float64)
    for weights in (ones[:, :1, :1, :1].expand_as(ones), ones.mT.contiguous().mT):
        assert not weights.is_contiguous()
        assert largest_difference(grads(weights), grads(ones)) < 1e-13


def test_attention_accepts_transposed_inputs():
    mask, inputs = block_mask(GROUP), random_qkv(GROUP)
    expected = out_and_grads(attention(*inputs, mask), inputs)
    for dims in ((1, 2), (2, 3)):
        views = [x.detach().transpose(*dims).contiguous().transpose(*dims).requires_grad_() for x in inputs]
        assert largest_difference(out_and_grads(attention(*views, mask), views), expected) < 1e-14


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_attention_activation_checkpointing_is_bitwise_identical(use_reentrant):
    mask, inputs = block_mask(TREES["deep forest"]), random_qkv(TREES["deep forest"])
    expected = out_and_grads(attention(*inputs, mask), inputs)
    out = checkpoint(lambda q, k, v: attention(q, k, v, mask), *inputs, use_reentrant=use_reentrant)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(weights)  # reentrant checkpoints do not support torch.autograd.grad
    assert all(map(torch.equal, [out, *(x.grad for x in inputs)], expected))


def test_attention_inside_a_compiled_function_matches_eager():
    mask, inputs = block_mask(GROUP), random_qkv(GROUP)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.sin(), k.cos(), v * 2, mask).sin()

    expected = out_and_grads(layer(*inputs), inputs)
    values = out_and_grads(torch.compile(layer, backend="aot_eager")(*inputs), inputs)
    assert largest_difference(values, expected) < 1e-14


@pytest.mark.parametrize("window", [None, 5])
def test_attention_compiled_raises_for_a_mask_of_another_tree(window):
    compiled = torch.compile(lambda q, k, v, mask: attention(q, k, v, mask), backend="aot_eager")
    tree = PrefixTree.from_lengths([600], [[60, 70]])
    for length in (300, 900):
        other = PrefixTree.from_lengths([length], [[60, 70]])
        with pytest.raises(Exception, match=f"must have {other.padded_length} and .*, got {tree.padded_length} and"):
            compiled(*random_qkv(tree), block_mask(other, window))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"backend": "dense"}], ids=str)
def test_attention_on_cpu_accepts_inputs_without_padding(options):
    tree = TREES["five groups"]
    mask, inputs = block_mask(tree), random_qkv(tree)
    assert tree.num_tokens < tree.padded_length
    whole = out_and_grads(attention(*inputs, mask, **options)[:, :, : tree.num_tokens], inputs)
    cut = [x.detach()[:, :, : tree.num_tokens].requires_grad_() for x in inputs]
    assert (
        largest_difference(without_padding(whole, tree), out_and_grads(attention(*cut, mask, **options), cut)) < 1e-14
    )
    with pytest.raises(ValueError, match=f"q and k must have {tree.padded_length} and"):
        attention(*(x.detach() for x in cut), mask, backend="flex")


def test_attention_keys_of_a_batch_raise():
    tree = TREES["five groups"]
    q, k, v = random_qkv(tree)
    with pytest.raises(ValueError, match=r"q must be \[1, Hq, S, D\] with k and v \[1, Hkv, S, D\]"):
        attention(q, torch.cat([k, k]), torch.cat([v, v]), block_mask(tree))


# Work and memory of split


def test_split_allocates_no_tensor_with_a_score_per_token_pair():
    mask = group_block_mask([900], [[50] * 8])
    inputs = random_qkv(mask.tree, dtype=torch.float32)
    numel = {}
    for backend in ("split", "dense"):
        with Operators() as operators:
            out_and_grads(attention(*inputs, mask, backend=backend), inputs)
        numel[backend] = operators.largest
    assert numel["split"] == inputs[0].numel() < mask.tree.padded_length**2 < numel["dense"]


def test_split_work_grows_linearly_with_completions_with_one_kernel_each():
    works = []
    for completions in (4, 8, 12):
        tree = PrefixTree.from_lengths([50], [[10] * completions])
        inputs, mask = (
            [x.detach()[:, :, : tree.num_tokens].requires_grad_() for x in random_qkv(tree)],
            block_mask(tree),
        )
        with Operators() as work:
            attention(*inputs, mask).sum().backward()
        kernel = "_scaled_dot_product_flash_attention_for_cpu"
        parts = 1 + completions + 1  # the prompt, each completion, and all completions with the prompt
        assert work.calls[kernel] == work.calls[kernel + "_backward"] == parts
        works.append(work)
    few, more, most = works
    assert most.calls.total() - more.calls.total() == more.calls.total() - few.calls.total() <= 4 * 12
    assert most.bytes - more.bytes == more.bytes - few.bytes


# Flex


def flex_error(inputs: list[Tensor], mask: TreeBlockMask, **options) -> float:
    """Return flex's difference to dense; without gradients, which flex does not have on CPU."""
    with torch.no_grad():
        expected = attention(*inputs, mask, backend="dense", **options)
        return (attention(*inputs, mask, backend="flex", **options) - expected).abs().max().item()


@pytest.mark.slow
def test_flex_compiles_once_for_thirty_lengths(device):
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    rng = random.Random(1)
    for blocks in [4, 2, 3, *range(5, 32)]:  # first as many blocks as query heads, then as key/value heads
        prompt = rng.randrange(1, 128 * blocks - 20)
        suffixes = [10, 128 * blocks - prompt - 10 - rng.randrange(0, 10)]
        tree = PrefixTree.from_lengths([prompt], [suffixes]).to(device)
        assert tree.padded_length == 128 * blocks
        inputs = random_qkv(tree, heads=(4, 2), dtype=torch.float32, device=device)
        assert flex_error(inputs, block_mask(tree)) < 1e-5  # outputs of some units, float32 steps of 1e-7
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_flex_sliding_window_softcap_scale_and_chunks_match_dense(device):
    for name in ("deep forest", "five groups", "one token"):
        tree = TREES[name].to(device)
        inputs = random_qkv(tree, heads=(2, 2), dtype=torch.float32, device=device)
        assert flex_error(inputs, block_mask(tree), window=11, softcap=1.5, scale=0.4) < 1e-5
        assert flex_error(inputs, block_mask(tree, chunk=10), scale=0.4) < 1e-5


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", TREES)
def test_flex_on_cuda_matches_dense_in_output_and_gradients(name, heads, cuda):
    tree = TREES[name].to(cuda)
    mask, inputs = block_mask(tree), random_qkv(tree, HEADS[heads], dtype=torch.float32, device=cuda)
    expected = out_and_grads(attention(*inputs, mask, backend="dense"), inputs)
    values = out_and_grads(attention(*inputs, mask, backend="flex"), inputs)
    assert largest_difference(values, expected) < 1e-4


@pytest.mark.parametrize("options", [{}, {"window": 11, "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_flex_sinks_gradients_match_dense(heads, options, monkeypatch):
    # Not compiled, flex has a backward on CPU, which torch forbids because it is slow.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *q_k_v: None)
    tree = TREES["deep forest"]
    inputs = [*random_qkv(tree, HEADS[heads]), random_sinks(HEADS[heads][0])]
    *q_k_v, sinks = inputs
    expected = out_and_grads(attention(*q_k_v, block_mask(tree), sinks=sinks, backend="dense", **options), inputs)
    cap = torch.tensor(1.5, dtype=torch.float64) if options else None
    out = flex._flex(*q_k_v, block_mask(tree, options.get("window")), WIDTH**-0.5, cap, sinks, {})
    assert largest_difference(out_and_grads(out, inputs), expected) < 1e-13


def test_flex_sinks_on_cpu_raise():
    q_k_v = [x.detach() for x in random_qkv(GROUP, dtype=torch.float32)]
    with pytest.raises(ValueError, match='"flex" has no sinks on CPU'):
        attention(*q_k_v, block_mask(GROUP), sinks=random_sinks(dtype=torch.float32).detach(), backend="flex")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", [{}, {"window": 11}], ids=str)
def test_flex_sinks_on_cuda_match_dense_in_output_and_gradients(options, heads, cuda):
    tree = TREES["deep forest"].to(cuda)
    q_k_v = random_qkv(tree, HEADS[heads], dtype=torch.float32, device=cuda)
    sinks = random_sinks(HEADS[heads][0], torch.float32, cuda)
    expected, values = (
        out_and_grads(attention(*q_k_v, block_mask(tree), sinks=sinks, backend=backend, **options), [*q_k_v, sinks])
        for backend in ("dense", "flex")
    )
    assert largest_difference(values, expected) < 1e-4


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (9, 0), (10, 0), (12, 0)])
def test_flex_kernels_check_boundaries_only_in_the_backward_from_10_0_on(capability):
    options = flex.kernel_options(capability)
    assert options.pop("fwd_IS_DIVISIBLE")
    assert options == ({} if capability >= (10, 0) else {"bwd_IS_DIVISIBLE": True})


def test_flex_float32_at_highest_matmul_precision_warns(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    flex.warn_of_float32_precision()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    with pytest.warns(UserWarning, match=r'spills registers .* call torch.set_float32_matmul_precision\("high"\)'):
        flex.warn_of_float32_precision()


def test_flex_on_cuda_bfloat16_is_within_error_budget(cuda):
    tree = TREES["deep forest"].to(cuda)
    assert_error_budget(random_qkv(tree, dtype=torch.bfloat16, device=cuda), tree, "flex")
