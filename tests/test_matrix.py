"""An update with shared prefixes equals the baseline's, for every pair of model, tree, backend, loss and other options.

Not every combination runs: the settings are chosen so that every two values that can be combined occur together. The
seed of a case, which is its number, draws its tokens, weights and advantages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from typing import NamedTuple, get_args

import hf_models as hf
import pytest
import torch
from baseline import baseline_logprobs, in_float64, relative_error, tiny_model
from cases import MAX_TOKENS, TREES, VOCAB, float32_floor, rollouts_of
from processes import run_processes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

import flexpg
from flexpg import Rollouts, grpo_loss, packed_logprobs
from flexpg.backends import flex as flex_backend
from flexpg.backends.dispatch import attention
from flexpg.integrations import torchtune
from flexpg.integrations.transformers import attention as transformers_attention
from flexpg.losses import BY_TOKENS, LossType
from flexpg.masks import TreeBlockMask

# Settings: a choice of values that has every pair.

TORCHTUNE = ["llama3_2", "llama3", "qwen2", "mistral", "phi3", "gemma2", "llama3_2_lora"]
MODELS = [f"torchtune.{name}" for name in TORCHTUNE] + [f"transformers.{name}" for name in hf.CONFIGS]
PASSES = ["old", "reference", "policy"]
SHARED_PASSES = ["_".join(some) or "nothing" for n in range(4) for some in combinations(PASSES, n)]
HEADS = {"mha": 4, "gqa": 2, "mqa": 1}  # key/value heads for 4 query heads


class Setting(NamedTuple):
    """The values of one case; no two factors have a value in common."""

    model: str
    tree: str
    shared: str
    backend: str
    dtype: str
    heads: str
    output_layer: str
    activations: str
    loss_type: str
    level: str
    loss_mask: str


FACTORS = Setting(
    model=MODELS,
    tree=list(TREES),
    shared=[f"shares_{passes}" for passes in SHARED_PASSES],
    backend=["dense", "split", "auto", "flex"],
    dtype=["float64", "float32"],
    heads=list(HEADS),
    output_layer=["tied", "untied"],
    activations=["checkpointed", "stored"],
    loss_type=list(get_args(LossType)),
    level=["token", "sequence"],
    loss_mask=["all_tokens", "some_tokens"],
)

# Models with softcaps, or with windows or chunks that hide something.
NOT_PLAIN = {"torchtune.gemma2"}
NOT_PLAIN |= {f"transformers.{name}" for name in ("qwen2", "gemma2", "gemma3", "mistral", "mixtral")}
NOT_PLAIN |= {f"transformers.{name}" for name in (*hf.SINK_MODELS, "llama4")}
ALWAYS_TIED = {"torchtune.gemma2"}
NEVER_TIED = {"torchtune.llama3", "torchtune.mistral", "torchtune.phi3"}
# On a CPU flex has no float64 and no backward. Each of the others would cost seconds of compilation: other numbers of
# heads, granite's scale, and windows, softcaps and prefix caches, which test_backends.py and test_prefix_cache.py test.
# Importing another transformers family makes torch compile flex again (it registers outputs as pytrees), and torch 2.13
# then writes C++ that does not compile if the length is new too (it takes "ks16" for "ks1" and a 6), hence one length.
NOT_FLEX = NOT_PLAIN | {"float64", "checkpointed", "mha", "mqa", "prefix_cache"}
NOT_FLEX |= {"transformers.gpt2", "transformers.granite", "257_tokens"}
EXCLUDED = {
    "flex": NOT_FLEX,
    "split": NOT_PLAIN,
    "untied": ALWAYS_TIED,
    "tied": NEVER_TIED,
    # Its weights are exponentials of sums over sequences, which amplify rounding: two float32 errors differ by chance.
    "vespo": {"sequence", "float32", "flex"},
    "transformers.gpt2": {"gqa", "mqa"},  # it has no grouped heads
    "transformers.mimo_v2_flash": {"mha"},  # its sliding layers have twice as many key/value heads
}
PREFERRED = {"float64", "shares_old_reference_policy"}  # chosen where no pair is missing: the strictest, in least time


def can_be_combined(value: str, other: str) -> bool:
    return other not in EXCLUDED.get(value, ()) and value not in EXCLUDED.get(other, ())


def possible_pairs() -> list[tuple[str, str]]:
    pairs = (pair for values, others in combinations(FACTORS, 2) for pair in product(values, others))
    return [pair for pair in pairs if can_be_combined(*pair)]


def covering_settings(seed: int) -> list[Setting]:
    """Choose few settings with every pair: each begins with a missing pair and adds as many others as it can."""
    rng, settings = random.Random(seed), []
    order = sorted(possible_pairs(), key=lambda pair: (pair[1] not in FACTORS.tree, rng.random()))
    missing = dict.fromkeys(map(frozenset, order))  # models with trees first, of which there are most
    while missing:
        chosen = set(next(iter(missing)))
        for values in rng.sample(FACTORS, len(FACTORS)):
            if chosen.isdisjoint(values):
                fitting = [value for value in values if all(can_be_combined(value, other) for other in chosen)]
                ranks = [
                    (sum(frozenset((value, other)) in missing for other in chosen), value in PREFERRED, rng.random())
                    for value in fitting
                ]
                chosen.add(fitting[ranks.index(max(ranks))])
        settings.append(Setting(*(next(value for value in values if value in chosen) for values in FACTORS)))
        for pair in combinations(settings[-1], 2):
            missing.pop(frozenset(pair), None)
    return settings


SETTINGS = covering_settings(seed=0)


def test_settings_cover_every_pair():
    covered = {frozenset(pair) for setting in SETTINGS for pair in combinations(setting, 2)}
    assert covered == set(map(frozenset, possible_pairs()))
    assert len({value for values in FACTORS for value in values}) == sum(map(len, FACTORS))
    exact = [setting for setting in SETTINGS if "policy" in setting.shared and setting.dtype == "float64"]
    assert {setting.model for setting in exact} == set(MODELS) and {setting.tree for setting in exact} == set(TREES)


# One update.


@dataclass(frozen=True)
class Step:
    """The rollouts of a case, whose rewards are its advantages, and the weights of each policy."""

    rollouts: Rollouts
    weights: dict[str, list[Tensor]]


class Update(NamedTuple):
    """The results of a case: log-probabilities [N, C] of each policy, the loss, and gradients (flex has none)."""

    logprobs: dict[str, Tensor]
    loss: Tensor
    gradients: list[Tensor]


def make_step(setting: Setting, seed: int) -> Step:
    generator = torch.Generator().manual_seed(seed)
    rollouts = rollouts_of(setting.tree, seed)
    if setting.loss_mask == "some_tokens":
        loss_mask = rollouts.loss_mask & (torch.rand(rollouts.loss_mask.shape, generator=generator) < 0.7)
        loss_mask[0, 0] = True
        rollouts = replace(rollouts, loss_mask=loss_mask)

    def moved(weights: list[Tensor], size: float) -> list[Tensor]:
        return [weight + size * torch.randn(weight.shape, generator=generator) for weight in weights]

    policy = moved(initial_weights(setting.model, setting.heads, setting.output_layer), 0.05)
    # The old policy is so far away that some ratios are clipped.
    return Step(rollouts, {"policy": policy, "old": moved(policy, 0.02), "reference": moved(policy, 0.1)})


@cache
def initial_weights(model: str, heads: str, output_layer: str) -> list[Tensor]:
    return [parameter.detach() for parameter in make_model(model, heads, output_layer, "float32").parameters()]


def make_model(model: str, heads: str, output_layer: str, dtype: str) -> nn.Module:
    framework, name = model.split(".")
    changes: dict = {} if model in ALWAYS_TIED | NEVER_TIED else {"tie_word_embeddings": output_layer == "tied"}
    if framework == "torchtune":
        made = tiny_model(name, **changes, num_kv_heads=HEADS[heads])
        made = in_float64(made) if dtype == "float64" else made
    else:
        changes |= {} if name == "gpt2" else {"num_key_value_heads": HEADS[heads]}
        changes |= hf.FLOAT64_EXPERTS if dtype == "float64" else {}
        made = hf.tiny_model(name, **changes)
        made = hf.in_float64(made) if dtype == "float64" else made
    for path, parameter in made.named_parameters():
        parameter.requires_grad_("lora" in path or not name.endswith("lora"))
    return made


baseline_model = cache(make_model)


def checkpoint_layers(model: nn.Module) -> None:
    if isinstance(model, TransformerDecoder):
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def score(model: nn.Module, rollouts: Rollouts, max_tokens: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over indices [n] and log-probabilities [n, C]: of micro-batches or, without a budget, of the baseline."""
    if max_tokens is not None:
        for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=max_tokens):
            yield batch.indices, logprobs
        return
    by_sequence = baseline_logprobs if isinstance(model, TransformerDecoder) else hf.baseline_logprobs
    sequences = [sequence.tolist() for sequence in rollouts.sequences]
    yield torch.arange(len(rollouts)), by_sequence(model, sequences, rollouts.prompt_lens.tolist())


def run_update(model: nn.Module, step: Step, setting: Setting, shared: Iterable[str]) -> Update:
    """Compute the log-probabilities of three policies, some with shared prefixes, and the loss and its gradients."""
    rollouts = step.rollouts
    mask, tables, loss = rollouts.loss_mask, {}, torch.zeros((), dtype=torch.float64)
    total = {"total_tokens": rollouts.num_loss_tokens} if setting.loss_type in BY_TOKENS else {}
    options = {"loss_type": setting.loss_type, "importance_sampling_level": setting.level, "beta": 0.1}
    options |= {"epsilon_high": 1.1} if setting.loss_type == "cispo" else {}
    options |= {"max_completion_length": 100, **(total or {"total_rollouts": len(rollouts)})}
    for name in PASSES:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), step.weights[name], strict=True):
                parameter.copy_(weight)
                parameter.grad = None
        tables[name] = torch.zeros(mask.shape, dtype=torch.float64)
        with torch.set_grad_enabled(name == "policy" and setting.backend != "flex"):
            for at, logprobs in score(model, rollouts, MAX_TOKENS.get(setting.tree, 400) if name in shared else None):
                own_mask = mask[at, : logprobs.shape[1]]
                tables[name][at, : logprobs.shape[1]] = logprobs.detach().where(own_mask, 0).double()
                if name == "policy":
                    old, ref = (tables[other][at, : logprobs.shape[1]].to(logprobs) for other in PASSES[:2])
                    advantages = rollouts.rewards[at]
                    own_loss = grpo_loss(logprobs, advantages, own_mask, **options, old_logprobs=old, ref_logprobs=ref)
                    loss += own_loss.detach()
                    if own_loss.requires_grad:
                        own_loss.backward()
    return Update(tables, loss, [x.grad for x in model.parameters() if x.grad is not None])


def flex(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, **options: float | None) -> Tensor:
    """Call flex with the padding that CPU forwards leave out, in one memory layout, so that it is compiled once."""
    padding = (0, 0, 0, mask.tree.padded_length - q.shape[2])
    q_k_v = (nn.functional.pad(x, padding).contiguous() for x in (q, k, v))
    return attention(*q_k_v, mask, **options, backend="flex")[:, :, : q.shape[2]]


@contextmanager
def attending(attend: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the attention of packed sequences in both integrations."""
    with pytest.MonkeyPatch.context() as patch:
        for integration in (torchtune, transformers_attention):
            patch.setattr(integration, "attention", attend)
        yield


def shared_update(setting: Setting, step: Step) -> Update:
    model = flexpg.enable(make_model(setting.model, setting.heads, setting.output_layer, setting.dtype))
    if setting.activations == "checkpointed":
        checkpoint_layers(model)
    with attending(flex if setting.backend == "flex" else partial(attention, backend=setting.backend)):
        return run_update(model, step, setting, setting.shared.split("_")[1:])


def baseline_update(setting: Setting, step: Step, dtype: str) -> Update:
    model = baseline_model(setting.model, setting.heads, setting.output_layer, dtype)
    return run_update(model, step, setting, shared=[])


# Equality.

# The softmax of Gemma2 and Granite SWA, routers and the RoPE of Cohere and Llama 4 compute in float32 in a float64
# model too.
FLOAT32_INSIDE = {"torchtune.gemma2", *(f"transformers.{name}" for name in ("gemma2", "cohere", *hf.EXPERT_MODELS))}
FLOAT32_INSIDE |= {f"transformers.{name}" for name in ("granite_swa", "mimo_v2_flash", "llama4")}


def errors(update: Update, truth: Update) -> dict[str, float]:
    """Return the errors of each policy's log-probabilities, of the loss, and of the worst parameter's gradient."""
    found = {name: relative_error(update.logprobs[name], truth.logprobs[name]) for name in PASSES}
    found["loss"] = (update.loss - truth.loss).abs().item()
    pairs = zip(update.gradients, truth.gradients, strict=True)
    return found | {"gradient": max((relative_error(*pair) for pair in pairs), default=0.0)}


def excessive_errors(setting: Setting, seed: int) -> dict[str, float]:
    step = make_step(setting, seed)
    truth = baseline_update(setting, step, "float64")
    found = errors(shared_update(setting, step), truth)
    if setting.dtype == "float64" and setting.model not in FLOAT32_INSIDE:
        budget = dict.fromkeys(found, 1e-12)
    else:
        baseline = errors(baseline_update(setting, step, "float32"), truth)
        budget = {name: 1.5 * error + float32_floor() for name, error in baseline.items()}
    return {name: error for name, error in found.items() if not error <= budget[name]}


@pytest.fixture(autouse=True, scope="module")
def fresh_flex():
    """Forget the lengths that other test files compiled flex for; see NOT_FLEX."""
    forget_compiled_flex()
    yield
    forget_compiled_flex()


def forget_compiled_flex() -> None:
    torch._dynamo.reset()
    flex_backend._compiled.cache_clear()


@pytest.mark.parametrize(
    ("seed", "setting"),
    [pytest.param(seed, setting, id="-".join([str(seed), *setting])) for seed, setting in enumerate(SETTINGS)],
)
def test_update_equals_baseline(seed, setting):
    assert not excessive_errors(setting, seed)


def some_cases() -> list[tuple[int, Setting]]:
    """Return one case of each framework and dtype, in which completions share a prompt in the pass with gradients."""
    found: dict[tuple[str, str], tuple[int, Setting]] = {}
    for seed, setting in enumerate(SETTINGS):
        is_branched = setting.tree in ("one_group", "groups", "system_prompt", "three_levels", "129_tokens")
        if is_branched and "policy" in setting.shared and setting.backend != "flex":
            found.setdefault((setting.model.split(".")[0], setting.dtype), (seed, setting))
    return list(found.values())


def shared_updates(rank: int, chosen: list[tuple[int, Setting]]) -> list[Update]:
    """Run updates in one of several processes."""
    return [shared_update(setting, make_step(setting, seed)) for seed, setting in chosen]


@pytest.mark.slow
def test_update_in_another_process_is_bitwise_identical():
    first = shared_updates(0, some_cases())
    assert len(first) == 4
    assert all(update.gradients for update in first)
    for again in (shared_updates(0, some_cases()), *run_processes(1, shared_updates, some_cases())):
        for tensors, others in zip(map(tree_leaves, first), map(tree_leaves, again), strict=True):
            assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("make", [partial(tiny_model, "llama3_2"), partial(hf.tiny_model, "llama")])
def test_changed_completion_leaves_other_rollouts_bitwise_identical(make):
    model, rollouts = flexpg.enable(make()), rollouts_of("groups", 0)
    changed = [(completion + 1) % VOCAB if n == 1 else completion for n, completion in enumerate(rollouts.completions)]
    before, after = (
        next(packed_logprobs(model, each, max_tokens=400))[1]
        for each in (rollouts, replace(rollouts, completions=changed))
    )
    others = torch.tensor([0, 2, 3])
    assert torch.equal(after[others], before[others])
    assert (after[1] - before[1])[rollouts.loss_mask[1]].abs().min() > 1e-3
