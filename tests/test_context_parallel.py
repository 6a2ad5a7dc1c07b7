"""One packed sequence over several ranks: log-probabilities and gradients are those of one rank."""

from __future__ import annotations

import os
import random
import re
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import hf_models as hf
import pytest
import torch
import torch.distributed as dist
from baseline import in_float64, tiny_model
from cases import image_tree, largest_error
from float64 import float32_is_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes
from test_packed_logprobs import checkpoint_layers, gradients, loss_weights, packed_update
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import flexpg
from flexpg import PrefixTree, Rollouts, block_mask, pack, packed_logprobs
from flexpg.context_parallel import ContextShard, ShardBlockMask, cut, padded_to, token_ranges
from flexpg.integrations import integration_for
from flexpg.integrations.transformers.segment_plan import plan_range
from flexpg.masks import dense_mask
from flexpg.tree import BLOCK

PROMPT, BUDGET = 300, 480  # tokens; a budget in which the first group's prompt is cached
ONE_OVER = 257, 437  # a prompt whose last token is a range of its own, and such a budget
WHOLE = 4000
DOCS = Path(__file__).parent.parent / "docs"


def make_rollouts(prompt_len: int = PROMPT) -> Rollouts:
    """Return two groups over several blocks of 128 tokens, with completions that begin alike and masked tokens."""
    rng = random.Random(0)

    def draw(length: int) -> list[int]:
        return [rng.randrange(50) for _ in range(length)]

    start = draw(90)
    completions = [[[*start, *draw(60)], [*start, *draw(9)], draw(100), draw(40)], [draw(33), draw(3)]]
    rewards = [[1.0] * len(group) for group in completions]
    rollouts = Rollouts.from_groups([draw(prompt_len), draw(70)], completions, rewards)
    is_tool = torch.rand(rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    return replace(rollouts, loss_mask=rollouts.completion_mask & ~is_tool)


def make_model(name: str) -> nn.Module:
    """Return an enabled model in float64; a name is `KIND OPTION ...`, torchtune's with a colon."""
    kind, *options = name.split()
    library, _, builder = kind.partition(":")
    if builder:
        model = in_float64(tiny_model(builder, max_seq_len=512))
    else:
        model = hf.tiny_model(library, **hf.FLOAT64_EXPERTS)
        model = hf.in_float64(hf.with_lora(model) if "lora" in options else model)
    if "checkpointing" in options:
        checkpoint_layers(model)
    return flexpg.enable(model)


# The ranges of ranks


trees = st.builds(
    lambda prompts, completions: PrefixTree.from_lengths(prompts, [completions] * len(prompts)),
    st.lists(st.integers(1, 700), min_size=1, max_size=3),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
)


@given(trees, st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_token_ranges_are_whole_blocks_and_even(tree, size):
    tree = padded_to(tree, size)
    borders = token_ranges(tree, size)
    assert borders[0] == 0 and borders[-1] == tree.padded_length and len(borders) == size + 1
    lengths = [b - a for a, b in pairwise(borders)]
    assert all(length > 0 and length % BLOCK == 0 for length in lengths)
    assert max(lengths) - min(lengths) <= BLOCK


def test_token_ranges_do_not_cut_images():
    tree = image_tree((300, 300), (300, 300), completions=(40,))
    ends = torch.tensor([stop for _, stop in tree.blocks.tolist()])
    starts = torch.tensor([start for start, _ in tree.blocks.tolist()])
    assert any(((starts < cut) & (cut < ends)).any() for cut in range(BLOCK, tree.padded_length, BLOCK))
    for size in (2, 3):
        for border in token_ranges(tree, size)[1:-1]:
            assert not ((starts < border) & (border < ends)).any()
    with pytest.raises(ValueError, match="cut between images can have at most"):
        token_ranges(tree, tree.padded_length // BLOCK)


@pytest.mark.parametrize("window", [None, 100])
def test_mask_of_a_range_is_that_part_of_the_whole_mask(window):
    tree = PrefixTree.from_sequences([sequence.tolist() for sequence in make_rollouts().sequences])
    whole = dense_mask(tree.end)
    if window is not None:
        whole &= tree.position_ids[:, None] - tree.position_ids[None, :] < window
    for start, stop in ((0, 256), (128, 384), (256, 640)):
        mask = block_mask(cut(tree, stop), window, first_query=start)
        index = torch.arange(stop)
        found = mask.mask_mod(index.new_zeros(()), index.new_zeros(()), index[: stop - start, None], index[None, :])
        assert torch.equal(found, whole[start:stop, :stop])
        assert torch.equal(cut(tree, stop).position_ids, tree.position_ids[:stop])


# Log-probabilities and gradients


def train(name: str, max_tokens: int, prompt_len: int = PROMPT, steps: int = 1, **options: Any) -> dict[str, Tensor]:
    """Return the log-probabilities and gradients of the last of some steps, and the weights after it."""
    with float32_is_float64():
        model, rollouts = make_model(name), make_rollouts(prompt_len)
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
        for _ in range(steps):
            update = packed_update(model, rollouts, max_tokens=max_tokens, **options)
            optimizer.step()
        return update | {f"new {name}": parameter.detach() for name, parameter in model.named_parameters()}


def train_on_ranks(rank: int, cases: list[tuple[Any, ...]], steps: int) -> list[dict[str, Tensor]]:
    dist.init_process_group("gloo")
    found = [train(*case, steps=steps, context_parallel=dist.group.WORLD) for case in cases]
    dist.destroy_process_group()
    return found


def assert_equal_to_one_rank(size: int, cases: list[tuple[Any, ...]], steps: int = 1) -> None:
    expected = [train(*case, steps=steps) for case in cases]
    for found in run_processes(size, train_on_ranks, cases, steps):
        for case, of_ranks, single in zip(cases, found, expected, strict=True):
            assert largest_error(of_ranks, single) < 1e-12, case


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_context_parallel_equals_one_rank(size):
    assert_equal_to_one_rank(size, [("torchtune:llama3_2", WHOLE), ("torchtune:llama3_2", BUDGET)], steps=2)


@pytest.mark.distributed
def test_context_parallel_with_lora_and_checkpointing():
    names = ["qwen2 lora", "qwen2 checkpointing", "torchtune:llama3_2 checkpointing"]
    assert_equal_to_one_rank(3, [(name, BUDGET) for name in names])


@pytest.mark.distributed
def test_context_parallel_with_windows_softcaps_sinks_and_chunks():
    # Windows of 7 tokens and more; gemma2 has a softcap, gpt_oss sinks, llama4 chunks, qwen2 tied embeddings.
    names = ["torchtune:gemma2", "qwen2", "gemma2", "gpt_oss", "llama4", "gemma3", "qwen3_moe"]
    assert_equal_to_one_rank(3, [(name, budget) for name in names for budget in (WHOLE, BUDGET)])


def gathered_inputs(rank: int, cases: list[tuple[int, int]]) -> list[int]:
    """Return how often recurrent layers gathered their inputs in an update, for each prompt length and budget."""
    dist.init_process_group("gloo")
    counts: list[int] = []
    gather = ContextShard.gather

    def counting(shard: ContextShard, x: Tensor, dim: int) -> Tensor:
        counts[-1] += 1
        return gather(shard, x, dim)

    ContextShard.gather = counting
    for prompt_len, budget in cases:
        counts.append(0)
        packed_update(
            make_model("mamba2"), make_rollouts(prompt_len), max_tokens=budget, context_parallel=dist.group.WORLD
        )
    dist.destroy_process_group()
    return counts


@pytest.mark.distributed
def test_recurrent_layers_gather_their_inputs_for_states_of_one_token_only():
    for counts in run_processes(2, gathered_inputs, [(PROMPT, WHOLE), (PROMPT, BUDGET), ONE_OVER]):
        assert counts[:2] == [0, 0] and counts[2] > 0


def test_ranges_with_a_state_after_one_token_have_no_plan():
    tree = PrefixTree.from_lengths([129], [[300, 300]])  # the prompt's second part is one token
    assert plan_range(tree, [0, 128, 384, tree.padded_length], 0) is None
    plans = [plan_range(tree, [0, 256, tree.padded_length], rank) for rank in range(2)]
    assert [(plan.received, plan.sent) for plan in plans] == [([], [0, 1]), ([0, 1], [])]


def test_ranges_of_a_cached_prompt_keep_the_state_after_its_last_token():
    prompt = PrefixTree.from_lengths([300], [[1]])
    plans = [plan_range(padded_to(prompt, 4), [0, 128, 256, 384, 512], n, keeps_state=True) for n in range(4)]
    assert [plan.final for plan in plans] == [None, None, 2, None]


@pytest.mark.distributed
def test_context_parallel_of_recurrent_layers():
    names = ["qwen3_5", "qwen3_5 checkpointing", "qwen3_5 lora", "mamba2 checkpointing", "lfm2"]
    cases = [(name, budget) for name in names for budget in (WHOLE, BUDGET)]
    assert_equal_to_one_rank(2, [*cases, ("mamba2 checkpointing", *reversed(ONE_OVER))])
    assert_equal_to_one_rank(4, [("qwen3_5", WHOLE), ("bamba", BUDGET), ("mamba2 checkpointing", WHOLE)])


def entropy_update(rank: int, group: bool) -> dict[str, Tensor]:
    """Return log-probabilities, entropies and gradients of a loss of both, on top of earlier gradients."""
    if group:
        dist.init_process_group("gloo")
    model, rollouts = make_model("torchtune:llama3_2"), make_rollouts()
    weights = loss_weights(rollouts)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    arguments = {"max_tokens": WHOLE, "return_entropy": True, "entropy_grad": True, "temperature": 0.7}
    arguments |= {"context_parallel": dist.group.WORLD} if group else {}
    for batch, logprobs, entropies in packed_logprobs(model, rollouts, **arguments):
        (logprobs * weights[batch.indices] + entropies * weights[batch.indices].flip(0)).sum().backward()
    with torch.no_grad():
        ((_, scored, _),) = packed_logprobs(model, rollouts, **arguments)
        ((_, by_frozen, _),) = packed_logprobs(model.requires_grad_(False), rollouts, **arguments)
    assert torch.equal(scored, logprobs) and torch.equal(by_frozen, logprobs)
    return {"logprobs": logprobs.detach(), "entropies": entropies.detach()} | gradients(model)


@pytest.mark.distributed
def test_context_parallel_entropies_and_gradient_accumulation():
    expected = entropy_update(0, False)
    for found in run_processes(2, entropy_update, True):
        assert largest_error(found, expected) < 1e-12


def fsdp_update(rank: int, name: str, sharded: tuple[int, ...]) -> dict[str, Tensor]:
    """Return an update of two data ranks, of which each is two context ranks."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    model, rollouts = make_model(name), make_rollouts()
    flat = mesh["data", "context"]._flatten("all") if sharded == (0, 1) else mesh["data"]
    for layer in integration_for(model).layers(model).values():
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    data = mesh.get_local_rank("data")
    batches = [batch for batch in pack(rollouts, BUDGET, world_size=2) if batch.rank == data]
    update = packed_update(model, rollouts, batches, scale=2.0, context_parallel=mesh["context"])
    dist.all_reduce(update["logprobs"], group=mesh.get_group("data"))
    found = {key: x.full_tensor() if key != "logprobs" else x for key, x in update.items()}
    dist.destroy_process_group()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["torchtune:llama3_2", "qwen2 checkpointing"])
def test_context_parallel_with_fsdp_averages_over_data_ranks_only(name):
    expected = packed_update(make_model(name), make_rollouts(), max_tokens=WHOLE)
    for found in run_processes(4, fsdp_update, name, (0, 1)):
        assert largest_error(found, expected) < 1e-12


@pytest.mark.distributed
def test_context_parallel_fsdp_over_other_ranks_raises():
    with pytest.raises(ValueError, match="a mesh that contains the ranks of context_parallel"):
        run_processes(4, fsdp_update, "qwen2", (0,))


def run_snippet(rank: int, page: str, whole_step: bool = False) -> dict[str, Tensor]:
    """Return the gradients of a page's snippet; with `whole_step`, every rank computes the whole step."""
    names: dict[str, Any] = {}
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    (snippet,) = (snippet for snippet in snippets if "init_process_group" in snippet)
    if whole_step:
        changed = snippet.replace("(model, batches)", "(model, rollouts, max_tokens=16_384)")
        changed = changed.replace("(loss * world_size)", "loss")
        assert changed.count("max_tokens=16_384") == changed.count("loss.backward()") == 1
        snippet = changed
    exec(snippet, names)
    found = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in gradients(names["model"]).items()}
    dist.destroy_process_group()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("page", ["own_loop.md", "scaling.md"])
def test_snippet_of_the_documentation_has_the_gradients_of_one_rank(page):
    (expected,) = run_processes(1, run_snippet, page)
    for found in run_processes(2, run_snippet, page):
        assert largest_error(found, expected) < 1e-4  # in float32


@pytest.mark.distributed
def test_whole_step_on_every_fsdp_rank_needs_no_factor():
    (expected,) = run_processes(1, run_snippet, "own_loop.md")
    for found in run_processes(2, run_snippet, "own_loop.md", True):
        assert largest_error(found, expected) < 1e-4  # in float32


# Communication and memory


def communication(rank: int, checkpointing: bool) -> dict[str, int]:
    """Return how many elements go through each collective in one update."""
    dist.init_process_group("gloo")
    counts: dict[str, int] = {}

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(out: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            parts = out if isinstance(out, list) else given
            counts[name] = counts.get(name, 0) + sum(part.numel() for part in parts)
            return original(out, given, *args, **kwargs)

        return call

    dist.all_gather, dist.reduce_scatter = counting("all_gather"), counting("reduce_scatter")
    model = make_model("torchtune:llama3_2" + " checkpointing" * checkpointing)
    packed_update(model, make_rollouts(), max_tokens=WHOLE, context_parallel=dist.group.WORLD)
    shard = ContextShard(pack(make_rollouts(), WHOLE)[0].tree, dist.group.WORLD)
    lengths = [b - a for a, b in pairwise(shard.borders)]
    widest = max(lengths[0] + lengths[3], lengths[1] + lengths[2])
    dist.destroy_process_group()
    return counts | {"tokens": 2 * widest}


@pytest.mark.distributed
@pytest.mark.parametrize("checkpointing", [False, True])
def test_context_parallel_gathers_keys_and_values_once_per_layer(checkpointing):
    for found in run_processes(2, communication, checkpointing):
        per_layer = found["tokens"] * 2 * 2 * 8  # keys and values, two heads of 8
        assert found["reduce_scatter"] == 2 * per_layer
        assert found["all_gather"] == 2 * per_layer * (1 + checkpointing)


def events_of_a_layer(rank: int, max_tokens: int) -> list[str]:
    """Return the order in which one layer's update starts and awaits collectives and computes its projections."""
    dist.init_process_group("gloo")
    events: list[str] = []

    class Work:
        def __init__(self, name: str, work: Any) -> None:
            self.name, self.work = name, work

        def wait(self) -> None:
            events.append(f"wait for {self.name}")
            self.work.wait()

    def recording(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(f"start {name}")
            return Work(name, original(*args, **kwargs))

        return call

    dist.all_gather, dist.reduce_scatter = recording("all_gather"), recording("reduce_scatter")
    model = make_model("torchtune:llama3_2")
    attn = model.layers[1].attn
    for name in ("q_proj", "k_proj"):
        proj = getattr(attn, name)
        proj.register_forward_hook(lambda *_, name=name: events.append(name))
        proj.weight.register_hook(lambda _, name=name: events.append(f"gradient of {name}"))
    packed_update(model, make_rollouts(), max_tokens=max_tokens, context_parallel=dist.group.WORLD)
    dist.destroy_process_group()
    return events


@pytest.mark.distributed
def test_context_parallel_communicates_while_queries_are_projected():
    forward = ["k_proj", "start all_gather", "q_proj", "wait for all_gather"]
    backward = ["start reduce_scatter", "gradient of q_proj", "wait for reduce_scatter", "gradient of k_proj"]
    for events in run_processes(2, events_of_a_layer, WHOLE):
        layer = events[events.index("k_proj") :]
        assert layer[:8] == [*forward, *backward]


def saved_elements(rank: int, size: int) -> int:
    """Return the elements that layers save for their backward, each storage counted once."""
    if size > 1:
        dist.init_process_group("gloo")
    model, storages = make_model("torchtune:llama3_2 checkpointing"), {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    options = {"context_parallel": dist.group.WORLD} if size > 1 else {}
    rollouts = make_rollouts()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in packed_logprobs(
            model, replace(rollouts, loss_mask=rollouts.loss_mask & False), max_tokens=WHOLE, **options
        ):
            pass
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(x.numel() for key, x in storages.items() if key not in weights and x.is_floating_point())


@pytest.mark.distributed
def test_context_parallel_saves_a_part_of_the_activations():
    whole = saved_elements(0, 1)
    for size in (2, 4):
        for found in run_processes(size, saved_elements, size):
            assert found < 1.1 * whole / size + 0.1 * whole


# Misuse and faults


def other_rollouts(rank: int) -> None:
    dist.init_process_group("gloo")
    rollouts = make_rollouts().select(range(6 - rank))
    next(iter(packed_logprobs(make_model("qwen2"), rollouts, max_tokens=WHOLE, context_parallel=dist.group.WORLD)))


def move_mask(rank: int) -> None:
    dist.init_process_group("gloo")
    mask = ShardBlockMask(ContextShard(PrefixTree.from_lengths([300], [[20]]), dist.group.WORLD))
    assert mask.to("cpu") is mask
    mask.to("meta")


@pytest.mark.distributed
def test_mask_of_several_ranks_on_another_device_raises():
    with pytest.raises(ValueError, match="ShardBlockMask must stay on cpu, that of its ranks, got meta"):
        run_processes(1, move_mask)


@pytest.mark.distributed
def test_context_parallel_ranks_with_other_rollouts_raise():
    with pytest.raises(ValueError, match="all ranks of context_parallel must have the same rollouts"):
        run_processes(2, other_rollouts)


def other_weights(rank: int) -> None:
    dist.init_process_group("gloo")
    model = hf.tiny_model("qwen2")
    torch.manual_seed(rank)
    model = flexpg.enable(hf.peft.get_peft_model(model, hf.peft.LoraConfig(target_modules=["q_proj"])))
    next(iter(packed_logprobs(model, make_rollouts(), max_tokens=WHOLE, context_parallel=dist.group.WORLD)))


@pytest.mark.distributed
def test_context_parallel_ranks_with_other_lora_weights_raise():
    with pytest.raises(ValueError, match=r"must have the same weights, .* use one seed on all ranks"):
        run_processes(2, other_weights)


def broken_loop(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    model, rollouts = make_model("qwen2"), make_rollouts()
    before = torch.ones_like(next(model.parameters()))
    next(model.parameters()).grad = before.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, logprobs in packed_logprobs(model, rollouts, max_tokens=BUDGET, context_parallel=dist.group.WORLD):
            logprobs.sum().backward()
            break
    dist.destroy_process_group()
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


@pytest.mark.distributed
def test_context_parallel_loop_that_is_left_warns():
    for messages in run_processes(2, broken_loop):
        assert any("gradients are not summed over context_parallel" in message for message in messages)


def dying_rank(rank: int) -> None:
    dist.init_process_group("gloo")
    model, rollouts = make_model("qwen2"), make_rollouts()
    for _, logprobs in packed_logprobs(model, rollouts, max_tokens=WHOLE, context_parallel=dist.group.WORLD):
        if rank == 1:
            os._exit(1)
        logprobs.sum().backward()


@pytest.mark.distributed
def test_context_parallel_rank_that_dies_ends_the_others_within_a_minute():
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        run_processes(2, dying_rank)
    assert time.monotonic() - started < 60
