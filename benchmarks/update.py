"""A GRPO update of one group (forward, log-probabilities, loss, backward), by everyone, by turns in one process.

    python -m benchmarks.update                    # CPU, fp32
    python -m benchmarks.update --device cuda      # bf16: 0.5B and 3B shapes, with and without checkpointing
    python -m benchmarks.update --tiny             # seconds, to see that it works

One torchtune model, the same weights, six ways to the same log-probabilities [G, C]:

- unshared: a padded batch through the model's own forward, causal SDPA; logits of completion tokens alone.
- packed: the same without padding, sequences one behind the other: flexpg where nothing is shared on CPU, and
  torch's varlen_attn on CUDA.
- torchtune: as its own GRPO recipe: a dense mask, position ids, logits of every token in float32.
- prefix_grouper: the package of that name from PyPI, as its README has it: logits of every token; with SDPA behind
  keys and values of all heads, as transformers and torchtune call it under a mask.
- prefix_grouper_tuned: the same with the two faults of its surroundings put right: heads unexpanded (`enable_gqa`), and
  logits of completion tokens alone, made as flexpg makes them. What is left is its attention.
- flexpg.

Embeddings, matrices and norms are the same modules in all. The bound is the cost model's: FLOPs of the unshared update
over those of the shared one, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from prefix_grouper import PrefixGrouper
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.utils.rnn import pad_sequence
from torchtune.generation import get_causal_mask_from_padding_mask, get_position_ids_from_padding_mask
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.rlhf import logits_to_logprobs, truncate_sequence_for_logprobs
from torchtune.training import set_activation_checkpointing

from benchmarks.models import decoder
from benchmarks.record import run
from benchmarks.turns import by_turns, median, ratio
from flexpg import PrefixTree, dense_cost, grpo_loss, shared_cost, token_logprobs
from flexpg.analysis.flops import update_flops
from flexpg.analysis.torchtune_shape import shape_of
from flexpg.integrations import torchtune as shared


@dataclass(frozen=True)
class Case:
    """One update: lengths in tokens."""

    prompt: int
    completions: tuple[int, ...]
    model: str = "small"
    checkpointing: bool = False
    left_out: tuple[str, ...] = ()


def uneven(longest: int, group: int) -> tuple[int, ...]:
    """Lengths from an eighth of the longest up to it, as completions that end by themselves have; the mean is 9/16."""
    return tuple(round(longest * (1 / 8 + 7 / 8 * n / (group - 1))) for n in range(group))


def both(prompt: int, completion: int, group: int, **more: object) -> list[Case]:
    """With completions of equal lengths, and of widely different ones."""
    return [Case(prompt, (completion,) * group, **more), Case(prompt, uneven(completion, group), **more)]


CASES = {
    "cpu": [
        *(case for sizes in ((512, 64, 8), (1024, 64, 16), (2048, 128, 8)) for case in both(*sizes)),
        *both(4096, 256, 8, left_out=("packed", "torchtune")),  # half a minute a turn
    ],
    "cuda": [
        case
        for model in ("0.5B", "3B")
        for checkpointing in (False, True)
        for sizes in ((1024, 256, 16), (4096, 512, 8), (4096, 128, 32), (16_384, 2048, 8))
        for case in both(*sizes, model=model, checkpointing=checkpointing)
    ],
    "tiny": [*both(96, 16, 4, model="tiny"), Case(96, (16, 9), model="tiny", checkpointing=True)],
}


class Group:
    """Random tokens of a case, in every form that a way asks for."""

    def __init__(self, case: Case, vocab_size: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(vocab_size, (case.prompt,), generator=generator).to(device)
        self.completions = [torch.randint(vocab_size, (n,), generator=generator).to(device) for n in case.completions]
        self.advantages = torch.randn(len(case.completions), generator=generator).to(device)
        self.prompt_lens = torch.full((len(case.completions),), case.prompt, device=device)
        self.padded = pad_sequence(self.completions, batch_first=True)  # [G, C]
        lens = torch.tensor(case.completions, device=device)
        self.mask = torch.arange(self.padded.shape[1], device=device) < lens[:, None]  # [G, C]
        self.prompts = self.prompt.expand(len(lens), -1)  # [G, P]
        self.rows = torch.cat([self.prompts, self.padded], dim=1)  # [G, P + C]
        self.present = torch.cat([torch.ones_like(self.prompts, dtype=torch.bool), self.mask], dim=1)
        self.tree = PrefixTree.from_groups([self.prompt], [self.completions])
        self.apart = PrefixTree.from_groups([self.prompt] * len(lens), [[each] for each in self.completions])


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, Hq, T, D], k, v [B, Hkv, T, D] -> [B, T, Hq, D]


@dataclass(frozen=True)
class Way:
    """Log-probabilities [G, C], and the attention that the model has meanwhile; None for what stands there."""

    logprobs: Callable[[], Tensor]
    attend: Attention | None = None


def ways(model: TransformerDecoder, group: Group) -> dict[str, Way]:
    """All six, by name."""
    P, device = group.prompts.shape[1], group.rows.device
    dense_mask = cache(partial(get_causal_mask_from_padding_mask, group.present))  # [G, T, T], made at first use
    position_ids = get_position_ids_from_padding_mask(group.present)  # [G, T]
    grouper = PrefixGrouper([[P, *group.mask.sum(1).tolist()]], device=device)
    starts = torch.cat([grouper.prefix_lens.new_zeros(1), group.present.sum(1).cumsum(0)]).int()

    def scored(hidden: Tensor, tree: PrefixTree) -> Tensor:
        return token_logprobs(hidden, shared.output(model), tree, prompt_lens=group.prompt_lens)

    def from_batch(hidden: Tensor) -> Tensor:  # [G, T, E]
        return scored(_packed(hidden[group.present], group.apart), group.apart)

    def unshared() -> Tensor:
        return from_batch(hidden_states(model, group.rows))

    def packed() -> Tensor:
        return scored(shared.forward(model, group.apart), group.apart)

    def packed_varlen() -> Tensor:
        tokens, position_ids = (
            row[:, : group.apart.num_tokens] for row in (group.apart.token_row(), group.apart.position_ids[None])
        )
        return scored(_packed(hidden_states(model, tokens, position_ids)[0], group.apart), group.apart)

    def torchtune() -> Tensor:
        logits = truncate_sequence_for_logprobs(model(group.rows, input_pos=position_ids, mask=dense_mask()), P)
        rows = zip(logits.split(1), group.padded.split(1), strict=True)
        return torch.cat([logits_to_logprobs(*row) for row in rows])  # a row at a time, as the recipe

    def grouped() -> Tensor:
        tokens = grouper.concat_input(group.prompt[None], group.present[:1, :P], group.padded, group.mask)
        return hidden_states(model, tokens, group.tree.position_ids[None, : tokens.shape[1]])

    def prefix_grouper() -> Tensor:
        logits = shared.output(model)(grouped())
        _, _, of_completions, _ = grouper.split_output(logits, include_prefix_last=1)
        of_completions = of_completions[:, :-1]  # [G, C, V]
        return of_completions.gather(-1, group.padded[..., None])[..., 0] - of_completions.logsumexp(-1)

    def prefix_grouper_tuned() -> Tensor:
        return scored(_packed(grouped()[0], group.tree), group.tree)

    def flexpg() -> Tensor:
        return scored(shared.forward(model, group.tree), group.tree)

    on_cpu = device.type == "cpu"
    return {
        "unshared": Way(unshared),
        "packed": Way(packed) if on_cpu else Way(packed_varlen, _varlen(starts, group.rows.shape[1])),
        "torchtune": Way(torchtune),
        "prefix_grouper": Way(prefix_grouper, prefix_grouper_attention(grouper, expanded=True)),
        "prefix_grouper_tuned": Way(prefix_grouper_tuned, prefix_grouper_attention(grouper, expanded=False)),
        "flexpg": Way(flexpg),
    }


def update(model: TransformerDecoder, group: Group, way: Way) -> Tensor:
    """Gradients of the GRPO loss, made anew; gives the log-probabilities back."""
    model.zero_grad()
    with attention_by(model, way.attend) if way.attend else nullcontext():  # checkpointing computes it again
        values = way.logprobs()
        loss, _ = grpo_loss(values, None, group.advantages, group.mask)
        loss.backward()
    return values.detach().where(group.mask, 0)


def hidden_states(model: TransformerDecoder, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Of a batch [B, T], without the output layer: [B, T, E]."""
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers:
        hidden = layer(hidden, input_pos=position_ids)
    return model.norm(hidden)


@contextmanager
def attention_by(model: TransformerDecoder, attend: Attention) -> Iterator[None]:
    """Inside, the model's attention is `attend`, and not what torchtune or flexpg have put there."""

    def forward_of(attn: MultiHeadAttention) -> Callable[..., Tensor]:
        def forward(
            x: Tensor, y: Tensor | None = None, *, mask: None = None, input_pos: Tensor | None = None
        ) -> Tensor:
            q, k, v = (proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
            q, k = (attn.pos_embeddings(z, input_pos=input_pos) for z in (q, k))
            return attn.output_proj(attend(*(z.transpose(1, 2) for z in (q, k, v))).flatten(2))

        return forward

    modules = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = forward_of(module)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def prefix_grouper_attention(grouper: PrefixGrouper, expanded: bool) -> Attention:
    """Prefix with itself, and every completion with a copy of the prefix and itself; both with SDPA."""
    width, longest = grouper.suffix_attn_mask.shape[1], int(grouper.ungrouped_suffix_lens.max())
    causal: Tensor = torch.ones(longest, width, dtype=torch.bool).tril(width - longest)
    if grouper.suffix_attn_mask.device.type == "cuda":
        causal = causal_lower_right(longest, width)  # FlashAttention takes this, and no tensor

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        # `padding` hides nothing: prompts of one length have none, and causal queries do not see that of completions.
        if expanded:
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
        mask = {"is_causal": True} if q.shape[2] == k.shape[2] else {"attn_mask": causal}
        return sdpa(q, k, v, **mask, enable_gqa=not expanded).transpose(1, 2)

    return lambda q, k, v: grouper.forward(attend, q, k, v)


def _varlen(starts: Tensor, longest: int) -> Attention:
    """FlashAttention of sequences one behind the other."""
    from torch.nn.attention.varlen import varlen_attn

    takes_groups = "enable_gqa" in signature(varlen_attn).parameters  # in torch 2.12; before, heads are expanded

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not takes_groups:
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
        rows = (z[0].transpose(0, 1) for z in (q, k, v))  # [T, H, D] each
        options = {"enable_gqa": True} if takes_groups else {}
        return varlen_attn(*rows, starts, starts, longest, longest, window_size=(-1, 0), **options)[None]

    return attend


def _packed(hidden: Tensor, tree: PrefixTree) -> Tensor:
    """[tokens, E] as the row of a tree, [1, S, E]."""
    return torch.nn.functional.pad(hidden, (0, 0, 0, len(tree) - len(hidden)))[None]


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Times of all ways, what flexpg gains over each, and the bound."""
    model = decoder(case.model, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    if case.checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    group = Group(case, model.tok_embeddings.num_embeddings, device)
    values: dict[str, Tensor] = {}

    def kept(name: str, way: Way) -> None:
        values[name] = update(model, group, way)

    compared = {name: way for name, way in ways(model, group).items() if name not in case.left_out}
    times = by_turns({name: partial(kept, name, way) for name, way in compared.items()}, turns, device)
    ours, first = times.get("flexpg"), next(iter(values.values()), None)
    predicted, shape = int(group.mask.sum()), shape_of(model)
    before, after = (
        update_flops(cost(group.tree), predicted, shape, activation_checkpointing=case.checkpointing).total
        for cost in (dense_cost, shared_cost)
    )
    return {
        "tokens_unshared": dense_cost(group.tree).tokens,
        "tokens_shared": shared_cost(group.tree).tokens,
        "bound": before / after,
        "update_ms": {name: median(each) for name, each in times.items()},
        "speedup_over": {name: ratio(each, ours) for name, each in times.items() if name != "flexpg"} if ours else {},
        "packed_over_unshared": ratio(times["packed"], times["unshared"])
        if {"packed", "unshared"} <= set(times)
        else None,
        "largest_relative_difference": max(
            (((each - first).norm() / first.norm()).item() for each in values.values()), default=None
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and saves."""
    run("update", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
