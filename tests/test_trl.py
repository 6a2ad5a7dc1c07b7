"""TRL's trainers: with shared prefixes they train as TRL's own do, and every known mistake shows.

Pairs of runs differ in the trainer's class alone. TRL's own trainer is the oracle of losses, gradients and parameters.
A metric that is a mean over micro-batches depends on which rows share one, so for gradient accumulation the oracle of
the metrics is TRL's own trainer with the same rows in each micro-batch.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processes import run_processes
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from flexpg.integrations import trl as flexpg_trl
from flexpg.integrations.trl import (
    SharedPrefixDPOTrainer,
    SharedPrefixGRPOTrainer,
    SharedPrefixRLOOTrainer,
    packed_rows,
    parts_per_group,
    regrouped,
    share_prefixes,
)

PAD, EOS = 0, 1
CHARACTERS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz +?"]
VOCAB = len(CHARACTERS)
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPE |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=8, router_aux_loss_coef=0.1, norm_topk_prob=True
    ),
    # Softcaps that bend and a window shorter than the rows, as gemma2's own sizes would do nothing here.
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE,
        head_dim=8,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        sliding_window=6,
    ),
    "granite": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=4.0, attention_multiplier=0.4),
    "cohere": lambda: transformers.CohereConfig(**SHAPE, logit_scale=0.25),
}
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def tiny_model(name: str, **settings: Any) -> transformers.PreTrainedModel:
    """A small random model whose every parameter matters: no norm weight of 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_fused_head(name: str, temperature: float = 0.7, **settings: Any) -> transformers.PreTrainedModel:
    model = tiny_model(name, **settings)
    add_fused_lm_head(model, temperature=temperature, outputs=OUTPUTS)
    return model


def with_shared_prefixes(name: str) -> transformers.PreTrainedModel:
    model = with_fused_head(name)
    share_prefixes(model)
    return model


# ---- one forward ---------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A padded batch, and what else the model is called with."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    options: dict[str, Any] = field(default_factory=dict)


def padded(rows: list[list[int]], scored: list[list[int]], left: list[int] | None = None, width: int = 0) -> Batch:
    """Rows behind `left` pads each, of which the tokens at the places `scored` are labels."""
    left = left or [0] * len(rows)
    width = max(width, *(pads + len(row) for pads, row in zip(left, rows, strict=True)))
    ids = torch.full((len(rows), width), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for n, (row, places, pads) in enumerate(zip(rows, scored, left, strict=True)):
        ids[n, pads : pads + len(row)] = torch.tensor(row)
        mask[n, pads : pads + len(row)] = 1
        for place in places:
            labels[n, pads + place] = row[place]
    return Batch(ids, mask, labels)


def random_batch(seed: int) -> Batch:
    """Rows that share beginnings of any length, some equal, some with no label; padded on both sides."""
    draw = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    rows: list[list[int]] = []
    for _ in range(integer(1, 7)):
        start = rows[integer(0, len(rows) - 1)] if rows else []
        tail = torch.randint(VOCAB, (integer(0 if start else 1, 9),), generator=draw).tolist()
        rows.append((start[: integer(0, len(start))] or start[:1]) + tail)
    scored = [[place for place in range(1, len(row)) if integer(0, 2)] if integer(0, 4) else [] for row in rows]
    return padded(rows, scored, [integer(0, 4) for _ in rows], width=integer(1, 24))


def group(prompt: list[int], *completions: list[int], **padding: Any) -> Batch:
    """One prompt's completions, each token of them a label."""
    rows = [prompt + completion for completion in completions]
    return padded(rows, [[*range(len(prompt), len(row))] for row in rows], **padding)


PROMPT = [5, PAD, 7, EOS, 9, 9, PAD, 4]
BATCHES = {
    "group": group(PROMPT, [3, 4, 5], [3, 8], [6, 6, 6, 6], left=[2, 2, 2], width=16),
    "two groups, left padding of their own": padded(
        [[*PROMPT, 3, 4], [*PROMPT, 5, 6], [8, 2, 3, 4, 5], [8, 2, 7]], [[8, 9], [8, 9], [2, 3, 4], [2]], [0, 0, 6, 6]
    ),
    "group of one": group(PROMPT, [3, 4, 5]),
    "equal rows": group(PROMPT, [3, 4], [3, 4], [3, 4]),
    "a row that another extends": group(PROMPT, [3, 4], [3, 4, 5, 6], [3]),
    "a row without completion": group(PROMPT, [3, 4], [], [6]),
    "rows with other labels": padded([[5, 6, 7, 8]] * 3, [[1, 3], [2], []]),
    "tool tokens between labels": padded([[*PROMPT, 3, 4, 5, 6], [*PROMPT, 3, 4, 8, 9]], [[8, 11], [8, 10, 11]]),
    "one label": padded([PROMPT, PROMPT], [[], [3]]),
}


def scored(model, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    """The fused head's output, and gradients of a sum that weighs every log-probability and entropy differently."""
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        fused_lm_head=True,
        **batch.options,
    )
    draw = torch.Generator().manual_seed(1)
    on_logprobs, on_entropy = torch.randn((2, *out.log_probs.shape), generator=draw)
    total = (on_logprobs * out.log_probs).sum() + (on_entropy * out.entropy).sum() + out.loss
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, parameters.values(), allow_unused=True, materialize_grads=True)
    return out, dict(zip(parameters, gradients, strict=True))


def largest_error(out, gradients: dict[str, Tensor], expected, expected_gradients: dict[str, Tensor]) -> float:
    """Of all outputs and all gradients; a gradient's error is relative to the largest gradient of the model."""
    names = [*OUTPUTS, "loss", *(["aux_loss"] if expected.aux_loss is not None else [])]
    errors = [(getattr(out, name).float() - getattr(expected, name).float()).detach().abs().max() for name in names]
    scale = max(gradient.abs().max() for gradient in expected_gradients.values()).clamp(min=1e-3)
    errors += [(gradients[name] - expected_gradients[name]).abs().max() / scale for name in expected_gradients]
    return torch.stack(errors).max().item()


def assert_equal_to_unshared(name: str, batch: Batch, error: float = 2e-6) -> None:
    expected = scored(with_fused_head(name), batch)
    out, gradients = scored(with_shared_prefixes(name), batch)
    assert largest_error(out, gradients, *expected) < error
    assert torch.equal(out.label_mask, expected[0].label_mask)
    for output in OUTPUTS:
        assert not getattr(out, output)[batch.labels[:, 1:] == -100].any()


@pytest.mark.parametrize("case", BATCHES)
def test_every_output_and_gradient_of_the_fused_head_is_the_unshared_ones(case):
    assert_equal_to_unshared("qwen2", BATCHES[case])


def test_random_batches_score_as_unshared():
    for seed in range(60):
        assert_equal_to_unshared("qwen2", random_batch(seed))


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "llama"])
def test_softcaps_windows_and_logit_scales_score_as_unshared(name):
    for batch in (BATCHES["group"], BATCHES["two groups, left padding of their own"], random_batch(3)):
        assert_equal_to_unshared(name, batch, error=5e-6)


@pytest.mark.parametrize("case", ["group", "equal rows", "a row without completion"])
def test_the_experts_auxiliary_loss_counts_a_shared_token_once_per_row(case):
    batch = replace(BATCHES[case], options={"output_router_logits": True})
    assert_equal_to_unshared("qwen3_moe", batch, error=5e-6)


def test_a_batch_without_labels_gives_a_loss_of_zero_and_gradients_of_zero():
    rows = [[*PROMPT, 3], [*PROMPT, 4, 5]]
    out, gradients = scored(with_shared_prefixes("qwen2"), padded(rows, [[], []]))
    assert out.loss == 0 and not out.log_probs.any() and not out.label_mask.any()
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_shared_row_is_encoded_once():
    trees = []
    model = with_fused_head("qwen2")
    share_prefixes(model, trees.append)
    scored(model, BATCHES["group"])
    assert [tree.num_tokens for tree in trees] == [len(PROMPT) + 2 + 1 + 1 + 4]  # two completions start with a 3


def test_calls_without_the_fused_head_stay_what_they_are():
    batch = BATCHES["two groups, left padding of their own"]
    plain, model = tiny_model("qwen2"), with_shared_prefixes("qwen2")
    call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    out, expected = model(**call), plain(**call)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    prompts = padded([[5, 6, 7], [8, 9]], [[], []], left=[0, 1])
    greedy = {"attention_mask": prompts.attention_mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompts.input_ids, **greedy), plain.generate(prompts.input_ids, **greedy))


# ---- mistakes that must show ---------------------------------------------------------------------------------------


def predicted_at_the_packed_index_before(rows, attention_mask):
    first = attention_mask.int().argmax(1)
    label_at = rows.tree.node[rows.row, rows.column + 1 - first[rows.row]]
    return replace(rows, predicted_at=label_at - 1)


def flat_positions(rows, attention_mask):
    vars(rows.tree)["position_ids"] = torch.arange(len(rows.tree))
    return rows


def plain_causal_mask(rows, attention_mask):
    end = rows.tree.end.clone()
    end[: rows.tree.num_tokens] = rows.tree.num_tokens
    tree = replace(rows.tree, end=end)
    vars(tree)["position_ids"] = rows.tree.position_ids  # the right ones: the mask alone is wrong
    return replace(rows, tree=tree)


def first_label_of_a_row_dropped(rows, attention_mask):
    keep = torch.cat([rows.row[:1] == rows.row[:1] + 1, rows.row[1:] == rows.row[:-1]])
    return replace(rows, **{name: getattr(rows, name)[keep] for name in ("row", "column", "predicted_at", "labels")})


@pytest.mark.parametrize(
    "mistake",
    [predicted_at_the_packed_index_before, flat_positions, plain_causal_mask, first_label_of_a_row_dropped],
)
def test_a_mistake_in_the_packing_breaks_the_equality(mistake, monkeypatch):
    batch = BATCHES["group"]
    expected = scored(with_fused_head("qwen2"), batch)
    model = with_shared_prefixes("qwen2")
    assert largest_error(*scored(model, batch), *expected) < 2e-6
    monkeypatch.setattr(flexpg_trl, "packed_rows", lambda ids, mask, labels: mistake(packed_rows(ids, mask, labels), mask))
    out, gradients = scored(model, batch)
    assert (out.log_probs - expected[0].log_probs).abs().max() > 1e-3
    assert largest_error(out, gradients, *expected) > 1e-2


def test_one_count_per_packed_token_would_break_the_auxiliary_loss_alone(monkeypatch):
    batch = replace(BATCHES["group"], options={"output_router_logits": True})
    expected = scored(with_fused_head("qwen3_moe"), batch)[0]

    def counted_once(*args):
        rows = packed_rows(*args)
        return replace(rows, copies=(rows.copies > 0).long())

    monkeypatch.setattr(flexpg_trl, "packed_rows", counted_once)
    out = scored(with_shared_prefixes("qwen3_moe"), batch)[0]
    assert (out.log_probs - expected.log_probs).abs().max() < 2e-6
    assert abs(out.aux_loss - expected.aux_loss) > 1e-3


# ---- refusals ------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], words: str):
    return pytest.raises(error, match=re.escape(words))


@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids", "position_ids", "shift_labels"])
def test_inputs_beyond_padded_rows_of_text_are_refused(name):
    batch = replace(BATCHES["group"], options={name: torch.ones(3, 16, dtype=torch.long)})
    with refused(ValueError, f"prefixes are shared in padded rows of text, and {name} came; use TRL's own trainer"):
        scored(with_shared_prefixes("qwen2"), batch)


@pytest.mark.parametrize("missing", ["input_ids", "attention_mask", "labels"])
def test_a_call_without_tokens_mask_or_labels_is_refused(missing):
    batch = BATCHES["group"]
    call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    del call[missing]
    with refused(ValueError, "no input_ids, attention_mask or labels came"):
        with_shared_prefixes("qwen2")(**call, fused_lm_head=True)


HOLE = "row 1 of 2 has no token, or padding between its tokens; pad on the left or the right"
UNPREDICTED = "row 1 of 2 has a label at padding or at its first token, which nothing predicts"


@pytest.mark.parametrize(
    ("mask", "labels", "words"),
    [
        ([1, 0, 1, 1], [-100, -100, -100, 5], HOLE),
        ([0, 0, 0, 0], [-100, -100, -100, -100], HOLE),
        ([0, 1, 1, 1], [-100, 5, 5, -100], UNPREDICTED),  # at its first token
        ([0, 0, 1, 1], [-100, 5, -100, -100], UNPREDICTED),  # in the padding on the left
        ([1, 1, 1, 0], [-100, 5, 5, 5], UNPREDICTED),  # in the padding on the right
    ],
)
def test_rows_that_are_no_run_of_tokens_and_labels_that_nothing_predicts_are_refused(mask, labels, words):
    ids = torch.tensor([[5, 6, 7, 8]] * 2)
    masks, both = torch.tensor([[1, 1, 1, 1], mask]), torch.tensor([[-100, 6, 7, 8], labels])
    with refused(ValueError, words):
        packed_rows(ids, masks, both)


def test_a_label_at_the_first_column_is_ignored_as_trl_ignores_it():
    batch = replace(BATCHES["group of one"], labels=BATCHES["group of one"].input_ids)
    assert_equal_to_unshared("qwen2", batch)


def test_dropout_in_training_is_refused():
    model = get_peft_model(with_fused_head("qwen2"), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    with refused(ValueError, "has dropout 0.1, which would differ per copy of a prefix; set it to 0 (lora_dropout=0;"):
        share_prefixes(model)


def test_dropout_that_training_turns_on_later_is_refused_at_the_call():
    model = get_peft_model(with_fused_head("qwen2"), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    share_prefixes(model.eval())
    scored(model, BATCHES["group"])
    with refused(ValueError, "has dropout 0.1"):
        scored(model.train(), BATCHES["group"])


def test_virtual_tokens_are_refused():
    model = get_peft_model(with_fused_head("qwen2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with refused(ValueError, "the adapter (PROMPT_TUNING) adds virtual tokens"):
        share_prefixes(model)


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(**SHAPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=OUTPUTS)
    with pytest.warns(UserWarning), refused(TypeError, "attention sinks"):
        share_prefixes(model)
        scored(model, BATCHES["group"])


def test_an_attention_that_gives_way_is_named():
    with pytest.warns(UserWarning, match=re.escape("attn_implementation='eager' gives way to flexpg, and to sdpa")):
        share_prefixes(with_fused_head("llama", attn_implementation="eager"))


@pytest.mark.parametrize(("name", "usual"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_the_usual_attention_gives_way_without_a_word(name, usual):
    model = with_fused_head(name, attn_implementation=usual)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share_prefixes(model)


@pytest.mark.parametrize("other", ["1.15.2", "1.17.0", "1.160.0", "2.16.0"])
def test_another_version_of_trl_is_refused(other, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: other)
    spec = importlib.util.spec_from_file_location("flexpg_trl_again", flexpg_trl.__file__)
    words = f"flexpg shares prefixes in trl 1.16 and {other} is installed: pip install 'trl==1.16.*'"
    with refused(ImportError, words):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
