"""The loop over packed_logprobs: values and gradients of the baseline for any token budget, and what it refuses.

Every model of the matrix is compared in test_matrix.py; here are budgets, ranks and what the body of the loop may do.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import hf_models as hf
import pytest
import torch
import torch.distributed as dist
from baseline import baseline_hidden, baseline_logprobs, in_float64, relative_error, tiny_model
from cases import largest_error, tokens
from processes import run_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

import flexpg
from flexpg import Rollouts, pack, packed_logprobs, self_check
from flexpg.integrations import integration_for
from flexpg.micro_batches import by_cache
from flexpg.verify import baseline_logprobs as batched_baseline_logprobs

WHOLE, OVERSIZED = 1000, 65  # token budgets: one micro-batch; several, of which some share a cached prompt


def make_rollouts(prompt_len: int = 40) -> Rollouts:
    """Return three groups; some completions begin alike, one begins another, one is a single token, some have tools."""
    rng = random.Random(prompt_len)

    def draw(length: int) -> list[int]:
        return [rng.randrange(50) for _ in range(length)]

    first = [draw(rng.randint(5, 20)) for _ in range(4)]
    completions = [[*first, [*first[0][:2], 3, 4], first[1][:1], [5]], [draw(9), draw(3)], [draw(8)]]
    rewards = [[1.0] * len(group) for group in completions]
    rollouts = Rollouts.from_groups([draw(prompt_len), draw(12), draw(20)], completions, rewards)
    is_tool = torch.rand(rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    return replace(rollouts, loss_mask=rollouts.completion_mask & ~is_tool)


def make_model(name: str) -> tuple[nn.Module, nn.Module]:
    """Return an enabled float64 model, and the same for the baseline."""
    kind, _, option = name.partition("_")
    if kind == "torchtune":
        model = in_float64(tiny_model("llama3_2_lora" if option == "lora" else "llama3_2"))
        for path, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in path or option != "lora")
        model.layers[0].attn.k_proj.requires_grad_(option != "lora")  # the prompt's first keys have no gradient
        return flexpg.enable(model), model
    # With a sliding window of 7 tokens and tied weights.
    shared, baseline = hf.model_pair("gemma3_vl" if option == "composite" else "qwen2")
    if option == "lora":
        shared, baseline = hf.with_lora(shared), hf.with_lora(baseline)
    return hf.in_float64(shared), hf.in_float64(baseline)


def loss_weights(rollouts: Rollouts) -> Tensor:
    """Return [N, C] weights that differ for every token, so that swapped tokens show."""
    return torch.randn(rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def baseline_update(model: nn.Module, rollouts: Rollouts) -> dict[str, Tensor]:
    """Return log-probabilities, and the gradients of their weighted sum, by name."""
    model.zero_grad()
    score = baseline_logprobs if isinstance(model, TransformerDecoder) else hf.baseline_logprobs
    sequences = [sequence.tolist() for sequence in rollouts.sequences]
    logprobs = score(model, sequences, rollouts.prompt_lens.tolist()) * rollouts.loss_mask
    (logprobs * loss_weights(rollouts)).sum().backward()
    return {"logprobs": logprobs.detach()} | gradients(model)


def packed_update(model: nn.Module, rollouts: Rollouts, batches=None, scale=1.0, **options) -> dict[str, Tensor]:
    """Return the same by the loop over packed_logprobs."""
    model.zero_grad()
    weights, table = loss_weights(rollouts), torch.zeros(rollouts.loss_mask.shape, dtype=torch.float64)
    for batch, logprobs in packed_logprobs(model, rollouts if batches is None else batches, **options):
        width = logprobs.shape[1]
        (logprobs * weights[batch.indices, :width]).sum().mul(scale).backward()
        table[batch.indices, :width] += logprobs.detach()  # 0 for idle micro-batches
    return {"logprobs": table} | gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    names = {p: name.replace("_checkpoint_wrapped_module.", "") for name, p in model.named_parameters()}
    return {name: p.grad.clone() for p, name in names.items() if p.grad is not None}


def checkpoint_layers(model: nn.Module) -> None:
    if isinstance(model, TransformerDecoder):
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


# Values and gradients


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("max_tokens", [WHOLE, OVERSIZED])
@pytest.mark.parametrize("name", ["torchtune", "torchtune_lora", "transformers", "transformers_lora"])
def test_packed_logprobs_float64_matches_baseline(name, max_tokens, checkpointing):
    (model, baseline), rollouts = make_model(name), make_rollouts()
    expected = baseline_update(baseline, rollouts)
    if checkpointing:
        checkpoint_layers(model)
    assert largest_error(packed_update(model, rollouts, max_tokens=max_tokens), expected) < 1e-12
    sizes = [len(series) for series in by_cache(pack(rollouts, max_tokens))]
    assert max(sizes) == (3 if max_tokens == OVERSIZED else 1)


@pytest.mark.parametrize("prompt_len", [1, 127, 128, 129])
def test_packed_logprobs_cached_prompt_at_a_block_edge_matches_baseline(prompt_len):
    (model, baseline), rollouts = make_model("torchtune"), make_rollouts(prompt_len)
    found = packed_update(model, rollouts, max_tokens=prompt_len + 30)
    assert largest_error(found, baseline_update(baseline, rollouts)) < 1e-12


def test_packed_logprobs_accepts_micro_batches():
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    expected = packed_update(model, rollouts, max_tokens=OVERSIZED)
    for batches in (pack(rollouts, OVERSIZED), (batch for batch in pack(rollouts, OVERSIZED))):
        found = packed_update(model, rollouts, batches)
        assert all(map(torch.equal, found.values(), expected.values()))


def test_packed_logprobs_micro_batches_of_several_ranks_raise():
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    batches = pack(rollouts, OVERSIZED, world_size=2)
    with pytest.raises(ValueError, match=r"micro-batches must be those of one rank, got ranks \[0, 1\]"):
        packed_logprobs(model, batches)


@pytest.mark.parametrize("max_tokens", [WHOLE, OVERSIZED])
def test_packed_logprobs_return_entropy_and_temperature(max_tokens):
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    scored = packed_logprobs(model, rollouts, max_tokens=max_tokens, temperature=0.7, return_entropy=True)
    for batch, logprobs, entropies in scored:
        assert logprobs.requires_grad and not entropies.requires_grad and entropies.shape == logprobs.shape
        for n, step in batch.loss_mask.nonzero().tolist():
            tokens, parent = batch.rollouts.sequences[n].tolist(), int(batch.rollouts.prompt_lens[n]) + step - 1
            scores = (model.output(baseline_hidden(model, tokens))[parent] / 0.7).log_softmax(-1)
            assert abs(logprobs[n, step] - scores[tokens[parent + 1]]) < 1e-12
            assert abs(entropies[n, step] + (scores.exp() * scores).sum()) < 1e-12
        assert not logprobs[~batch.loss_mask].any() and not entropies[~batch.loss_mask].any()


@pytest.mark.parametrize("max_tokens", [WHOLE, OVERSIZED])
@pytest.mark.parametrize("name", ["torchtune", "transformers_lora"])
def test_packed_logprobs_entropy_gradient_matches_baseline(name, max_tokens):
    (model, baseline), rollouts = make_model(name), make_rollouts()
    weights, coef, total = loss_weights(rollouts), 0.3, rollouts.num_loss_tokens
    baseline.zero_grad()
    for n, sequence in enumerate(rollouts.sequences):
        is_torchtune = isinstance(baseline, TransformerDecoder)
        tokens, steps = sequence.tolist(), rollouts.loss_mask[n].nonzero().flatten()
        logits = (
            baseline.output(baseline_hidden(baseline, tokens)) if is_torchtune else baseline(sequence[None]).logits[0]
        )
        at = rollouts.prompt_lens[n] + steps
        scores = logits[at - 1].log_softmax(-1)  # [steps, V]
        chosen = scores.gather(-1, sequence[at, None])[:, 0]
        ((chosen * weights[n, steps]).sum() - coef * torch.special.entr(scores.exp()).sum() / total).backward()
    expected = gradients(baseline)
    model.zero_grad()
    for batch, *scored in packed_logprobs(
        model, rollouts, max_tokens=max_tokens, return_entropy=True, entropy_grad=True
    ):
        logprobs, entropies = scored
        loss = (logprobs * weights[batch.indices, : logprobs.shape[1]]).sum() - coef * entropies.sum() / total
        loss.backward()
    assert largest_error(gradients(model), expected) < 1e-12


def test_packed_logprobs_entropy_backward_after_the_loop_moved_on_raises():
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    options = {"max_tokens": OVERSIZED, "return_entropy": True, "entropy_grad": True}
    for entropies in [entropies for *_, entropies in packed_logprobs(model, rollouts, **options)]:
        with pytest.raises(RuntimeError, match=r"backward\(\) must be called inside the loop over packed_logprobs"):
            entropies.sum().backward()


@pytest.mark.parametrize("max_tokens", [WHOLE, OVERSIZED])
@pytest.mark.parametrize("name", ["torchtune", "transformers"])
def test_packed_logprobs_no_grad_scores_the_same(name, max_tokens):
    (model, _), rollouts = make_model(name), make_rollouts()
    expected = packed_update(model, rollouts, max_tokens=max_tokens)["logprobs"]
    with torch.no_grad():
        for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=max_tokens):
            assert not logprobs.requires_grad
            assert torch.equal(logprobs, expected[batch.indices, : logprobs.shape[1]])


def test_packed_logprobs_autocast_dtype_is_within_error_budget():
    model, rollouts = flexpg.enable(tiny_model("llama3_2")), make_rollouts()
    exact = baseline_update(in_float64(tiny_model("llama3_2")), rollouts)["logprobs"]
    with torch.autocast("cpu", torch.bfloat16):
        baseline = batched_baseline_logprobs(model, rollouts)[0]
    found = packed_update(model, rollouts, max_tokens=OVERSIZED, autocast_dtype=torch.bfloat16)["logprobs"]
    assert 1e-4 < relative_error(found, exact) < 1.5 * relative_error(baseline, exact)
    assert relative_error(packed_update(model, rollouts, max_tokens=OVERSIZED)["logprobs"], exact) < 1e-6


# The body of the loop


@pytest.mark.parametrize("max_tokens", [WHOLE, OVERSIZED])
def test_packed_logprobs_backward_after_the_loop_moved_on_raises(max_tokens):
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    scored = [logprobs for _, logprobs in packed_logprobs(model, rollouts, max_tokens=max_tokens)]
    for logprobs in scored:
        with pytest.raises(RuntimeError, match=r"backward\(\) must be called inside the loop over packed_logprobs"):
            logprobs.sum().backward()
    assert not any(grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("skipped", [[0], [1, 2], [0, 1, 2]])
def test_packed_logprobs_skipped_backwards_leave_their_rollouts_out(skipped):
    (model, baseline), rollouts = make_model("torchtune"), make_rollouts()
    weights, rest = loss_weights(rollouts), []
    for number, (batch, logprobs) in enumerate(packed_logprobs(model, rollouts, max_tokens=OVERSIZED)):
        if number not in skipped:
            rest += batch.indices.tolist()
            (logprobs * weights[batch.indices, : logprobs.shape[1]]).sum().backward()
    found = gradients(model)
    chosen = torch.zeros_like(rollouts.loss_mask).index_fill(0, torch.tensor(rest), True)
    expected = baseline_update(baseline, replace(rollouts, loss_mask=rollouts.loss_mask & chosen))
    assert largest_error({"logprobs": expected["logprobs"]} | found, expected) < 1e-12


def test_packed_logprobs_break_inside_an_oversized_group_warns():
    (model, _), rollouts = make_model("torchtune"), make_rollouts()

    def leave_after(count: int, train: bool) -> None:
        for number, (_, logprobs) in enumerate(packed_logprobs(model, rollouts, max_tokens=OVERSIZED), 1):
            if train:
                logprobs.sum().backward()
            if number == count:
                break

    with pytest.warns(RuntimeWarning, match="ended inside an oversized group: its prompt has no gradient"):
        leave_after(2, train=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leave_after(2, train=False)
        leave_after(4, train=True)  # the first complete micro-batch after the oversized group


def test_packed_logprobs_autograd_grad_of_an_oversized_group_raises():
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    for update in (
        lambda logprobs: torch.autograd.grad(logprobs.sum(), [*model.parameters()], allow_unused=True),
        lambda logprobs: logprobs.sum().backward(inputs=[*model.parameters()]),
    ):
        with pytest.raises(RuntimeError, match="the prompt of an oversized group received no gradient"):
            for _, logprobs in packed_logprobs(model, rollouts, max_tokens=OVERSIZED):
                update(logprobs)
        for _, logprobs in packed_logprobs(model, rollouts, max_tokens=WHOLE):
            update(logprobs)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_packed_logprobs_optimizer_step_inside_an_oversized_group_raises():
    (model, _), rollouts = make_model("transformers_lora"), make_rollouts()
    checkpoint_layers(model)  # the backward would recompute the prompt with the new weights
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(RuntimeError, match=r"parameters changed .*; call optimizer.step\(\) after the loop"):
        for _, logprobs in packed_logprobs(model, rollouts, max_tokens=OVERSIZED):
            logprobs.sum().backward()
            optimizer.step()
    for _, logprobs in packed_logprobs(model, rollouts, max_tokens=WHOLE):
        logprobs.sum().backward()
        optimizer.step()


def test_packed_logprobs_arguments_that_do_not_fit_raise():
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    with pytest.raises(ValueError, match="which are packed already, got list and max_tokens="):
        packed_logprobs(model, pack(rollouts, WHOLE), max_tokens=WHOLE)
    with pytest.raises(ValueError, match="max_tokens must be given with Rollouts"):
        packed_logprobs(model, rollouts)
    with pytest.raises(ValueError, match="max_tokens must hold every rollout, got 30 for rollout 0"):
        packed_logprobs(model, rollouts, max_tokens=30)
    with pytest.raises(TypeError, match=r"got Sequential; pass the model without torch\.compile"):
        next(packed_logprobs(nn.Sequential(model), rollouts, max_tokens=WHOLE))


# Work and memory


@pytest.mark.parametrize("name", ["torchtune", "transformers"])
def test_forward_leaves_padding_out_unless_layers_are_compiled(name):
    model, _ = make_model(name)
    integration, lengths = integration_for(model), []
    layer = next(iter(integration.layers(model).values()))
    layer.register_forward_hook(lambda layer, args, out: lengths.append(out[0].flatten(0, -2).shape[0]))
    tree = make_rollouts().tree
    for _ in range(2):
        assert integration.forward(model, tree).shape[1] == tree.padded_length
        layer.compile(backend="eager")
    assert lengths == [tree.num_tokens, tree.padded_length] and tree.num_tokens < tree.padded_length


def saved_bytes(update) -> int:
    """Return the most bytes that are saved for a backward at a time."""
    now = peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, peak
            self.tensor = tensor
            now += tensor.nbytes
            peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        update()
    return peak


def test_packed_logprobs_oversized_group_saves_prompt_and_one_micro_batch():
    model, completions = tiny_model("llama3_2"), [tokens(80, n) for n in range(12)]
    rollouts = Rollouts.from_groups([tokens(100, 99)], [completions], [[1.0] * 12])
    whole = saved_bytes(lambda: packed_update(model, rollouts, max_tokens=2000))
    parts = saved_bytes(lambda: packed_update(model, rollouts, max_tokens=100 + 3 * 80))
    one = saved_bytes(lambda: packed_update(model, rollouts.select(range(3)), max_tokens=2000))
    assert parts < 1.6 * one < 0.6 * whole


# Ranks


@pytest.mark.parametrize("name", ["torchtune", "torchtune_lora", "transformers"])
def test_packed_logprobs_idle_micro_batch_adds_exactly_zero(name):
    (model, _), rollouts = make_model(name), make_rollouts().select([0])
    busy, idle = pack(rollouts, WHOLE, world_size=2)
    assert idle.is_idle and not busy.is_idle
    found = gradients_after(model, [idle])
    assert found and not any(grad.any() for grad in found.values())
    assert all(grad.any() for grad in gradients_after(model, [busy]).values())


def gradients_after(model: nn.Module, batches: list[flexpg.MicroBatch]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch, logprobs in packed_logprobs(model, batches):
        old, ref, advantages = logprobs.detach() - 0.1, logprobs.detach() + 0.3, torch.ones(len(batch.indices))
        options = {"old_logprobs": old, "ref_logprobs": ref, "beta": 0.1, "total_tokens": 7}
        flexpg.grpo_loss(logprobs, advantages, batch.loss_mask, **options).backward()
    return gradients(model)


def test_packed_logprobs_rank_without_cached_prompt_encodes_one_token():
    # FSDP needs a forward where other ranks encode a cached prompt; its gradient is zero.
    (model, _), rollouts = make_model("torchtune"), make_rollouts()
    batches = [replace(batch, cache_id=0) for batch in pack(rollouts.select([7, 9]), 30)]
    lengths = []
    model.tok_embeddings.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    expected = gradients_after(model, pack(rollouts.select([7, 9]), 30))
    found = gradients_after(model, batches)
    assert len(batches) == 2 and len(by_cache(batches)) == 1
    assert lengths[2] == 256 and lengths[3:] == lengths[:2]  # a cached prompt keeps its padding
    assert largest_error(found, expected) < 1e-14


def fsdp_update(rank: int, name: str) -> list[dict[str, Tensor]]:
    """Return this rank's view of two updates of a sharded model: whole gradients, and all log-probabilities."""
    dist.init_process_group("gloo")
    (model, _), rollouts = make_model(name.removesuffix("_base")), make_rollouts()
    if name == "transformers":
        checkpoint_layers(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in integration_for(model).layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model.get_base_model() if name.endswith("_base") else model, mesh=mesh)
    batches = [batch for batch in pack(rollouts, OVERSIZED, world_size=2) if batch.rank == rank]
    assert len(by_cache(batches)[0]) > 1
    updates = []
    for _ in range(2):
        update = packed_update(model, rollouts, batches, scale=2.0)  # FSDP averages over two ranks
        dist.all_reduce(update["logprobs"])
        updates.append({name: x.full_tensor() if name != "logprobs" else x for name, x in update.items()})
    with torch.no_grad():
        for batch, logprobs in packed_logprobs(model, batches):
            expected = updates[0]["logprobs"][batch.indices, : logprobs.shape[1]]
            assert torch.equal(logprobs[batch.loss_mask], expected[batch.loss_mask])  # idle micro-batches have none
    self_check(model, batches)
    after = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(after[name], updates[1][name]) for name in after)  # self_check restores gradients
    dist.destroy_process_group()
    return updates


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["transformers", "transformers_lora", "transformers_lora_base", "transformers_composite", "torchtune"]
)
def test_packed_logprobs_fsdp_matches_single_process(name):
    expected = baseline_update(make_model(name.removesuffix("_base"))[1], make_rollouts())
    for updates in run_processes(2, fsdp_update, name):
        for update in updates:
            assert largest_error(update, expected) < 1e-12


def test_packed_logprobs_entropy_grad_without_return_entropy_raises():
    model, _ = make_model("torchtune")
    with pytest.raises(ValueError, match="return_entropy must be True with entropy_grad=True"):
        packed_logprobs(model, make_rollouts(), max_tokens=OVERSIZED, entropy_grad=True)
