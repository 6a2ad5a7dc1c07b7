"""A GRPO update of one group (forward, log-probabilities, loss, backward) by several implementations.

    python -m benchmarks.update                    # CPU, float32
    python -m benchmarks.update --device cuda      # bfloat16: 0.5B and 3B shapes, with and without checkpointing
    python -m benchmarks.update --tiny             # seconds, as a test

One torchtune model with the same weights computes the same log-probabilities [G, C] by:

- baseline: a padded batch through the model's own forward, causal SDPA; logits of completion tokens only.
- baseline_unpadded: the same sequences concatenated without padding; on a CPU by flexpg with nothing shared, on CUDA by
  torch's varlen_attn.
- torchtune: as in its GRPO recipe: a dense mask, position ids, logits of every token in float32.
- prefix_grouper: the package of that name from PyPI as its README shows it: logits of every token; SDPA after keys and
  values were expanded to all heads, as transformers and torchtune call it with a mask.
- prefix_grouper_tuned: the same with key/value heads not expanded (`enable_gqa`) and flexpg's log-probabilities of
  completion tokens only, so that only its attention differs.
- trl_tree: the layout of TRL's AsyncGRPO, which packs a prefix tree; its kernel is replaced (`benchmarks.trl_tree`);
  timed by `benchmarks.peers`.
- flexpg.

Embeddings, matrices and norms are the same modules in all of them. The bound is the ratio of FLOPs of the cost model,
baseline without padding over shared.
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
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.rlhf import logits_to_logprobs, truncate_sequence_for_logprobs

from benchmarks.models import build_decoder, hidden_states
from benchmarks.record import run
from benchmarks.timing import alternate, paired_ratio, quartiles
from benchmarks.trl_tree import TrlTree
from flexpg import PrefixTree, grpo_loss, token_logprobs
from flexpg.analysis.flops import update_flops
from flexpg.analysis.torchtune_shape import shape_of
from flexpg.analysis.work import baseline_work, packed_work
from flexpg.integrations import torchtune as integration
from flexpg.packed_input import whole_sequence


@dataclass(frozen=True)
class Case:
    """One update: lengths in tokens, and implementations that are skipped."""

    prompt: int
    completions: tuple[int, ...]
    model: str = "small"
    checkpointing: bool = False
    skipped: tuple[str, ...] = ()


def uneven(longest: int, group: int) -> tuple[int, ...]:
    """Return lengths from an eighth of the longest to the longest, with a mean of 9/16 of it."""
    return tuple(round(longest * (1 / 8 + 7 / 8 * n / (group - 1))) for n in range(group))


def even_and_uneven(prompt: int, completion: int, group: int, **options: object) -> list[Case]:
    """Return a case with completions of equal lengths and one with different lengths."""
    return [Case(prompt, (completion,) * group, **options), Case(prompt, uneven(completion, group), **options)]


CASES = {
    "cpu": [
        *(
            case
            for sizes in ((512, 64, 8), (1024, 64, 16), (2048, 128, 8))
            for case in even_and_uneven(*sizes, skipped=("trl_tree",))
        ),
        *even_and_uneven(
            4096, 256, 8, skipped=("baseline_unpadded", "torchtune", "trl_tree")
        ),  # half a minute per call
    ],
    "cuda": [
        case
        for model in ("0.5B", "3B")
        for checkpointing in (False, True)
        for sizes in ((1024, 256, 16), (4096, 512, 8), (4096, 128, 32), (16_384, 2048, 8))
        for case in even_and_uneven(*sizes, model=model, checkpointing=checkpointing, skipped=("trl_tree",))
    ],
    "tiny": [*even_and_uneven(96, 16, 4, model="tiny"), Case(96, (16, 9), model="tiny", checkpointing=True)],
}


class Group:
    """Random tokens of a case, in the layouts that the implementations need."""

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
        self.batch = torch.cat([self.prompts, self.padded], dim=1)  # [G, P + C]
        self.present = torch.cat([torch.ones_like(self.prompts, dtype=torch.bool), self.mask], dim=1)
        self.tree = PrefixTree.from_groups([self.prompt], [self.completions])
        self.not_shared = PrefixTree.from_groups([self.prompt] * len(lens), [[each] for each in self.completions])


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, Hq, T, D], k, v [B, Hkv, T, D] -> [B, T, Hq, D]


@dataclass(frozen=True)
class Implementation:
    """A function that returns log-probabilities [G, C], and the attention of the model meanwhile; None for its own."""

    logprobs: Callable[[], Tensor]
    attend: Attention | None = None


def implementations(model: TransformerDecoder, group: Group) -> dict[str, Implementation]:
    """Return all by name."""
    P, device = group.prompts.shape[1], group.batch.device
    dense_mask = cache(partial(get_causal_mask_from_padding_mask, group.present))  # [G, T, T], built at first use
    position_ids = get_position_ids_from_padding_mask(group.present)  # [G, T]
    grouper = PrefixGrouper([[P, *group.mask.sum(1).tolist()]], device=device)
    tree = TrlTree(group.prompt, group.completions)
    starts = torch.cat([grouper.prefix_lens.new_zeros(1), group.present.sum(1).cumsum(0)]).int()

    def score(hidden: Tensor, tree: PrefixTree) -> Tensor:
        """Return log-probabilities from hidden states [1, S', E] of a packed sequence."""
        return token_logprobs(whole_sequence(hidden, tree), model.output, tree, prompt_lens=group.prompt_lens)

    def baseline() -> Tensor:
        return score(hidden_states(model, group.batch)[group.present][None], group.not_shared)

    def baseline_unpadded() -> Tensor:
        return score(integration.forward(model, group.not_shared), group.not_shared)

    def baseline_varlen() -> Tensor:
        unpadded = slice(group.not_shared.num_tokens)
        tokens, positions = group.not_shared.input_ids[:, unpadded], group.not_shared.position_ids[None, unpadded]
        return score(hidden_states(model, tokens, positions), group.not_shared)

    def torchtune() -> Tensor:
        logits = truncate_sequence_for_logprobs(model(group.batch, input_pos=position_ids, mask=dense_mask()), P)
        rows = zip(logits.split(1), group.padded.split(1), strict=True)
        return torch.cat([logits_to_logprobs(*row) for row in rows])  # one sequence at a time, as in the recipe

    def grouped_hidden() -> Tensor:
        tokens = grouper.concat_input(group.prompt[None], group.present[:1, :P], group.padded, group.mask)
        return hidden_states(model, tokens, group.tree.position_ids[None, : tokens.shape[1]])

    def prefix_grouper() -> Tensor:
        _, _, logits, _ = grouper.split_output(model.output(grouped_hidden()), include_prefix_last=1)
        logits = logits[:, :-1]  # [G, C, V]
        return logits.gather(-1, group.padded[..., None])[..., 0] - logits.logsumexp(-1)

    def prefix_grouper_tuned() -> Tensor:
        return score(grouped_hidden(), group.tree)

    def flexpg() -> Tensor:
        return score(integration.forward(model, group.tree), group.tree)

    unpadded = Implementation(baseline_unpadded)
    if device.type == "cuda":
        unpadded = Implementation(baseline_varlen, _varlen_attention(starts, group.batch.shape[1]))
    return {
        "baseline": Implementation(baseline),
        "baseline_unpadded": unpadded,
        "torchtune": Implementation(torchtune),
        "prefix_grouper": Implementation(prefix_grouper, prefix_grouper_attention(grouper, expanded=True)),
        "prefix_grouper_tuned": Implementation(prefix_grouper_tuned, prefix_grouper_attention(grouper, expanded=False)),
        "trl_tree": Implementation(partial(tree.logprobs, model, group.mask), tree.attend),
        "flexpg": Implementation(flexpg),
    }


def update(model: TransformerDecoder, group: Group, implementation: Implementation) -> Tensor:
    """Compute the gradients of the GRPO loss, and return the log-probabilities."""
    model.zero_grad()
    attend = implementation.attend
    with replaced_attention(model, attend) if attend else nullcontext():  # also for recomputation in the backward
        logprobs = implementation.logprobs()
        grpo_loss(logprobs, group.advantages, group.mask).backward()
    return logprobs.detach().where(group.mask, 0)


@contextmanager
def replaced_attention(model: TransformerDecoder, attend: Attention) -> Iterator[None]:
    """Replace the model's attention, torchtune's or flexpg's, inside the context."""

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
    """Return PrefixGrouper's attention: the prefix with itself, completions with a copy of it and themselves."""
    width, longest = grouper.suffix_attn_mask.shape[1], int(grouper.ungrouped_suffix_lens.max())
    causal: Tensor = torch.ones(longest, width, dtype=torch.bool).tril(width - longest)
    if grouper.suffix_attn_mask.device.type == "cuda":
        causal = causal_lower_right(longest, width)  # FlashAttention takes this, but no tensor

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        # `padding` is not needed: prompts of one length have none, and causal queries do not see that of completions.
        if expanded:
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
        mask = {"is_causal": True} if q.shape[2] == k.shape[2] else {"attn_mask": causal}
        return sdpa(q, k, v, **mask, enable_gqa=not expanded).transpose(1, 2)

    return lambda q, k, v: grouper.forward(attend, q, k, v)


def _varlen_attention(starts: Tensor, longest: int) -> Attention:
    """Return FlashAttention of concatenated sequences."""
    from torch.nn.attention.varlen import varlen_attn

    has_gqa = "enable_gqa" in signature(varlen_attn).parameters  # from torch 2.12 on; before, heads are expanded

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not has_gqa:
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
        rows = (z[0].transpose(0, 1) for z in (q, k, v))  # [T, H, D] each
        options = {"enable_gqa": True} if has_gqa else {}
        return varlen_attn(*rows, starts, starts, longest, longest, window_size=(-1, 0), **options)[None]

    return attend


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the times of all implementations, flexpg's speed-up over each, and the bound."""
    model = build_decoder(case.model, device, case.checkpointing)
    group = Group(case, model.tok_embeddings.num_embeddings, device)
    logprobs: dict[str, Tensor] = {}

    def keep(name: str, implementation: Implementation) -> None:
        logprobs[name] = update(model, group, implementation)

    compared = {name: each for name, each in implementations(model, group).items() if name not in case.skipped}
    times = alternate({name: partial(keep, name, each) for name, each in compared.items()}, repeats, device)
    ours, first = times.get("flexpg"), next(iter(logprobs.values()), None)
    tree, loss_tokens, shape = group.tree, int(group.mask.sum()), shape_of(model)
    flops = [
        update_flops(work, loss_tokens, shape, activation_checkpointing=case.checkpointing).total
        for work in (baseline_work(tree), packed_work(tree))
    ]
    return {
        "tokens_baseline": tree.baseline_tokens,
        "tokens_shared": tree.num_tokens,
        "bound": flops[0] / flops[1],
        "update_ms": {name: quartiles(values) for name, values in times.items()},
        "speedup_over": {name: paired_ratio(ms, ours) for name, ms in times.items() if ours and name != "flexpg"},
        "unpadded_over_baseline": paired_ratio(times["baseline_unpadded"], times["baseline"])
        if {"baseline_unpadded", "baseline"} <= set(times)
        else None,
        "largest_relative_difference": max(
            (((scores - first).norm() / first.norm()).item() for scores in logprobs.values()), default=None
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("update", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
