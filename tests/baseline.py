"""The baseline for torchtune models and attention, slow and easy to verify; and the tiny models of the tests.

tiny_model(name, **changes)                          a torchtune model of BUILDERS
in_float64(model)                                    the model in float64, norms and rotary embeddings included
baseline_logprobs(model, sequences, prompt_lens)     [N, C], one sequence after the other
baseline_attention(q, k, v, node, ...)               attention of every sequence on its own
random_sequences(rng, ...)                           sequences that share prefixes
Operators()                                          counts operators and the tensors that they return

Nothing here goes through flexpg: models are called module by module as torchtune wrote them, attention is torch's.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings, TransformerDecoder

VOCAB, MAX_SEQ_LEN = 50, 192
SHAPE = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
SHAPE |= {"intermediate_dim": 48, "max_seq_len": MAX_SEQ_LEN}
BUILDERS = {
    "llama3_2": partial(llama3_2, **SHAPE),
    "llama3_2_lora": partial(
        lora_llama3_2, ["q_proj", "v_proj"], apply_lora_to_mlp=True, **SHAPE, lora_rank=4, lora_alpha=8
    ),
    "llama3": partial(llama3, **SHAPE),
    "qwen2": partial(qwen2, **SHAPE),
    "qwen2_tied": partial(qwen2, **SHAPE, tie_word_embeddings=True),
    "mistral": partial(mistral, **SHAPE),
    "phi3": partial(phi3, **SHAPE),
    # The window is shorter than the sequences and the softcaps bend; gemma2's own sizes would do nothing here.
    "gemma2": partial(
        gemma2, **SHAPE, head_dim=8, hidden_capping_value=2.0, final_capping_value=2.0, sliding_window_size=7
    ),
}


def tiny_model(name: str, seed: int = 0, **changes: int | bool) -> TransformerDecoder:
    """Build a torchtune model in which every parameter matters: no norm weight is 1 and no LoRA matrix is 0.

    Its embeddings are small compared to what attention adds, or a tied output layer would just repeat the last token.
    """
    torch.manual_seed(seed)
    model = BUILDERS[name](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.tok_embeddings.weight.mul_(0.2)
    return model


class Float64RoPE(nn.Module):
    """The rotation of torchtune's RotaryPositionalEmbeddings and Llama3ScaledRoPE, without their round to float32."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.register_buffer("cache", rope.cache.double())  # [max_seq_len, D / 2, 2]

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        cache = self.cache[: x.shape[1]] if input_pos is None else self.cache[input_pos]
        cos, sin = cache.unsqueeze(-3).unbind(-1)  # [(B,) T, 1, D / 2]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def in_float64(model: TransformerDecoder) -> TransformerDecoder:
    """Convert a model to float64, with norms and rotary embeddings that do not round to float32 as torchtune's do."""
    model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, RMSNorm):
                norm = nn.RMSNorm(child.normalized_shape, eps=child.eps)
                norm.weight = child.scale
                setattr(module, name, norm)
            elif isinstance(child, RotaryPositionalEmbeddings | Llama3ScaledRoPE):
                setattr(module, name, Float64RoPE(child))
    return model


def baseline_hidden(model: TransformerDecoder, tokens: list[int]) -> Tensor:
    """Compute [T, E] hidden states of one sequence. Not model(...), which would round logits to float32."""
    hidden = model.tok_embeddings(torch.tensor([tokens]))
    for layer in model.layers:
        hidden = layer(hidden)
    return model.norm(hidden)[0]


def baseline_logprobs(model: TransformerDecoder, sequences: list[list[int]], prompt_lens: list[int]) -> Tensor:
    """Compute [N, C] log-probabilities of the completions, 0 past their end: one sequence after the other."""
    rows = []
    for tokens, prompt_len in zip(sequences, prompt_lens, strict=True):
        scores = model.output(baseline_hidden(model, tokens)).log_softmax(-1)  # [T, V]
        targets = torch.tensor(tokens[prompt_len:])
        rows.append(scores[prompt_len - 1 : -1].gather(-1, targets[:, None])[:, 0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def baseline_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    node: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute [1, Hq, S, D], each packed token's output in the first sequence that has it; 0 at padding.

    Args:
        q: [1, Hq, S, D].
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        node: [N, T], the packed index of token t of sequence n; -1 past the end of the sequence.
        window: Tokens that a token sees at most, itself included.
        softcap: Of the scores.
        sinks: [Hq] one more logit of each head's softmax, without a value.
        chunk: Positions of a chunk, outside of which a token sees nothing.
    """
    seen, indices, outputs = torch.zeros(q.shape[2], dtype=torch.bool), [], []
    for nodes in node:
        nodes = nodes[nodes >= 0]
        is_new = ~seen[nodes.cpu()]
        seen[nodes.cpu()] = True
        heads = (x[:, :, nodes] for x in (q, k, v))
        if window is None and softcap is None and sinks is None and chunk is None:
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        else:
            out = _explicit_attention(*heads, window, softcap, sinks, chunk)
        indices.append(nodes[is_new.to(nodes.device)])
        outputs.append(out[:, :, is_new.to(nodes.device)])
    return torch.zeros_like(q).index_copy(2, torch.cat(indices), torch.cat(outputs, 2))


def _explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    chunk: int | None,
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    if chunk is not None:
        chunks = torch.arange(q.shape[2], device=q.device) // chunk
        visible = visible & (chunks[:, None] == chunks)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


class Operators(TorchDispatchMode):
    """Count the operators that are not views, and the size of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = self.largest = 0  # bytes of all tensors, elements of the largest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.calls[func.overloadpacket.__name__] += 1
            self.bytes += sum(x.nbytes for x in tensors)
            self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return out


def random_sequences(rng: random.Random, count: int, longest_run: int, alphabet: int) -> list[list[int]]:
    """Draw sequences that start as others do, equal them, are prefixes of them, or share nothing."""
    sequences: list[list[int]] = []
    for _ in range(count):
        other = rng.choice(sequences) if sequences and rng.random() < 0.8 else []
        kept = other[: rng.randint(0, len(other))]
        run = rng.randint(0 if kept else 1, longest_run)
        sequences.append(kept + [rng.randrange(alphabet) for _ in range(run)])
    return sequences


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by the norm."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()
