"""A prefix that is encoded once for several micro-batches gives the outputs and gradients of the unshared model."""

from __future__ import annotations

import random

import pytest
import test_transformers as hf
import torch
from cases import found, tokens
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing
from baseline import VOCAB, in_float64, relative_error, tiny_model, baseline_attention, baseline_logprobs

from flexpg.backends.dispatch import attention
from flexpg.integrations import torchtune as tune
from flexpg.integrations import transformers as integration
from flexpg.logprobs import token_logprobs
from flexpg.masks import block_mask, dense_mask
from flexpg.packing import pack, runs
from flexpg.prefix_cache import EncodedPrefix, _apart
from flexpg.rollouts import Rollouts
from flexpg.tree import BLOCK, PrefixTree

LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 30}
LONG_ROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
PARTS = [[0, 3, 5], [1], [2, 4, 6]]


def group(prompt_len: int) -> tuple[list[int], list[list[int]]]:
    """A prompt, and completions of which two begin alike, one is another's beginning and one has one token."""
    rng = random.Random(prompt_len)
    prompt = [rng.randrange(VOCAB) for _ in range(prompt_len)]
    completions = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 20))] for _ in range(4)]
    return prompt, [*completions, [*completions[0][:2], 3, 4], completions[1][:1], [5]]


def tree_of(prompt: list[int], completions: list[list[int]]) -> PrefixTree:
    return PrefixTree.from_sequences([prompt + own for own in completions])


def by_parts(
    model: nn.Module, prompt: list[int], completions: list[list[int]], weights: Tensor, library=tune
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of every completion, and the gradients of their weighted sum, part by part."""
    model.zero_grad()
    logprobs = torch.zeros_like(weights)
    with library.encode_prefix(model, prompt) as prefix:
        for part in PARTS:
            tree = tree_of(prompt, [completions[n] for n in part])
            hidden = library.forward(model, tree, prefix=prefix)
            prompt_lens = torch.full((len(part),), len(prompt))
            own = token_logprobs(hidden, library.output(model), tree, prompt_lens=prompt_lens)
            (own * weights[part, : own.shape[1]]).sum().backward()
            logprobs[part, : own.shape[1]] = own.detach().to(weights)
    return logprobs, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def expected_of(model: nn.Module, logprobs: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return logprobs.detach(), [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def weights_of(completions: list[list[int]]) -> Tensor:
    """Another weight for every token, so that one in another's place shows."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(completions), max(map(len, completions)), generator=generator, dtype=torch.float64)


def errors(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Of the log-probabilities, and the largest of the gradients."""
    by_parameter = [relative_error(a, b) for a, b in zip(found[1], expected[1], strict=True)]
    return relative_error(found[0], expected[0]), max(by_parameter)


def checkpointed(model: nn.Module) -> nn.Module:
    set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "prompt_len"), [("llama3_2", 1), ("qwen2_tied", 100), ("llama3_2", 128), ("gemma2", 30), ("phi3", 129)]
)
def test_micro_batches_on_one_prefix_equal_the_unshared_torchtune_model(name, prompt_len, checkpointing):
    model = in_float64(tiny_model(name))
    prompt, completions = group(prompt_len)
    weights = weights_of(completions)
    logprobs = baseline_logprobs(model, [prompt + own for own in completions], [len(prompt)] * len(completions))
    expected = expected_of(model, logprobs, weights)
    if checkpointing:
        model = checkpointed(model)
    bound = 5e-6 if name == "gemma2" else 1e-12  # whose attention rounds to float32
    assert max(errors(by_parts(model, prompt, completions, weights), expected)) < bound


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "mistral", "gpt2"])
def test_micro_batches_on_one_prefix_equal_the_unshared_transformers_model(name, checkpointing):
    """Of which qwen2, gemma3 and mistral have windows of 7 tokens that reach back into the prefix."""
    integration.register()
    ours, theirs = map(hf.in_float64, hf.pair(name))
    prompt, completions = group(40)
    weights = weights_of(completions)
    case = found([prompt + own for own in completions], [len(prompt)] * len(completions))
    expected = expected_of(theirs, hf.baseline_logprobs(theirs, case), weights)
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert max(errors(by_parts(ours, prompt, completions, weights, integration), expected)) < 1e-12


def test_adapters_whose_first_keys_need_no_gradient_are_trained_alike():
    model = in_float64(tiny_model("llama3_2_lora"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    model.layers[0].attn.k_proj.requires_grad_(False)
    prompt, completions = group(50)
    weights = weights_of(completions)
    logprobs = baseline_logprobs(model, [prompt + own for own in completions], [len(prompt)] * len(completions))
    expected = expected_of(model, logprobs, weights)
    assert max(errors(by_parts(model, prompt, completions, weights), expected)) < 1e-12


def test_without_gradients_the_prefix_serves_scores():
    model, (prompt, completions) = in_float64(tiny_model("qwen2")), group(60)
    expected = baseline_logprobs(model, [prompt + own for own in completions], [len(prompt)] * len(completions))
    with torch.no_grad(), tune.encode_prefix(model, prompt) as prefix:
        tree = tree_of(prompt, completions)
        hidden = tune.forward(model, tree, prefix=prefix)
        logprobs = token_logprobs(hidden, model.output, tree, prompt_lens=torch.full((len(completions),), len(prompt)))
    assert relative_error(logprobs, expected) < 1e-12


def test_a_run_of_packed_micro_batches_is_the_group_in_one_row():
    model = in_float64(tiny_model("llama3_2"))
    prompt, completions = group(90)
    rollouts = Rollouts(
        [torch.tensor(prompt)],
        [torch.tensor(own) for own in completions],
        torch.zeros(len(completions), dtype=torch.long),
        torch.ones(len(completions)),
    )
    weights = weights_of(completions)
    gradients = []
    for max_tokens in (1000, 115):
        model.zero_grad()
        batches = pack(rollouts, max_tokens)
        (run,) = runs(batches)
        with tune.encode_run(model, run) as prefix:
            for batch in run:
                logprobs, _ = tune.logprobs(model, batch, prefix=prefix)
                (logprobs * weights[batch.indices, : logprobs.shape[1]]).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(batches) > 1
    assert max(map(relative_error, gradients[1], gradients[0])) < 1e-12


def test_a_process_without_a_prompt_of_its_own_encodes_one_token_and_adds_zeros():
    """As FSDP needs where others have a run: its gradients are those of its rows alone."""
    model = in_float64(tiny_model("llama3_2"))
    rollouts = Rollouts([torch.arange(5)], [torch.tensor([7, 8])], torch.tensor([0]), torch.ones(1))
    (alone,) = pack(rollouts, 100)
    rows, encoded = [], []
    model.tok_embeddings.register_forward_hook(lambda module, args, out: rows.append(args[0].shape))
    for run in ([alone], [alone, alone]):
        model.zero_grad()
        with tune.encode_run(model, run) as prefix:
            encoded.append(prefix)
            for batch in run:
                (tune.logprobs(model, batch, prefix=prefix)[0].sum() / len(run)).backward()
        rows.append([parameter.grad.clone() for parameter in model.parameters()])
    assert encoded[0] is None and encoded[1].tree.num_tokens == 1
    assert [len(row) for row in rows if isinstance(row, torch.Size)] == [2] * (1 + 1 + 2)
    assert max(map(relative_error, rows[-1], rows[1])) < 1e-14


def forgotten(prefix: EncodedPrefix) -> None:
    prefix._close()


def without_the_last_hidden_state(prefix: EncodedPrefix) -> None:
    prefix._sums[-1] = torch.zeros_like(prefix._made[-1])
    EncodedPrefix.backward(prefix)


def last_micro_batch_alone(prefix: EncodedPrefix) -> None:
    prefix._sums = [None if total is None else total / len(PARTS) for total in prefix._sums]
    EncodedPrefix.backward(prefix)


@pytest.mark.parametrize("mistake", [forgotten, without_the_last_hidden_state, last_micro_batch_alone])
def test_a_gradient_that_does_not_reach_the_prefix_shows(monkeypatch, mistake):
    model, (prompt, completions) = in_float64(tiny_model("llama3_2")), group(60)
    weights = weights_of(completions)
    expected = by_parts(model, prompt, completions, weights)
    expected = expected[0], [grad.clone() for grad in expected[1]]
    encode = tune.encode_prefix

    def mistaken(*args):
        prefix = encode(*args)
        monkeypatch.setattr(prefix, "backward", lambda: mistake(prefix))
        return prefix

    monkeypatch.setattr(tune, "encode_prefix", mistaken)
    logprobs, grads = errors(by_parts(model, prompt, completions, weights), expected)
    assert logprobs < 1e-14 and grads > 1e-3


def test_positions_that_begin_anew_behind_the_prefix_show(monkeypatch):
    model, (prompt, completions) = in_float64(tiny_model("llama3_2")), group(60)
    weights = weights_of(completions)
    expected = by_parts(model, prompt, completions, weights)[0]

    def flat(tree, length, size):
        apart = _apart(tree, length, size)
        vars(apart)["position_ids"] = (apart.position_ids - length).clamp(min=0)
        return apart

    monkeypatch.setattr("flexpg.prefix_cache._apart", flat)
    assert relative_error(by_parts(model, prompt, completions, weights)[0], expected) > 1e-3


def later_rows(seed: int) -> tuple[PrefixTree, int]:
    """A tree with room between a prefix and what hangs on it, and the first token behind the room."""
    rng = random.Random(seed)
    length = rng.choice([1, 100, 127, 128, 129, 256, 300])
    prompt = [rng.randrange(9) for _ in range(length)]
    same = [rng.randrange(9) for _ in range(rng.choice([0, 0, 3]))]  # completions that all begin alike
    completions = [same + [rng.randrange(9) for _ in range(rng.randint(1, 200))] for _ in range(rng.randint(1, 4))]
    first = max(2, -(-length // BLOCK)) * BLOCK
    return _apart(tree_of(prompt, completions), length, first), first


@pytest.mark.parametrize("backend", ["split", "dense", pytest.param("flex", marks=pytest.mark.slow)])
def test_queries_behind_a_prefix_attend_as_in_the_whole_row(backend):
    for seed in range(2 if backend == "flex" else 12):
        tree, first = later_rows(seed)
        torch.manual_seed(seed)
        dtype = torch.float32 if backend == "flex" else torch.float64
        q, k, v = (torch.randn(1, heads, len(tree), 16, dtype=dtype) for heads in (4, 2, 2))
        needs_grad = backend != "flex"  # which has no backward on CPU
        q, k, v = (x.requires_grad_(needs_grad) for x in (q, k, v))
        out = attention(q[:, :, first:], k, v, block_mask(tree, first_query=first), backend=backend)
        used = slice(first, tree.num_tokens)
        expected = baseline_attention(q, k, v, tree.node)[:, :, used]
        out = out[:, :, : tree.num_tokens - first]
        assert relative_error(out, expected) < (1e-14 if needs_grad else 1e-6)
        if needs_grad:
            weight = torch.randn_like(expected)
            grads, by_hand = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
            assert max(map(relative_error, grads, by_hand)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_of_queries_behind_a_prefix_strays_no_further_than_in_the_whole_row(device, dtype):
    for seed in range(6):
        tree, first = later_rows(seed)
        tree = tree.to(device)
        torch.manual_seed(seed)
        exact = [torch.randn(1, heads, len(tree), 64, dtype=torch.float64, device=device) for heads in (4, 2, 2)]
        exact = [x.to(dtype).double().requires_grad_() for x in exact]
        used = slice(first, tree.num_tokens)
        weight = torch.randn(1, 4, tree.num_tokens - first, 64, dtype=torch.float64, device=device)

        def values(q, k, v, mask, rows, weight=weight):
            out = attention(q[:, :, mask.first_query :], k, v, mask)[:, :, rows]
            return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), (q, k, v))]

        expected = values(*exact, block_mask(tree), used)
        low = [x.detach().to(dtype).requires_grad_() for x in exact]
        ours = values(*low, block_mask(tree, first_query=first), slice(0, tree.num_tokens - first))
        whole = values(*low, block_mask(tree), used)
        for value, plain, right in zip(ours, whole, expected, strict=True):
            assert relative_error(value, right) < 1.5 * relative_error(plain, right) + 1e-7


@pytest.mark.parametrize("window", [None, 50])
def test_block_tables_of_later_queries_are_create_block_masks(window):
    for seed in range(20):
        tree, first = later_rows(seed)
        mask = block_mask(tree, window, first_query=first)
        rows, columns = len(tree) - first, len(tree)
        theirs = create_block_mask(mask.mask_mod, None, None, rows, columns, device="cpu")
        assert mask.shape == theirs.shape == (1, 1, rows, columns)
        dense = theirs.to_dense()
        if window is None:
            for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
                assert torch.equal(getattr(mask, name), getattr(theirs, name)), name
        assert not (dense.bool() & ~mask.to_dense().bool()).any()
        kinds = mask.mask_mod(0, 0, torch.arange(rows)[:, None], torch.arange(columns)[None])
        visible = dense_mask(tree.end)[first:]
        if window is not None:
            visible &= tree.position_ids[first:, None] - tree.position_ids[None] < window
        assert torch.equal(kinds, visible)


def test_gradients_are_summed_in_float32_where_bfloat16_would_lose_them():
    prefix = EncodedPrefix([1])
    made = torch.ones(1, dtype=torch.bfloat16, requires_grad=True) * 1
    leaf = prefix._leaf(made)
    for _ in range(1000):
        (leaf * 1.0).sum().backward()
    assert leaf.grad is None
    assert prefix._sums == [torch.tensor([1000.0])]  # in bfloat16 it stops at 256


def live_bytes(run) -> int:
    """The most that is kept for a backward at a time."""
    live = peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, peak
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            live += self.size
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return peak


def test_the_memory_is_that_of_the_prefix_and_one_micro_batch():
    model, prompt = tiny_model("llama3_2"), tokens(100, 1)
    completions = [tokens(80, n) for n in range(2, 14)]
    prompt_lens = [torch.full((n,), len(prompt)) for n in range(13)]

    def loss(tree, hidden):
        return token_logprobs(hidden, model.output, tree, prompt_lens=prompt_lens[len(tree.lengths)]).sum()

    def whole(count):
        tree = tree_of(prompt, completions[:count])
        return lambda: loss(tree, tune.forward(model, tree)).backward()

    def in_parts():
        with tune.encode_prefix(model, prompt) as prefix:
            for first in range(0, 12, 3):
                tree = tree_of(prompt, completions[first : first + 3])
                loss(tree, tune.forward(model, tree, prefix=prefix)).backward()

    one_row, one_part, parts = live_bytes(whole(12)), live_bytes(whole(3)), live_bytes(in_parts)
    assert parts < 1.6 * one_part < 0.6 * one_row  # rows are padded: 256 + 256 tokens, 384 and 1,152


def test_what_cannot_be_a_prefix_is_refused():
    model, (prompt, completions) = tiny_model("llama3_2"), group(20)
    tree = tree_of(prompt, completions)
    others = [tree_of(prompt[1:], completions), tree_of(prompt, [completions[0], []])]
    others += [PrefixTree.from_sequences([[*prompt, 1], [*prompt[:-1], (prompt[-1] + 1) % VOCAB, 4]])]
    with tune.encode_prefix(model, prompt) as prefix:
        for other in others:
            with pytest.raises(ValueError, match=r"not all sequences of PrefixTree.* go on after the 20 tokens of the"):
                tune.forward(model, other, prefix=prefix)
        with pytest.raises(ValueError, match="mask and prefix came together; with a prefix leave the mask out"):
            tune.forward(model, tree, block_mask(tree), prefix=prefix)
        with (
            pytest.raises(ValueError, match="prefix and micro-batches need gradients both, or neither"),
            torch.no_grad(),
        ):
            tune.forward(model, tree, prefix=prefix)
        tune.forward(model, tree, prefix=prefix).sum().backward()
    with pytest.raises(ValueError, match="the prefix is not encoded, or its block was left; encode it anew"):
        tune.forward(model, tree, prefix=prefix)
    with pytest.raises(TypeError, match=r"tree is of type list; make one with PrefixTree"):
        tune.forward(model, [1], prefix=prefix)


def test_a_backward_that_does_not_stand_in_the_block_is_refused():
    model, (prompt, completions) = tiny_model("llama3_2"), group(20)
    tree = tree_of(prompt, completions)
    with pytest.raises(ValueError, match=r"no gradient arrived at the prefix; call loss.backward\(\) inside its block"):
        with tune.encode_prefix(model, prompt) as prefix:
            tune.forward(model, tree, prefix=prefix)
    with tune.encode_prefix(model, prompt) as prefix:
        late = tune.forward(model, tree, prefix=prefix).sum()
        tune.forward(model, tree, prefix=prefix).sum().backward()
    with pytest.raises(ValueError, match="a gradient arrived after the prefix's backward"):
        late.backward()


def test_a_block_that_fails_lets_go_of_the_memory_and_of_no_gradient():
    model, (prompt, completions) = tiny_model("llama3_2"), group(20)
    with pytest.raises(RuntimeError, match="mine"), tune.encode_prefix(model, prompt) as prefix:
        tune.forward(model, tree_of(prompt, completions), prefix=prefix).sum().backward()
        raise RuntimeError("mine")
    assert prefix._layers == {} and prefix._made == []


def test_a_reentrant_checkpoint_is_refused_as_its_layers_run_without_gradients():
    integration.register()
    model = hf.loaded("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"torch.no_grad\(\) around both, and activation checkpointing with use_reent"):
        integration.encode_prefix(model, [1, 2, 3])


def test_rotations_by_the_longest_sequence_are_refused_where_the_prefix_is_shorter():
    integration.register()
    model = hf.loaded("phi3", original_max_position_embeddings=30, rope_parameters=LONG_ROPE)
    prompt = tokens(20, 1)
    tree = tree_of(prompt, [tokens(30, 2), tokens(40, 3)])
    integration.forward(model, tree)  # both sequences are long
    with pytest.raises(ValueError, match="rotary scaling 'longrope' turns all tokens of a row by its longest"):
        with integration.encode_prefix(model, prompt) as prefix:
            integration.forward(model, tree, prefix=prefix)


@pytest.mark.parametrize("first_query", [1, 64, -128, 512])
def test_a_first_query_is_a_blocks_first_token(first_query):
    tree = PrefixTree.from_lengths([300], [[20, 30]])
    assert len(tree) == 384
    with pytest.raises(ValueError, match=f"first_query is {first_query}; give a multiple of 128 from 0 to below 384"):
        block_mask(tree, first_query=first_query)
    q, k = torch.randn(1, 1, 384, 8), torch.randn(1, 1, 384, 8)
    with pytest.raises(ValueError, match="has 384 packed tokens, 128 of them queries; got q"):
        attention(q, k, k, block_mask(tree, first_query=256))
