"""Floating-point operations and activation memory of an update, from the work of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from flexpg.analysis.work import Work


@dataclass(frozen=True)
class ModelShape:
    """What the work of a decoder depends on; `shape_of` in `flexpg.analysis.*_shape` reads it from a model.

    The fields with defaults describe a Llama of which every parameter is trained.

    Attributes:
        num_layers: L.
        embed_dim: E.
        num_heads: Hq, query heads.
        num_kv_heads: Hkv, key/value heads.
        head_dim: D, of queries and keys.
        intermediate_dim: I, of the MLP; with experts, the sum over those that a token is routed to.
        vocab_size: V, rows of the output layer.
        layer_weights: Entries of the matrices of a layer that a token is multiplied with, adapters included; the mean
            over layers.
        last_weights: Entries of the layer's last matrix, if torch's checkpoint (not reentrant) does not recompute it,
            because the backward needs nothing that is computed after it; else 0.
        mlp_tensors: Tensors of width I that the MLP keeps for its backward: 4 for down(act(gate(x)) * up(x)), 2 for
            down(act(up(x))), more if the activation function is written out in Python, one less if down is frozen.
        norms: Norms of width E in a layer.
        has_qk_norm: Whether queries and keys are normalized.
        experts_per_token: Experts that a token is routed to; 0 for an MLP without experts.
        frozen_weights: Entries of `layer_weights` that are not trained (LoRA's base matrices); the mean over layers.
        first_inputs: Entries of the first matrices, whose input needs no gradient, because neither the embeddings nor
            any matrix before them is trained.
        is_output_frozen: Whether the output layer is not trained.
        output_adapters: Entries of the output layer's adapters.
        value_dim: The size of a value head; 0 if it is D.
        global_head_dim: D of layers without a window, if it differs from that of layers with one; else 0.
        attention_layers: Layers with attention; None if all have it.
        windowed_layers: The number of them with a sliding window or chunks.
        window: The tokens that a token sees there at most, or those of a chunk.
        is_chunked: Whether `window` is that of chunks.
        recurrent_layers: Layers with recurrence, in place of attention or next to it.
        recurrent_flops: FLOPs of a token's forward in all recurrent layers, without those of `layer_weights`.
        recurrent_backward_flops: The same of its backward.
        recurrent_bytes: Bytes that all recurrent layers keep of a token for their backward.
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
    frozen_weights: int = 0
    first_inputs: int = 0
    is_output_frozen: bool = False
    output_adapters: int = 0
    value_dim: int = 0
    global_head_dim: int = 0
    attention_layers: int | None = None
    windowed_layers: int = 0
    window: int = 0
    is_chunked: bool = False
    recurrent_layers: int = 0
    recurrent_flops: int = 0
    recurrent_backward_flops: int = 0
    recurrent_bytes: int = 0

    @property
    def num_attention_layers(self) -> int:
        """Layers with attention."""
        return self.num_layers if self.attention_layers is None else self.attention_layers


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiplication and an addition are two.

    Attributes:
        linear: FLOPs of the layers' matrices.
        attention: FLOPs of QK^T and PV, for visible pairs only.
        output: FLOPs of the logits.
        recurrent: FLOPs of recurrent layers, without their matrices.
    """

    linear: int
    attention: int
    output: int
    recurrent: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return self.linear + self.attention + self.output + self.recurrent


def update_flops(
    work: Work,
    num_loss_tokens: int,
    shape: ModelShape,
    *,
    activation_checkpointing: bool = False,
    recompute_output: bool = True,
) -> Flops:
    """Count the FLOPs of one forward and backward.

    A matrix of n entries takes 2 n per token in the forward, 2 n for the gradient of its input and, if it is trained,
    2 n for its own gradient. A visible pair takes 4 D per layer and head (QK^T and PV), and twice that in the backward.
    Of a recurrent layer, matrix products and convolutions over the sequence count, elementwise operations do not. The
    scores that flash kernels recompute in their backward are not counted, nor are norms, activation functions, softmax,
    attention sinks, the optimizer and padding.

    Args:
        work: The tokens that are encoded.
        num_loss_tokens: Completion tokens whose logits are computed.
        shape: The model.
        activation_checkpointing: Each layer's forward is recomputed in the backward (not reentrant).
        recompute_output: Logits are recomputed in the backward, as `token_logprobs` does.

    >>> from flexpg.analysis.work import packed_work
    >>> from flexpg.tree import PrefixTree
    >>> shape = ModelShape(1, 8, 1, 1, 8, 16, vocab_size=10, layer_weights=4 * 8 * 8 + 3 * 8 * 16)
    >>> update_flops(packed_work(PrefixTree.from_lengths([3], [[1, 1]])), 2, shape)
    Flops(linear=19200, attention=1344, output=1280, recurrent=0)
    """
    per_token = shape.num_layers * (6 * shape.layer_weights - 2 * shape.frozen_weights) - 2 * shape.first_inputs
    recurrent = shape.recurrent_flops + shape.recurrent_backward_flops
    if activation_checkpointing:
        per_token += 2 * shape.num_layers * (shape.layer_weights - shape.last_weights)
        recurrent += shape.recurrent_flops
    head_dims = shape.head_dim + (shape.value_dim or shape.head_dim)  # of QK^T and PV
    full_layers = shape.num_attention_layers - shape.windowed_layers
    per_head = work.num_pairs * full_layers * (2 * shape.global_head_dim or head_dims)
    if shape.windowed_layers:
        per_head += work.pairs(shape.window, shape.is_chunked) * shape.windowed_layers * head_dims
    output, adapters = shape.embed_dim * shape.vocab_size, shape.output_adapters
    per_logits = 2 * (output + adapters) * (3 + recompute_output) - 2 * output * shape.is_output_frozen
    return Flops(
        linear=work.num_tokens * per_token,
        attention=2 * per_head * shape.num_heads * (4 if activation_checkpointing else 3),
        output=num_loss_tokens * per_logits,
        recurrent=work.num_tokens * recurrent,
    )


def activation_bytes(
    num_tokens: int,
    num_loss_tokens: int,
    shape: ModelShape,
    *,
    itemsize: int = 2,
    activation_checkpointing: bool = False,
    chunk_tokens: int = 1024,
    expanded_kv: bool = False,
) -> int:
    """Estimate the peak memory of one forward and backward, without parameters, gradients and optimizer state.

    It is what the layers keep for their backward (`_kept_bytes`), plus the larger of two working sets of the backward:

    - at its beginning, a chunk of logits: the logits, their log_softmax and a gradient of one of them (with a
      temperature other than 1 possibly another copy); the final norm's three tensors, and the predicted rows;
    - in the last layer's MLP, the gradients of its two factors and of the residual stream, and the hidden states.

    With checkpointing, a layer keeps only its input, and the second working set includes one recomputed layer.

    The estimate is within 15 % of peaks measured on a CPU in float32 with flash attention, and up to 18 % too low in
    bfloat16; up to 30 % too low with Mamba2 layers, whose backward in torch needs more, and 35 % for gpt-oss, whose
    experts compute their activation function in steps. No GPU was measured. It does not hold for dense attention (a
    softcap or a window on a CPU), for compiled layers and kernels of recurrent layers (which keep less), or if
    gradients exist already and new ones are added to them.

    Args:
        num_tokens: Tokens that are encoded.
        num_loss_tokens: Completion tokens whose logits are computed.
        shape: The model.
        itemsize: Bytes per entry: 2 for bfloat16, 4 for float32.
        activation_checkpointing: A layer keeps only its input.
        chunk_tokens: Positions whose logits exist at a time, as in `token_logprobs`.
        expanded_kv: Keys and values are copied for each query head, as torchtune's own attention does.

    >>> shape = ModelShape(1, 8, 1, 1, 8, 16, vocab_size=10, layer_weights=4 * 8 * 8 + 3 * 8 * 16)
    >>> activation_bytes(5, 2, shape, itemsize=4)
    3860
    """
    width, rounded = shape.embed_dim, max(itemsize, 4)  # norms, softmax and logsumexp are in float32 or better
    attention, other = _kept_bytes(shape, itemsize, expanded_kv)
    stored = shape.num_attention_layers * attention + shape.num_layers * other + shape.recurrent_bytes
    if activation_checkpointing:
        stored = shape.num_layers * width * itemsize
    chunk = min(num_loss_tokens, chunk_tokens) * shape.vocab_size * (itemsize + 2 * rounded)
    if num_loss_tokens > chunk_tokens and not shape.is_output_frozen:
        chunk += width * shape.vocab_size * itemsize  # the output layer's gradient of a chunk, to be added to the next
    chunk += num_loss_tokens * width * itemsize
    at_logits = num_tokens * (rounded + 2 * itemsize) * width + chunk
    in_mlp = num_tokens * itemsize * (2 * shape.intermediate_dim + 2 * width)
    if activation_checkpointing:
        recurrent = shape.recurrent_bytes // max(shape.recurrent_layers, 1)
        is_parallel = shape.num_attention_layers + shape.recurrent_layers > shape.num_layers
        mixer = attention + recurrent if is_parallel else max(attention, recurrent)
        in_mlp += num_tokens * (mixer + other - width * itemsize)
    return num_tokens * stored + max(at_logits, in_mlp)


def _kept_bytes(shape: ModelShape, itemsize: int, expanded_kv: bool) -> tuple[int, int]:
    """Return the bytes that attention, and the rest of a layer, keep of a token for their backward.

    A norm keeps its input in float32, the normalized input and the output; attention q, k, v, its output and logsumexp;
    a gated MLP its two factors, the result of the activation function and the product; an expert also its copy of the
    input, and its output.
    """
    rounded = max(itemsize, 4)
    norms = shape.norms * shape.embed_dim * (rounded + 2 * itemsize)
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    heads = shape.num_heads + (shape.num_heads if expanded_kv else shape.num_kv_heads)
    attention = itemsize * heads * (shape.head_dim + (shape.value_dim or shape.head_dim)) + rounded * shape.num_heads
    if shape.has_qk_norm:
        attention += (rounded + itemsize) * (queries + keys)
    mlp = itemsize * shape.mlp_tensors * shape.intermediate_dim
    return attention, norms + mlp + 2 * itemsize * shape.experts_per_token * shape.embed_dim
