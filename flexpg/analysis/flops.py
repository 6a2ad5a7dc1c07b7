"""What a packed row costs, and what its sequences would cost unshared: tokens, pairs, FLOPs and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from flexpg.rollouts import Rollouts, checked_rollouts
from flexpg.tree import PrefixTree, checked_tree


@dataclass(frozen=True)
class Cost:
    """Work of one forward, padding left out.

    Attributes:
        tokens: through every linear layer.
        attention_pairs: query-key pairs that are visible, in every layer and head.
    """

    tokens: int
    attention_pairs: int

    def __add__(self, other: Cost) -> Cost:
        """Both after one another."""
        return Cost(self.tokens + other.tokens, self.attention_pairs + other.attention_pairs)

    def __sub__(self, other: Cost) -> Cost:
        """The first without the second, which it holds."""
        return Cost(self.tokens - other.tokens, self.attention_pairs - other.attention_pairs)


def causal_cost(length: int) -> Cost:
    """One sequence under a causal mask."""
    return Cost(length, length * (length + 1) // 2)


def shared_cost(tree: PrefixTree) -> Cost:
    """The packed row: every token once, each with itself and its ancestors.

    >>> shared_cost(PrefixTree.from_lengths([3], [[1, 1]]))
    Cost(tokens=5, attention_pairs=14)

    Raises:
        TypeError: a tree that is none.
    """
    checked_tree(tree)
    return Cost(tree.num_tokens, int((tree.position_ids[: tree.num_tokens] + 1).sum()))


def group_cost(rollouts: Rollouts) -> Cost:
    """Every prompt once and every completion in full, even where completions begin alike and a tree merges them.

    Raises:
        TypeError: something other than rollouts.
    """
    suffix_lens: list[list[int]] = [[] for _ in checked_rollouts(rollouts).prompts]
    for group, completion in zip(rollouts.group_ids.tolist(), rollouts.completions, strict=True):
        suffix_lens[group].append(len(completion))
    return shared_cost(PrefixTree.from_lengths([len(prompt) for prompt in rollouts.prompts], suffix_lens))


def dense_cost(tree: PrefixTree) -> Cost:
    """The tree's sequences, each on its own under a causal mask.

    >>> dense_cost(PrefixTree.from_lengths([3], [[1, 1]]))
    Cost(tokens=8, attention_pairs=20)

    Raises:
        TypeError: a tree that is none.
    """
    checked_tree(tree)
    return Cost(int(tree.lengths.sum()), int((tree.lengths * (tree.lengths + 1) // 2).sum()))


@dataclass(frozen=True)
class ModelShape:
    """What a decoder's work depends on; `shape_of` in `flexpg.integrations.*_shape` reads it off a model.

    The fields with defaults are for a Llama: nothing of them has to be given for one.

    Attributes:
        num_layers: L.
        embed_dim: E.
        num_heads: Hq, query heads.
        num_kv_heads: Hkv, key/value heads.
        head_dim: D.
        intermediate_dim: I, of the MLP; with experts, of all together that a token goes through.
        vocab_size: V, rows of the output layer.
        layer_weights: entries of the matrices of a layer that a token is multiplied with, mean over layers.
        last_weights: those of them in the layer's last matrix, if the backward needs nothing that comes after it: then
            torch's checkpoint (without reentry) stops before it, and does not compute it again. 0 where it does.
        mlp_tensors: of width I, that the MLP keeps for its backward: 4 of down(act(gate(x)) * up(x)), 2 of
            down(act(up(x))), and more where the activation function is written out in Python.
        norms: norms of width E in a layer.
        has_qk_norm: queries and keys are normed.
        experts_per_token: experts that a token goes through; 0 where the MLP is one.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_dim: int
    vocab_size: int
    layer_weights: int
    last_weights: int = 0
    mlp_tensors: int = 4
    norms: int = 2
    has_qk_norm: bool = False
    experts_per_token: int = 0


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiplication and an addition are two.

    Attributes:
        linear: of the layers' matrices.
        attention: of QK^T and PV, for visible pairs alone.
        output: of the logits.
    """

    linear: int
    attention: int
    output: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.output


def update_flops(
    cost: Cost,
    predicted: int,
    shape: ModelShape,
    *,
    activation_checkpointing: bool = False,
    recomputed_output: bool = True,
) -> Flops:
    """FLOPs of one forward and backward in which every parameter is trained.

    A matrix of n entries takes 2 n per token, and in the backward 2 n for the gradient of its input and 2 n for its
    own. A visible pair takes 4 D per layer and head (QK^T and PV), and twice that in the backward. What flash kernels
    compute again in theirs, the scores, is not counted, nor are norms, activation functions, softmax and the optimizer.
    Padding is left out: for a GPU's kernels a row is padded to a multiple of 128 tokens, at least 256.

    Args:
        cost: of the row, or of its sequences unshared.
        predicted: trained completion tokens, whose logits are made.
        shape: of the model.
        activation_checkpointing: each layer's forward is computed again in the backward (without reentry).
        recomputed_output: logits are made again in the backward, as `token_logprobs` does.

    >>> shape = ModelShape(1, 8, 1, 1, 8, 16, vocab_size=10, layer_weights=4 * 8 * 8 + 3 * 8 * 16)
    >>> update_flops(Cost(tokens=5, attention_pairs=14), 2, shape)
    Flops(linear=19200, attention=1344, output=1280)
    """
    per_token = 6 * shape.layer_weights
    passes = 3  # the forward, and the backward's two
    if activation_checkpointing:
        per_token += 2 * (shape.layer_weights - shape.last_weights)
        passes += 1
    per_pair = 4 * shape.head_dim * shape.num_heads * passes
    per_logit = 2 * shape.embed_dim * (3 + recomputed_output)
    return Flops(
        linear=cost.tokens * shape.num_layers * per_token,
        attention=cost.attention_pairs * shape.num_layers * per_pair,
        output=predicted * shape.vocab_size * per_logit,
    )


def activation_bytes(
    cost: Cost,
    predicted: int,
    shape: ModelShape,
    *,
    itemsize: int = 2,
    activation_checkpointing: bool = False,
    chunk_tokens: int = 1024,
    expanded_kv: bool = False,
) -> int:
    """Peak memory of one forward and backward, beyond parameters, gradients and optimizer state.

    What the layers keep for their backward (`_kept_bytes`), and the larger of what the backward needs beside it:

    - at its beginning, a chunk of logits: themselves, their log_softmax, and a gradient of one of the two (with a
      temperature other than 1 perhaps a copy more); the final norm's three tensors, and the rows predicted from;
    - in the last layer's MLP: the gradients of its two factors and of the residual stream, and the hidden states.

    With checkpointing a layer keeps its input alone, and the second needs one layer's tensors computed again.

    It is within 15 % of measured peaks on a CPU in float32, of models whose attention goes through flash kernels; in
    bfloat16 it was up to 18 % too low. No GPU was at hand to compare with. It does not hold where attention is computed
    densely (a softcap or a window on CPU), where layers are compiled (the compiler keeps less), or where gradients are
    there already and a second one is made to be added.

    Args:
        cost: of the row, or of its sequences unshared.
        predicted: trained completion tokens, whose logits are made.
        shape: of the model.
        itemsize: bytes of an entry: 2 for bfloat16, 4 for float32.
        activation_checkpointing: a layer keeps its input alone.
        chunk_tokens: positions whose logits exist at a time, as in `token_logprobs`.
        expanded_kv: keys and values are copied for each query head, as torchtune's own attention does.

    >>> shape = ModelShape(1, 8, 1, 1, 8, 16, vocab_size=10, layer_weights=4 * 8 * 8 + 3 * 8 * 16)
    >>> activation_bytes(Cost(tokens=5, attention_pairs=14), 2, shape, itemsize=4)
    3860
    """
    width, rounded = shape.embed_dim, max(itemsize, 4)  # norms, softmax and logsumexp are in float32 or better
    layer = _kept_bytes(shape, itemsize, expanded_kv)
    stored = shape.num_layers * (width * itemsize if activation_checkpointing else layer)
    chunk = min(predicted, chunk_tokens) * shape.vocab_size * (itemsize + 2 * rounded)
    if predicted > chunk_tokens:  # the output layer's gradient of one chunk waits for the next
        chunk += width * shape.vocab_size * itemsize
    chunk += predicted * width * itemsize
    at_logits = cost.tokens * (rounded + 2 * itemsize) * width + chunk
    in_mlp = cost.tokens * itemsize * (2 * shape.intermediate_dim + 2 * width)
    if activation_checkpointing:
        in_mlp += cost.tokens * (layer - width * itemsize)
    return cost.tokens * stored + max(at_logits, in_mlp)


def _kept_bytes(shape: ModelShape, itemsize: int, expanded_kv: bool) -> int:
    """What a layer keeps of a token for its backward.

    A norm its input in float32, the normed and the scaled; attention q, k, v, output and logsumexp; a gated MLP the
    two factors, the activation's result and the product; an expert moreover its copy of the input, and its output.
    """
    rounded = max(itemsize, 4)
    norms = shape.norms * shape.embed_dim * (rounded + 2 * itemsize)
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * itemsize * (queries + (queries if expanded_kv else keys)) + rounded * shape.num_heads
    if shape.has_qk_norm:
        attention += (rounded + itemsize) * (queries + keys)
    mlp = itemsize * shape.mlp_tensors * shape.intermediate_dim
    return norms + attention + mlp + 2 * itemsize * shape.experts_per_token * shape.embed_dim
