"""Shared prefixes in unmodified transformers models, through an attention implementation called "flexpg".

A model that accepts the mask need not obey it: checks.py refuses what would not be exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flexpg.context_parallel import ContextShard
from flexpg.integrations.fsdp import run_as_forward, sharded_modules
from flexpg.integrations.transformers.attention import register
from flexpg.integrations.transformers.checks import check_architecture, check_no_dropout, exact_forward, unwrap
from flexpg.integrations.transformers.composite import backbone, language_model, path_of, set_attention, text_config
from flexpg.integrations.transformers.image_checks import SAMPLE_TEXT, check_inputs, check_supports_images
from flexpg.integrations.transformers.images import baseline_arguments, with_images, zero_of_towers
from flexpg.integrations.transformers.output_layer import output
from flexpg.integrations.transformers.recurrent import install, mask_for, sampled
from flexpg.packed_input import packed_input, whole_sequence
from flexpg.prefix_cache import PrefixCache
from flexpg.prompt_inputs import PromptInputs
from flexpg.sample_cache import SampleBlockMask, SampleCache
from flexpg.sampling import Decoder
from flexpg.tree import PrefixTree

__all__ = [
    "baseline_forward",
    "check_rollouts",
    "decoder",
    "enable",
    "forward",
    "layers",
    "logits",
    "output",
    "register",
]


def enable(model: nn.Module) -> None:
    """Switch a transformers model, plain or with PEFT adapters, to the attention implementation "flexpg".

    Ordinary calls equal those of "sdpa", or of "eager" where transformers' sdpa does not support the model. A model
    that was loaded with "eager" returns no attention weights after it.

    >>> from transformers import AutoModelForCausalLM, Qwen2Config
    >>> config = Qwen2Config(
    ...     hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=100
    ... )
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> enable(model)
    >>> forward(model, PrefixTree.from_groups([[1, 2, 3]], [[[4], [5, 6]]])).shape
    torch.Size([1, 256, 64])

    Raises:
        ValueError: If the model has dropout and is in training mode, or an unsupported adapter.
        TypeError: If prefixes cannot be shared exactly in the model.
    """
    base = unwrap(model)
    check_architecture(base)
    check_no_dropout(model)
    register()
    set_attention(base)
    install(language_model(base))


def forward(
    model: nn.Module,
    tree: PrefixTree,
    *,
    prefix: PrefixCache | None = None,
    shard: ContextShard | None = None,
    step_has_images: bool = False,
) -> Tensor:
    """Compute the hidden states of a packed sequence, equal to those of the baseline.

    Args:
        model: An enabled transformers decoder, plain or with PEFT adapters, with or without gradient checkpointing,
            sharded by FSDP2 or not.
        tree: The packed sequence, with tokens, on the model's device.
        prefix: A cached prompt with which all sequences begin, from `flexpg.integrations.encode_prefix`.
        shard: The part of the packed sequence that this rank computes; None for all of it.
        step_has_images: Whether a prompt of the step has images, here or on another rank: all ranks then need gradients
            of a vision encoder that is sharded with the model, which are 0 without images.

    Returns:
        [1, S, E] hidden states after the final norm, or those of the shard.

    Raises:
        ValueError: If the model is not enabled, has dropout or noise in training, or the tree does not fit it.
        TypeError: If prefixes cannot be shared exactly in the model.
    """
    packed = packed_input(model, tree, prefix, shard)
    encoded = packed.mask.tree if shard is None else shard.tree

    def hidden_states() -> Tensor:
        base = unwrap(model)
        check_inputs(base, encoded)
        with (
            exact_forward(model, encoded, None if prefix is None else prefix.tree),
            with_images(base, packed) as arguments,
        ):
            hidden = backbone(base)(**arguments, use_cache=False, return_dict=True).last_hidden_state
        if step_has_images and sharded_modules(model):
            hidden = hidden + zero_of_towers(base).to(hidden)
        return whole_sequence(hidden, tree, prefix, shard)

    return run_as_forward(model, hidden_states)


def check_rollouts(
    model: nn.Module, tree: PrefixTree, *, rollout_ids: Sequence[int] | None = None, step_has_images: bool = False
) -> None:
    """Check that the images of a packed sequence fit its placeholder tokens and the model.

    With `step_has_images`, it is also checked that the model takes images, although this sequence may have none.

    Raises:
        ValueError: If they do not fit, with the prompt, or the rollout as in `rollout_ids`.
        TypeError: If flexpg does not support images in this model.
    """
    base = unwrap(model)
    if step_has_images:
        check_supports_images(base)
    check_inputs(base, tree, rollout_ids)


def baseline_forward(
    model: nn.Module, input_ids: Tensor, inputs: Sequence[PromptInputs | None] | None = None
) -> Tensor:
    """Compute the hidden states [n, T, E] of right-padded sequences [n, T], by transformers' own attention.

    Args:
        model: A transformers model.
        input_ids: [n, T] int64.
        inputs: For each sequence the images of its prompt; None for text.
    """
    base = unwrap(model)
    images = {} if inputs is None else baseline_arguments(base, input_ids, inputs)
    base_model = backbone(base)
    return run_as_forward(
        model, lambda: base_model(input_ids=input_ids, use_cache=False, return_dict=True, **images).last_hidden_state
    )


def logits(model: nn.Module, input_ids: Tensor, inputs: Sequence[PromptInputs | None] | None = None) -> Tensor:
    """Compute the logits [n, T, V] of right-padded sequences [n, T] by an ordinary call of the model."""
    images = {} if inputs is None else baseline_arguments(unwrap(model), input_ids, inputs)
    out: Tensor = model(input_ids=input_ids, use_cache=False, return_dict=True, **images).logits
    return out


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder layers by name, in order.

    Raises:
        TypeError: If the model does not keep them in one list.
    """
    base = unwrap(model)
    text_model, num_layers = language_model(base), text_config(base).num_hidden_layers
    for name, module in text_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            path = path_of(base, text_model) + name
            return {f"{path}.{n}": layer for n, layer in enumerate(module)}
    raise TypeError(f"{type(base).__name__} must have one list of {num_layers} layers")


def decoder(model: nn.Module) -> Decoder:
    """Return what `sample_completions` calls for hidden states; the model's own caches are not used.

    Raises:
        ValueError: If the model has dropout and is in training mode, or has an unsupported adapter.
        TypeError: If prefixes cannot be shared exactly in the model.
    """
    enable(model)
    base = unwrap(model)
    mask: SampleBlockMask | None = None  # of the cache that is being decoded

    def hidden_states(tokens: Tensor, position_ids: Tensor) -> Tensor:
        assert mask is not None
        outer = sampled.set(mask)
        try:
            hidden: Tensor = backbone(base)(
                input_ids=tokens,
                position_ids=position_ids,
                attention_mask=mask_for(backbone(language_model(base)), mask),
                use_cache=False,
                return_dict=True,
            ).last_hidden_state
            return hidden
        finally:
            sampled.reset(outer)

    def decode(tokens: Tensor, position_ids: Tensor, cache: SampleCache) -> Tensor:
        nonlocal mask
        if cache.compiled:
            raise ValueError("compiled must be False for transformers models, whose decoding step is not compiled")
        if cache.is_filled:
            return run_as_forward(model, lambda: hidden_states(tokens, position_ids))

        def prefill() -> Tensor:
            check_inputs(base, cache.tree, advice=SAMPLE_TEXT)
            with exact_forward(model, cache.tree, longest=cache.tree.max_length + cache.max_new_tokens):
                return hidden_states(tokens, position_ids)

        mask = SampleBlockMask(cache)
        return run_as_forward(model, prefill)

    return decode
