"""An update is the unshared loop's for every pair of what may differ in it: model, tree, backend, loss and the rest.

Not all combinations: a choice in which every two values that can stand together do. A case's seed, its number, draws
its tokens, weights and advantages.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from typing import NamedTuple

import pytest
import test_transformers as hf
import torch
from cases import TREES, Packed, packed
from processes import run_processes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing
from baseline import in_float64, relative_error, tiny_model, baseline_logprobs

from flexpg.backends import flex as flex_kernels
from flexpg.backends.dispatch import attention
from flexpg.integrations import torchtune, transformers
from flexpg.logprobs import token_logprobs
from flexpg.losses import grpo_loss, loss_normalizer
from flexpg.masks import TreeBlockMask, block_mask
from flexpg.tree import PrefixTree

# ---- every pair ------------------------------------------------------------------------------------------------------

TORCHTUNE = ["llama3_2", "llama3", "qwen2", "mistral", "phi3", "gemma2", "llama3_2_lora"]
MODELS = [f"torchtune {name}" for name in TORCHTUNE] + [f"transformers {name}" for name in hf.CONFIGS]
PASSES = ["old", "reference", "policy"]
SHARED_PASSES = ["+".join(some) or "nothing" for n in range(4) for some in combinations(PASSES, n)]
HEADS = {"a key per query head": 4, "a key per 2 query heads": 2, "a key for all": 1}


class Setting(NamedTuple):
    """What a case is made of, in words of which none stands for two things."""

    model: str
    tree: str
    shared: str
    backend: str
    dtype: str
    heads: str
    head: str
    activations: str
    loss_type: str
    level: str
    trained: str


FACTORS = Setting(
    model=MODELS,
    tree=list(TREES),
    shared=[f"shares {passes}" for passes in SHARED_PASSES],
    backend=["dense", "split", "auto", "flex"],
    dtype=["float64", "float32"],
    heads=list(HEADS),
    head=["tied", "untied"],
    activations=["checkpointed", "kept"],
    loss_type=["grpo", "bnpo", "dr_grpo", "dapo"],
    level=["token", "sequence"],
    trained=["all trained", "some trained"],
)

# Of windows that hide something, or softcaps.
NOT_PLAIN = {"torchtune gemma2"}
NOT_PLAIN |= {f"transformers {name}" for name in ("qwen2", "gemma2", "gemma3", "mistral", "mixtral")}
ALWAYS_TIED = {"torchtune gemma2"}
NEVER_TIED = {"torchtune llama3", "torchtune mistral", "torchtune phi3"}
FEWER_KEYS = {"a key per 2 query heads", "a key for all"}
# On a CPU flex has no float64 and no gradients. Of the rest, each of these costs seconds of compilation: other numbers
# of heads, granite's scale, and windows, softcaps and prefixes, which test_attention.py and test_prefix.py compare.
# Importing another transformers family makes torch compile flex anew (it registers outputs as pytrees), and torch 2.13
# then writes C++ that does not compile if the length is new too (it takes "ks16" for "ks1" and a 6): so one length.
NOT_FLEX = NOT_PLAIN | {"float64", "checkpointed", "a key per query head", "a key for all", "behind a prefix"}
NOT_FLEX |= {"transformers gpt2", "transformers granite", "257 tokens"}
APART = {
    "flex": NOT_FLEX,
    "split": NOT_PLAIN,
    "untied": ALWAYS_TIED,
    "tied": NEVER_TIED,
    "transformers gpt2": FEWER_KEYS,  # it has as many heads of keys as of queries
}
PREFERRED = {"float64", "shares old+reference+policy"}  # where no pair is missing: they say most, in the least time


def can_stand_together(value: str, other: str) -> bool:
    return other not in APART.get(value, ()) and value not in APART.get(other, ())


def possible_pairs() -> list[tuple[str, str]]:
    return [
        pair
        for values, others in combinations(FACTORS, 2)
        for pair in product(values, others)
        if can_stand_together(*pair)
    ]


def covering_settings(seed: int) -> list[Setting]:
    """Few settings that have every possible pair: each begins with a pair that is missing, and takes up the most."""
    rng, settings = random.Random(seed), []
    order = sorted(possible_pairs(), key=lambda pair: (pair[1] not in FACTORS.tree, rng.random()))
    missing = dict.fromkeys(map(frozenset, order))  # first models with trees, of which there are most
    while missing:
        chosen = set(next(iter(missing)))
        for values in rng.sample(FACTORS, len(FACTORS)):
            if chosen.isdisjoint(values):
                fitting = [value for value in values if all(can_stand_together(value, other) for other in chosen)]
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


def test_every_pair_of_values_is_covered():
    covered = {frozenset(pair) for setting in SETTINGS for pair in combinations(setting, 2)}
    assert covered == set(map(frozenset, possible_pairs()))
    assert len({value for values in FACTORS for value in values}) == sum(map(len, FACTORS))
    assert len(SETTINGS) <= 1.1 * len(MODELS) * len(TREES)  # and no fewer: each model meets each tree


def test_every_model_and_every_tree_has_gradients_of_a_shared_pass_in_float64():
    exact = [setting for setting in SETTINGS if "policy" in setting.shared and setting.dtype == "float64"]
    assert {setting.model for setting in exact} == set(MODELS)
    assert {setting.tree for setting in exact} == set(TREES)


def test_rows_at_the_edges_of_blocks_have_the_tokens_that_they_are_called_after():
    counted = {name: packed(name, 0).case.tree.num_tokens for name in TREES if name.endswith(" tokens")}
    assert counted == {f"{count} tokens": count for count in (127, 128, 129, 255, 256, 257)}


# ---- an update -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a case trains on. N sequences, of C completion tokens at most."""

    rollouts: Packed
    advantages: Tensor  # [N]
    trained: Tensor  # [N, C]
    weights: dict[str, list[Tensor]]  # per pass, of every parameter


class Update(NamedTuple):
    """What came of a case: log-probabilities of each pass [N, C], 0 where not trained, the loss, and its gradients."""

    logprobs: dict[str, Tensor]
    loss: Tensor
    gradients: list[Tensor]  # none without a backward


def step_of(setting: Setting, seed: int) -> Step:
    generator = torch.Generator().manual_seed(seed)
    rollouts = packed(setting.tree, seed)
    case = rollouts.case
    lengths = torch.tensor(list(map(len, case.sequences))) - torch.tensor(case.prompt_lens)
    trained = torch.arange(int(lengths.max())) < lengths[:, None]
    if setting.trained == "some trained":
        trained &= torch.rand(trained.shape, generator=generator) < 0.7
        trained[0, 0] = True
    advantages = torch.randn(len(lengths), generator=generator)
    policy = moved(initial_weights(setting.model, setting.heads, setting.head), 0.05, generator)
    # The policy has left the old one so far that some ratios are clipped.
    weights = {"policy": policy, "old": moved(policy, 0.02, generator), "reference": moved(policy, 0.1, generator)}
    return Step(rollouts, advantages, trained, weights)


def moved(weights: list[Tensor], size: float, generator: torch.Generator) -> list[Tensor]:
    return [weight + size * torch.randn(weight.shape, generator=generator) for weight in weights]


@cache
def initial_weights(model: str, heads: str, head: str) -> list[Tensor]:
    return [parameter.detach() for parameter in model_of(model, heads, head, "float32", shares=False).parameters()]


def model_of(model: str, heads: str, head: str, dtype: str, shares: bool) -> nn.Module:
    """The small model in float32, or in float64 throughout; as its library runs it itself where nothing is shared."""
    library, name = model.split()
    changes: dict = {} if model in ALWAYS_TIED | NEVER_TIED else {"tie_word_embeddings": head == "tied"}
    if library == "torchtune":
        made = tiny_model(name, **changes, num_kv_heads=HEADS[heads])
        made = in_float64(made) if dtype == "float64" else made
    else:
        changes |= {} if name == "gpt2" else {"num_key_value_heads": HEADS[heads]}
        changes |= hf.SLOW_EXPERTS if dtype == "float64" else {}
        made = hf.loaded(name, transformers.NAME if shares else hf.ORDINARY.get(name, "sdpa"), **changes)
        made = hf.in_float64(made) if dtype == "float64" else made
    for path, parameter in made.named_parameters():
        parameter.requires_grad_("lora" in path or not name.endswith("lora"))
    return made


unshared_model_of = cache(partial(model_of, shares=False))


def checkpoint_layers(model: nn.Module) -> None:
    if isinstance(model, TransformerDecoder):
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def scored_rows(model: nn.Module, step: Step, shares: bool) -> Iterator[tuple[list[int], Tensor]]:
    """The sequences of each row and their log-probabilities [n, C]; a row's backward belongs before the next."""
    case, rows, prefix_tokens = step.rollouts
    is_torchtune = isinstance(model, TransformerDecoder)
    if not shares:
        by_tune = partial(baseline_logprobs, model, case.sequences, case.prompt_lens)
        yield list(range(len(case.sequences))), by_tune() if is_torchtune else hf.baseline_logprobs(model, case)
        return
    library = torchtune if is_torchtune else transformers
    with library.encode_prefix(model, prefix_tokens) if prefix_tokens else nullcontext() as prefix:
        for part, tree in rows:
            prompt_lens, mask = torch.tensor(case.prompt_lens)[part], step.trained[part]
            mask = mask[:, : int((tree.lengths - prompt_lens).max())]
            hidden = library.forward(model, tree, prefix=prefix)
            yield part, token_logprobs(hidden, library.output(model), tree, prompt_lens=prompt_lens, mask=mask)


def update_of(model: nn.Module, step: Step, setting: Setting, shared: Iterable[str]) -> Update:
    """One update, of which some passes share: log-probabilities of three policies, a loss and its gradients."""
    logprobs, loss = {}, torch.zeros((), dtype=torch.float64)
    normalizer = loss_normalizer(step.trained, setting.loss_type, max_completion_length=100)
    for name in PASSES:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), step.weights[name], strict=True):
                parameter.copy_(weight)
                parameter.grad = None
        logprobs[name] = torch.zeros(step.trained.shape, dtype=torch.float64)
        with torch.set_grad_enabled(name == "policy" and setting.backend != "flex"):
            for part, own in scored_rows(model, step, name in shared):
                trained = step.trained[part, : own.shape[1]]
                logprobs[name][part, : own.shape[1]] = own.detach().where(trained, 0).double()
                if name != "policy":
                    continue
                old, ref = (logprobs[other][part, : own.shape[1]].to(own) for other in ("old", "reference"))
                options = {"loss_type": setting.loss_type, "importance_sampling_level": setting.level}
                options |= {"ref_logprobs": ref, "beta": 0.1, "normalizer": normalizer}
                own_loss, _ = grpo_loss(own, old, step.advantages[part], trained, **options)
                loss += own_loss.detach()
                if own_loss.requires_grad:
                    own_loss.backward()
    return Update(logprobs, loss, [x.grad for x in model.parameters() if x.grad is not None])


def flex(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, **options: float | None) -> Tensor:
    """With the pads that rows on a CPU leave out, as flex wants whole blocks; in one layout, so compiled once."""
    pads = (0, 0, 0, len(mask.tree) - q.shape[2])
    q_k_v = (nn.functional.pad(x, pads).contiguous() for x in (q, k, v))
    return attention(*q_k_v, mask, **options, backend="flex")[:, :, : q.shape[2]]


@contextmanager
def attending(attend: Callable[..., Tensor]) -> Iterator[None]:
    """Both libraries' packed rows go to `attend`."""
    with pytest.MonkeyPatch.context() as patch:
        for library in (torchtune, transformers):
            patch.setattr(library, "attention", attend)
        yield


def shared_update(setting: Setting, step: Step) -> Update:
    model = model_of(setting.model, setting.heads, setting.head, setting.dtype, shares=True)
    if setting.activations == "checkpointed":
        checkpoint_layers(model)
    with attending(flex if setting.backend == "flex" else partial(attention, backend=setting.backend)):
        return update_of(model, step, setting, setting.shared.removeprefix("shares ").split("+"))


def unshared_update(setting: Setting, step: Step, dtype: str) -> Update:
    return update_of(unshared_model_of(setting.model, setting.heads, setting.head, dtype), step, setting, shared=[])


# ---- equal -----------------------------------------------------------------------------------------------------------

# Gemma2's softmax, the experts' routers and Cohere's rotation compute in float32 in a float64 model too.
ROUNDED = {"torchtune gemma2", *(f"transformers {name}" for name in ("gemma2", "cohere", *hf.EXPERT_MODELS))}
# A case of few tokens strays in float32 by some tens of roundings, of 2^-24 each, this way or that by chance.
BY_CHANCE = 2e-6


def errors(update: Update, truth: Update) -> dict[str, float]:
    """Of each pass's log-probabilities, the loss and the gradient of the parameter that is worst off."""
    found = {name: relative_error(update.logprobs[name], truth.logprobs[name]) for name in PASSES}
    found["loss"] = (update.loss - truth.loss).abs().item()
    pairs = zip(update.gradients, truth.gradients, strict=True)
    return found | {"gradient": max((relative_error(*pair) for pair in pairs), default=0.0)}


def errors_beyond_the_bounds(setting: Setting, seed: int) -> dict[str, float]:
    step = step_of(setting, seed)
    truth = unshared_update(setting, step, "float64")
    found = errors(shared_update(setting, step), truth)
    if setting.dtype == "float64":
        bounds = dict.fromkeys(found, 2e-6 if setting.model in ROUNDED else 1e-12)
    else:
        unshared = errors(unshared_update(setting, step, "float32"), truth)
        bounds = {what: 1.5 * error + BY_CHANCE for what, error in unshared.items()}
    return {what: error for what, error in found.items() if not error <= bounds[what]}


def cases(settings: Iterable[tuple[int, Setting]]) -> pytest.MarkDecorator:
    named = [pytest.param(setting, seed, id=f"seed {seed}: {', '.join(setting)}") for seed, setting in settings]
    return pytest.mark.parametrize(("setting", "seed"), named)


@pytest.fixture(autouse=True, scope="module")
def registered():
    transformers.register()
    forget_compiled_flex()
    yield
    forget_compiled_flex()


def forget_compiled_flex() -> None:
    """So that the lengths of other files' rows are no lengths from before, see NOT_FLEX."""
    torch._dynamo.reset()
    flex_kernels._compiled.cache_clear()


@cases(enumerate(SETTINGS))
def test_the_update_is_the_unshared_loops(setting, seed):
    assert not errors_beyond_the_bounds(setting, seed)


def some_cases() -> list[tuple[int, Setting]]:
    """One of each library and dtype, in which the completions of a prompt share it in the pass with gradients."""
    found: dict[tuple[str, str], tuple[int, Setting]] = {}
    for seed, setting in enumerate(SETTINGS):
        is_branched = setting.tree in ("a group", "groups", "system prompt", "three levels", "129 tokens")
        if is_branched and "policy" in setting.shared and setting.backend != "flex":
            found.setdefault((setting.model.split()[0], setting.dtype), (seed, setting))
    return list(found.values())


def updates(rank: int, chosen: list[tuple[int, Setting]]) -> list[Update]:
    """Of a process."""
    transformers.register()
    return [shared_update(setting, step_of(setting, seed)) for seed, setting in chosen]


def test_a_run_is_repeatable_to_the_bit():
    once = updates(0, some_cases())
    assert len(once) == 4
    assert all(update.gradients for update in once)
    for again in (updates(0, some_cases()), *run_processes(1, updates, some_cases())):
        for tensors, others in zip(map(tree_leaves, once), map(tree_leaves, again), strict=True):
            assert all(map(torch.equal, tensors, others))


# ---- the mistakes that are known, each far outside the bounds --------------------------------------------------------


def flat_positions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixTree, "position_ids", property(lambda tree: torch.arange(len(tree))))


def plain_causal_mask(patch: pytest.MonkeyPatch) -> None:
    plain = attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, **options) -> Tensor:
        end = torch.full_like(mask.tree.end, mask.tree.num_tokens)
        end[mask.tree.num_tokens :] = mask.tree.end[mask.tree.num_tokens :]
        return plain(q, k, v, block_mask(replace(mask.tree, end=end)), **options)

    patch.setattr(sys.modules[__name__], "attention", attend)


def shifted_prediction(patch: pytest.MonkeyPatch) -> None:
    """A completion's first token is predicted at the packed token before it."""
    plain = token_logprobs

    def shifted(hidden: Tensor, output: Callable, tree: PrefixTree, *, prompt_lens: Tensor, mask: Tensor) -> Tensor:
        node, each = tree.node.clone(), torch.arange(len(prompt_lens))
        node[each, prompt_lens - 1] = node[each, prompt_lens] - 1
        return plain(hidden, output, replace(tree, node=node), prompt_lens=prompt_lens, mask=mask)

    patch.setattr(sys.modules[__name__], "token_logprobs", shifted)


def prefix_weighted_per_sibling(patch: pytest.MonkeyPatch) -> None:
    def weighted(plain: Callable[..., Tensor], model: nn.Module, tree: PrefixTree, **options) -> Tensor:
        hidden = plain(model, tree, **options)
        siblings = tree.node[tree.node >= 0].bincount(minlength=len(tree))  # [S]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * siblings[:, None])
        return hidden

    for library in (torchtune, transformers):
        patch.setattr(library, "forward", partial(weighted, library.forward))


@pytest.mark.parametrize(
    "mistake", [flat_positions, plain_causal_mask, shifted_prediction, prefix_weighted_per_sibling]
)
@cases(some_cases())
def test_a_known_mistake_shows(setting, seed, mistake, monkeypatch):
    mistake(monkeypatch)
    assert errors_beyond_the_bounds(setting, seed)["gradient"] > 1e-2
