"""TRL's trainers: with shared prefixes they train as TRL's own do, and every known mistake shows.

Pairs of runs differ in the trainer's class alone. TRL's own trainer is the oracle of losses, gradients and parameters.
A metric that is a mean over micro-batches depends on which rows share one, so for gradient accumulation the oracle of
the metrics is TRL's own trainer with the same rows in each micro-batch.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processes import run_processes
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict, split_tensor_dict

from flexpg.integrations.trl import (
    SharedPrefixDPOTrainer,
    SharedPrefixGRPOTrainer,
    SharedPrefixRLOOTrainer,
    parts_per_group,
    regrouped,
    share_prefixes,
)
from flexpg.integrations.trl import forward as trl_forward
from flexpg.integrations.trl.forward import packed_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning")  # TRL's use of transformers

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
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=EOS,
        bos_token_id=None,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
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
    if name == "gemma2":  # which transformers before 5.23 runs with sdpa by itself, without the softcap
        settings = {"attn_implementation": "eager"} | settings
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


def called(model, batch: Batch) -> Any:
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    return model(**rows, fused_lm_head=True, **batch.options)


def scored(model, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    """The fused head's output, and gradients of a sum that weighs every log-probability and entropy differently."""
    out = called(model, batch)
    draw = torch.Generator().manual_seed(1)
    on_logprobs, on_entropy = torch.randn((2, *out.log_probs.shape), generator=draw)
    total = (on_logprobs * out.log_probs).sum() + (on_entropy * out.entropy).sum() + out.loss
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
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
    for seed in range(40):
        assert_equal_to_unshared("qwen2", random_batch(seed))


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "llama"])
def test_softcaps_windows_and_logit_scales_score_as_unshared(name):
    for batch in (BATCHES["group"], BATCHES["two groups, left padding of their own"], random_batch(3)):
        assert_equal_to_unshared(name, batch, error=5e-6)


@pytest.mark.parametrize("case", ["group", "equal rows", "a row without completion"])
def test_the_experts_auxiliary_loss_counts_a_shared_token_once_per_row(case):
    batch = replace(BATCHES[case], options={"output_router_logits": True})
    assert_equal_to_unshared("qwen3_moe", batch, error=5e-6)


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "weights"])
def test_bfloat16_is_no_further_from_float32_than_the_unshared_forward(mixed):
    """In float32 weights under autocast, which TRL's configs turn on by themselves, and in bfloat16 weights."""
    batch = BATCHES["two groups, left padding of their own"]
    exact, gradients = scored(with_fused_head("qwen2"), batch)
    errors = []
    for model in (with_fused_head("qwen2"), with_shared_prefixes("qwen2")):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out, low = scored(model if mixed else model.bfloat16(), batch)
        log_probs = (out.log_probs - exact.log_probs).norm() / exact.log_probs.norm()
        both = [torch.cat([each[name].flatten().float() for name in gradients]) for each in (low, gradients)]
        errors.append(torch.stack([log_probs.detach(), (both[0] - both[1]).norm() / both[1].norm()]))
    assert (errors[1] < 1.5 * errors[0]).all()


def test_learned_positions_count_from_a_rows_first_token():
    """TRL gives a model no positions, so in its own forward GPT-2's learned ones count the padding on the left."""
    tokens = [[*PROMPT, 3, 4, 5], [*PROMPT, 6, 7, 8]]
    flush, moved = (padded(tokens, [[8, 9, 10]] * 2, left=[pads] * 2) for pads in (0, 5))
    expected = scored(with_fused_head("gpt2"), flush)[0].log_probs[:, -3:]
    assert (scored(with_shared_prefixes("gpt2"), moved)[0].log_probs[:, -3:] - expected).abs().max() < 2e-6
    assert (scored(with_fused_head("gpt2"), moved)[0].log_probs[:, -3:] - expected).abs().max() > 1e-2


def test_a_batch_without_labels_gives_a_loss_of_zero_and_gradients_of_zero():
    rows = [[*PROMPT, 3], [*PROMPT, 4, 5]]
    model, batch = with_shared_prefixes("qwen2"), padded(rows, [[], []])
    out = called(model, batch)
    assert out.loss == 0 and not out.log_probs.any() and not out.label_mask.any()
    (out.loss + out.log_probs.sum() + out.entropy.sum()).backward()
    for parameter in model.parameters():  # each has one: processes wait for each other's
        assert parameter.grad is not None and not parameter.grad.any()


def test_a_shared_row_is_encoded_once():
    trees = []
    model = with_fused_head("qwen2")
    share_prefixes(model, trees.append)
    scored(model, BATCHES["group"])
    assert [tree.num_tokens for tree in trees] == [len(PROMPT) + 2 + 1 + 1 + 4]  # two completions start with a 3


def test_calls_without_the_fused_head_stay_what_they_are():
    batch = BATCHES["two groups, left padding of their own"]
    plain, model = tiny_model("qwen2"), with_shared_prefixes("qwen2")
    assert signature(model.forward) == signature(plain.forward)  # by which `generate` decides what it passes
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
    monkeypatch.setattr(
        trl_forward, "packed_rows", lambda ids, mask, labels: mistake(packed_rows(ids, mask, labels), mask)
    )
    out, gradients = scored(model, batch)
    assert (out.log_probs - expected[0].log_probs).abs().max() > 1e-3
    assert largest_error(out, gradients, *expected) > 1e-2


def test_one_count_per_packed_token_would_break_the_auxiliary_loss_alone(monkeypatch):
    batch = replace(BATCHES["group"], options={"output_router_logits": True})
    expected = scored(with_fused_head("qwen3_moe"), batch)[0]

    def counted_once(*args):
        rows = packed_rows(*args)
        return replace(rows, copies=(rows.copies > 0).long())

    monkeypatch.setattr(trl_forward, "packed_rows", counted_once)
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


def test_dropout_in_training_is_refused_at_the_call():
    model = get_peft_model(with_fused_head("qwen2"), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    share_prefixes(model.eval())
    scored(model, BATCHES["group"])
    with refused(ValueError, "has dropout 0.1, which would differ per copy of a prefix; set it to 0 (lora_dropout=0;"):
        scored(model.train(), BATCHES["group"])


def test_attention_dropout_is_refused_in_training_alone():
    model = with_shared_prefixes("qwen2")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    scored(model.eval(), BATCHES["group"])
    with refused(
        ValueError,
        "has attention_dropout=0.1, which would differ per copy of a prefix; load the model with",
    ):
        scored(model.train(), BATCHES["group"])


def test_virtual_tokens_are_refused():
    model = get_peft_model(with_fused_head("qwen2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with refused(ValueError, "the adapter (PROMPT_TUNING) adds virtual tokens"):
        share_prefixes(model)


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(**SHAPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=OUTPUTS)
    with refused(TypeError, "GptOssForCausalLM has attention sinks, which flexpg's attention has not"):
        share_prefixes(model)


def test_a_model_shares_once():
    with refused(ValueError, "this Qwen2ForCausalLM shares prefixes already; call share_prefixes once"):
        share_prefixes(with_shared_prefixes("qwen2"))


def test_a_refused_model_stays_what_it_was():
    config = transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=OUTPUTS)
    forward = model.forward
    with refused(TypeError, "has layers of conv"):
        share_prefixes(model)
    assert (model.config._attn_implementation, model.forward) == ("sdpa", forward)


def test_a_copy_of_a_model_scores_with_its_own_weights():
    """Of TRL's head, as a reference model or an average of weights may be."""
    model, expected = with_shared_prefixes("qwen2"), with_fused_head("qwen2")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*copied.parameters(), *expected.parameters()):
            parameter.mul_(1.5)
    ours, theirs = scored(copied, BATCHES["group"]), scored(expected, BATCHES["group"])
    assert largest_error(*ours, *theirs) < 5e-6
    assert (called(model, BATCHES["group"]).log_probs - ours[0].log_probs).abs().max() > 0.1


def test_an_adapter_that_depends_on_the_row_is_refused():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    with refused(ValueError, "the adapter (LORA) depends on the whole row"):
        share_prefixes(get_peft_model(with_fused_head("qwen2"), config))


def test_an_attention_that_gives_way_is_named():
    with pytest.warns(UserWarning, match=re.escape("attn_implementation='eager' gives way to flexpg, and to sdpa")):
        share_prefixes(with_fused_head("llama", attn_implementation="eager"))


@pytest.mark.parametrize(("name", "usual"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_the_usual_attention_gives_way_without_a_word(name, usual):
    model = with_fused_head(name, attn_implementation=usual)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share_prefixes(model)


def test_without_trl_it_is_named(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    spec = importlib.util.spec_from_file_location("trl_forward_again", trl_forward.__file__)
    with refused(ImportError, "none is installed: pip install 'trl==1.16.*'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("other", ["1.15.2", "1.17.0", "1.160.0", "2.16.0"])
def test_another_version_of_trl_is_refused(other, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: other)
    spec = importlib.util.spec_from_file_location("trl_forward_again", trl_forward.__file__)
    words = f"flexpg shares prefixes in trl 1.16 and {other} is installed: pip install 'trl==1.16.*'"
    with refused(ImportError, words):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---- whole training runs -------------------------------------------------------------------------------------------

STEPS = 10
WORDS = [
    "count the letters",
    "pad <pad><pad> me",
    "a <eos> b",
    "what",
    "one + one + one ?",
    "zebra <pad>",
    "go on",
    "x",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per letter; "<pad>" and "<eos>" in a text are the pad and the eos token."""
    letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[]))
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")


def prompts() -> Dataset:
    """Of different lengths, some of which hold the pad token and the eos token."""
    return Dataset.from_dict(
        {"prompt": [f"{WORDS[n % 8]} {WORDS[n * 3 % 7]} {'abcdefghij'[n % 10]}" for n in range(24)]}
    )


def preferences() -> Dataset:
    rows = range(16)
    return Dataset.from_dict(
        {
            "prompt": [f"{WORDS[n % 8]} {'abcdefgh'[n % 8] * (n % 5)} " for n in rows],
            "chosen": ["good " + WORDS[(n + 1) % 8] for n in rows],
            "rejected": [("good " if n % 2 else "bad ") + WORDS[(n + 2) % 8] for n in rows],
        }
    )


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], str]:
    """The folder of a tiny model by its name: TRL loads its reference model from a path."""
    folders = {}

    def folder(name: str) -> str:
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            tiny_model(name).save_pretrained(folders[name])
        return folders[name]

    return folder


@dataclass
class Run:
    """A trainer that has trained, with the token ids of what it sampled."""

    trainer: Any
    batches: list[list[tuple[tuple[int, ...], tuple[int, ...]]]]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.trainer.state.log_history

    @property
    def completion_lengths(self) -> set[int]:
        return {len(completion) for batch in self.batches for _, completion in batch}


def own_settings(trainer_class: type) -> tuple[type, dict[str, Any]]:
    if issubclass(trainer_class, DPOTrainer):
        return DPOConfig, {"per_device_train_batch_size": 4, "max_length": 64}
    config = RLOOConfig if issubclass(trainer_class, RLOOTrainer) else GRPOConfig
    return config, {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}


def quiet_settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder + "/runs",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 3e-3,
        "max_steps": STEPS,
        "seed": 7,
    }


def started(
    trainer_class: type,
    folder: str,
    lora: bool = False,
    lora_dropout: float = 0.0,
    evaluated: bool = False,
    attention_dropout: float = 0.0,
    **settings: Any,
) -> Run:
    """A trainer from one seed, about to train."""
    torch.manual_seed(0)  # LoRA draws its matrices before the trainer sets its seed
    config, own = own_settings(trainer_class)
    rollout_func = settings.pop("rollout_func", None)
    options: dict[str, Any] = {"args": config(**quiet_settings(folder) | own | settings), "callbacks": []}
    model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=attention_dropout)
    options |= {"model": model, "processing_class": tokenizer()}
    adapter = LoraConfig(r=4, lora_alpha=32, lora_dropout=lora_dropout, target_modules="all-linear")
    options["peft_config"] = adapter if lora else None
    options["train_dataset"] = preferences() if config is DPOConfig else prompts()
    options["eval_dataset"] = options["train_dataset"].select(range(4)) if evaluated else None
    batches, encode = [], tokenizer()

    def reward(prompts, completions, completion_ids, **columns):
        """Of a completion's letters, so that completions of one prompt differ."""
        ids = encode(prompts)["input_ids"]
        batches.append([(tuple(p), tuple(c)) for p, c in zip(ids, completion_ids, strict=True)])
        return [float(sum(token * 7 % 11 for token in completion) % 5) for completion in completion_ids]

    if config is not DPOConfig:
        options["reward_funcs"] = reward
    if rollout_func is not None:
        options["rollout_func"] = rollout_func
    return Run(trainer_class(**options), batches)


def trained(*args: Any, **settings: Any) -> Run:
    run = started(*args, **settings)
    run.trainer.train()
    return run


class GroupedGRPOTrainer(GRPOTrainer):
    """TRL's own trainer, with the rows of each micro-batch that SharedPrefixGRPOTrainer has."""

    def _prepare_inputs(self, batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = regrouped(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


def metrics(run: Run, names: set[str] | None = None) -> list[dict[str, Any]]:
    """Every line of the log, without times and without flexpg's own."""

    def is_compared(name: str) -> bool:
        timed = re.search("runtime|per_second|step_time|^flexpg/", name)
        return not timed if names is None else name in names

    return [{name: value for name, value in line.items() if is_compared(name)} for line in run.history]


def parameters(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.trainer.model.parameters() if p.requires_grad])


def parameter_error(ours: Run, expected: Run) -> float:
    return ((parameters(ours) - parameters(expected)).norm() / parameters(expected).norm()).item()


def assert_same_metrics(ours: Run, expected: Run, names: set[str] | None = None, error: float = 1e-5) -> None:
    lines, expected_lines = metrics(ours, names), metrics(expected, names)
    assert len(lines) == len(expected_lines) >= STEPS
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(expected_line, rel=error, abs=error)


def assert_trained_alike(ours: Run, expected: Run, names: set[str] | None = None, error: float = 1e-5) -> None:
    assert ours.batches == expected.batches
    assert_same_metrics(ours, expected, names, error)
    assert parameter_error(ours, expected) < error


GRPO_CASES = {
    "dapo, reference, checkpointing": {"loss_type": "dapo", "beta": 0.1, "gradient_checkpointing": True},
    "dr_grpo, two iterations, sequence ratios": {
        "loss_type": "dr_grpo",
        "num_iterations": 2,
        "importance_sampling_level": "sequence",
        "epsilon": 0.02,
    },
    "cispo, two iterations": {"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 1.1},
    "grpo, entropy bonus on high-entropy tokens": {
        "loss_type": "grpo",
        "entropy_coef": 0.5,
        "top_entropy_quantile": 0.4,
    },
    "truncated completions masked, evaluated": {
        "mask_truncated_completions": True,
        "evaluated": True,
        "eval_strategy": "steps",
        "eval_steps": 5,
    },
    "LoRA, reference, two iterations, checkpointing": {
        "lora": True,
        "beta": 0.1,
        "num_iterations": 2,
        "gradient_checkpointing": True,
        "learning_rate": 1e-2,
    },
    "experts, auxiliary loss": {"model": "qwen3_moe"},
}
# What a case is there for: in some line of its log these are above 0, and below 1 where they are ratios.
HAPPENED = {
    "dapo, reference, checkpointing": ["kl"],
    "dr_grpo, two iterations, sequence ratios": ["clip_ratio/region_mean"],
    "cispo, two iterations": ["cispo_clip_ratio"],
    "grpo, entropy bonus on high-entropy tokens": ["entropy_coef"],
    "truncated completions masked, evaluated": ["completions/clipped_ratio", "eval_completions/clipped_ratio"],
    "LoRA, reference, two iterations, checkpointing": ["kl", "clip_ratio/region_mean"],
    "experts, auxiliary loss": ["aux_loss"],
}


def logged(run: Run, name: str) -> list[float]:
    return [line[name] for line in run.history if name in line]


def test_prompts_differ_in_length_and_hold_pad_and_eos_tokens():
    ids = tokenizer()(list(prompts()["prompt"]))["input_ids"]
    assert len({len(row) for row in ids}) > 5 and len(set(map(tuple, ids))) == len(ids)
    assert any(PAD in row for row in ids) and any(EOS in row for row in ids)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRPO_CASES)
def test_grpo_trains_as_trls_own_trainer(case, saved):
    settings = dict(GRPO_CASES[case])
    folder = saved(settings.pop("model", "qwen2"))
    ours, expected = trained(SharedPrefixGRPOTrainer, folder, **settings), trained(GRPOTrainer, folder, **settings)
    assert_trained_alike(ours, expected)
    assert len(ours.completion_lengths) > 3
    assert all(any(0 < value < 1 or name == "aux_loss" for value in logged(ours, name)) for name in HAPPENED[case])


@pytest.mark.slow
def test_gradient_accumulation_trains_as_trls_own_trainer(saved):
    settings = {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2}
    settings |= {"folder": saved("qwen2"), "per_device_train_batch_size": 4}
    ours = trained(SharedPrefixGRPOTrainer, **settings)
    assert_trained_alike(ours, trained(GroupedGRPOTrainer, **settings))
    assert_trained_alike(ours, trained(GRPOTrainer, **settings), {"loss", "grad_norm", "reward", "reward_std"})


def rollouts_with_tool_tokens(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    """Random completions in which a tool speaks between the model's tokens; two of each four start alike."""
    draw = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(2, VOCAB, (len(prompts), 9), generator=draw)
    ids[1::4, :6] = ids[::4, :6]
    completions = [row[: 5 + n % 5].tolist() for n, row in enumerate(ids)]
    by_model = [[int(not 2 <= place < 2 + n % 3) for place in range(len(c))] for n, c in enumerate(completions)]
    own = tokenizer()(prompts)["input_ids"]
    return {"prompt_ids": own, "completion_ids": completions, "logprobs": None, "env_mask": by_model}


@pytest.mark.slow
def test_tool_tokens_are_context_and_not_trained_as_in_trls_own_trainer(saved, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental
    settings = {"folder": saved("qwen2"), "rollout_func": rollouts_with_tool_tokens, "beta": 0.1, "num_iterations": 2}
    ours, expected = trained(SharedPrefixGRPOTrainer, **settings), trained(GRPOTrainer, **settings)
    assert_trained_alike(ours, expected)
    assert not all(batch["tool_mask"].all() for batch in ours.trainer._buffered_inputs)


@pytest.mark.slow
def test_rloo_trains_as_trls_own_trainer(saved):
    settings = {"folder": saved("qwen2"), "beta": 0.1, "num_iterations": 2}
    ours, expected = trained(SharedPrefixRLOOTrainer, **settings), trained(RLOOTrainer, **settings)
    assert_trained_alike(ours, expected)
    assert max(logged(ours, "kl")) > 0 and min(logged(ours, "flexpg/tokens_saved")) > 0


DPO_CASES = {
    "sigmoid, evaluated": {"loss_type": ["sigmoid"], "evaluated": True, "eval_strategy": "steps", "eval_steps": 5},
    "sigmoid and bco_pair, weighted": {"loss_type": ["sigmoid", "bco_pair"], "use_weighting": True},
    "LoRA": {"loss_type": ["sigmoid"], "lora": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_trains_as_trls_own_trainer(case, saved):
    settings = {"folder": saved("qwen2"), **DPO_CASES[case]}
    ours, expected = trained(SharedPrefixDPOTrainer, **settings), trained(DPOTrainer, **settings)
    assert_trained_alike(ours, expected)
    assert {"entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins"} <= set(ours.history[0])
    assert min(logged(ours, "flexpg/tokens_saved")) > 0


def test_an_entropy_without_its_gradient_would_train_something_else(saved, monkeypatch):
    settings = {"folder": saved("qwen2"), "entropy_coef": 0.5, "max_steps": 1}
    expected, ours = trained(GRPOTrainer, **settings), trained(SharedPrefixGRPOTrainer, **settings)
    whole = trl_forward._shared_forward

    def without_gradient(*args, **kwargs):
        out = whole(*args, **kwargs)
        return replace(out, entropy=out.entropy.detach())

    monkeypatch.setattr(trl_forward, "_shared_forward", without_gradient)
    wrong = trained(SharedPrefixGRPOTrainer, **settings)
    assert parameter_error(ours, expected) < 1e-5 < 1e-3 < parameter_error(wrong, expected)


def test_the_reference_and_the_old_policy_are_shared_too(saved, monkeypatch):
    trees = []

    def counted(*args):
        rows = packed_rows(*args)
        trees.append(rows.tree)
        return rows

    monkeypatch.setattr(trl_forward, "packed_rows", counted)
    run = trained(SharedPrefixGRPOTrainer, saved("qwen2"), beta=0.1, num_iterations=2, max_steps=2)
    assert len(trees) == 4  # old, reference, and two updates
    assert {tree.num_tokens for tree in trees} == {prefixes(run.batches[0])}


# ---- groups --------------------------------------------------------------------------------------------------------


def generated(groups: int, size: int) -> dict[str, Any]:
    """Rows as TRL has them, in the order of generating: row n is of prompt n // size, and its number is in it."""
    n = torch.arange(groups * size)
    return {
        "prompt_ids": torch.stack([torch.full_like(n, PAD), 5 + n // size, torch.full_like(n, PAD)], 1),
        "prompt_mask": torch.tensor([[0, 1, 1]]).repeat(len(n), 1),
        "completion_ids": n[:, None] * 10,
        "advantages": n.float(),
        "num_items_in_batch": torch.tensor(99),
        "old_per_token_logps": None,
        "names": [f"row {number}" for number in n.tolist()],
    }


def micro_batches(rows: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    return split_tensor_dict(shuffle_sequence_dict(rows), count)


@pytest.mark.parametrize(
    ("groups", "size", "count"), [(4, 4, 4), (4, 4, 2), (4, 4, 8), (3, 4, 4), (5, 2, 1), (4, 1, 2)]
)
def test_regrouped_micro_batches_hold_every_row_once_and_groups_in_one_piece(groups, size, count):
    whole = generated(groups, size)
    for seed in range(10):
        batches = regrouped(micro_batches(whole, count, seed))
        assert [len(batch["advantages"]) for batch in batches] == [groups * size // count] * count
        order = torch.cat([batch["advantages"] for batch in batches]).long()
        assert order.sort().values.tolist() == list(range(groups * size))
        for name in ("prompt_ids", "prompt_mask", "completion_ids"):
            assert torch.equal(torch.cat([batch[name] for batch in batches]), whole[name][order])
        assert [name for batch in batches for name in batch["names"]] == [f"row {n}" for n in order.tolist()]
        assert all(batch["num_items_in_batch"] == 99 and batch["old_per_token_logps"] is None for batch in batches)
        assert sum(a != b for a, b in pairwise((order // size).tolist())) == groups - 1  # cut by borders alone


def test_groups_are_shuffled_as_trl_shuffles_rows():
    orders = set()
    for seed in range(20):
        batches = micro_batches(generated(4, 4), 4, seed)
        shuffled = torch.cat([batch["advantages"] for batch in batches]).long() // 4
        first_seen = tuple(dict.fromkeys(shuffled.tolist()))
        state = torch.get_rng_state()
        assert tuple(int(batch["advantages"][0]) // 4 for batch in regrouped(batches)) == first_seen
        assert torch.equal(torch.get_rng_state(), state)
        orders.add(first_seen)
    assert len(orders) > 8


def test_a_group_is_known_by_its_prompts_tokens_whatever_stands_in_the_padding():
    rows = generated(2, 2)
    rows["prompt_ids"][2, 0] = 9
    order = [0, 2, 1, 3]
    mixed = {
        name: value[order] if isinstance(value, Tensor) and value.dim() else value
        for name, value in rows.items()
        if name != "names"
    }
    assert regrouped([mixed])[0]["advantages"].tolist() == [0, 1, 2, 3]
    mixed["prompt_mask"] = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]])  # row 2's 9 is a token now
    assert regrouped([mixed])[0]["advantages"].tolist() == [0, 1, 2, 3]
    mixed["prompt_mask"] = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1]])  # and here row 1's pad id
    assert regrouped([mixed])[0]["advantages"].tolist() == [0, 2, 3, 1]


def row(batch: dict[str, Tensor], n: int) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    parts = [batch[f"{part}_ids"][n][batch[f"{part}_mask"][n].bool()] for part in ("prompt", "completion")]
    return *(tuple(part.tolist()) for part in parts), batch["advantages"][n].item()


@pytest.mark.parametrize(
    "ours_and_trls", [(SharedPrefixGRPOTrainer, GRPOTrainer), (SharedPrefixRLOOTrainer, RLOOTrainer)]
)
def test_preparing_a_batch_draws_trls_random_numbers_and_keeps_groups_whole(ours_and_trls, saved):
    buffers, states = [], []
    for trainer_class in ours_and_trls:
        settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}
        trainer = started(trainer_class, saved("qwen2"), **settings).trainer
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        torch.manual_seed(5)
        trainer._prepare_inputs(batch)
        buffers.append([[row(batch, n) for n in range(4)] for batch in trainer._buffered_inputs])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    ours, expected = ([*chain(*buffer)] for buffer in buffers)
    assert ours != expected and sorted(ours) == sorted(expected)
    prompts_of_each = [[len({prompt for prompt, _, _ in batch}) for batch in buffer] for buffer in buffers]
    assert prompts_of_each[0] == [1, 1, 1] and max(prompts_of_each[1]) > 1


@pytest.mark.parametrize(
    ("rows", "group", "in_all", "parts"),
    [(8, 8, 32, 1), (16, 8, 32, 1), (4, 8, 32, 2), (1, 8, 8, 8), (6, 4, 24, 4 / 3), (3, 4, 12, 2), (5, 2, 10, 6 / 5)],
)
def test_parts_per_group_counts_the_micro_batches_that_encode_a_prompt(rows, group, in_all, parts):
    assert parts_per_group(rows, group, in_all) == pytest.approx(parts)


@pytest.mark.parametrize("trainer_class", [SharedPrefixGRPOTrainer, SharedPrefixRLOOTrainer])
def test_micro_batches_that_cut_groups_are_warned_of_with_their_cost(trainer_class, saved):
    settings = {"per_device_train_batch_size": 4, "num_generations": 8, "gradient_accumulation_steps": 2}
    words = "per_device_train_batch_size=4 cuts groups of num_generations=8: a prompt is encoded 2 times per update"
    with pytest.warns(UserWarning, match=re.escape(words)):
        started(trainer_class, saved("qwen2"), **settings)


def test_micro_batches_of_whole_groups_and_the_usual_attention_are_not_warned_of(saved):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started(SharedPrefixGRPOTrainer, saved("qwen2"))
    assert not [w for w in caught if "cuts groups" in str(w.message) or "gives way" in str(w.message)]


# ---- what the log says ---------------------------------------------------------------------------------------------


def prefixes(rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
    """Tokens to encode, counted as all the different beginnings of all rows."""
    return len({(prompt + own)[: n + 1] for prompt, own in rows for n in range(len(prompt + own))})


@pytest.mark.parametrize(("rows", "accumulated"), [(8, 1), (4, 2)])
def test_the_log_counts_the_tokens_of_each_steps_update_alone(rows, accumulated, saved):
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated, "max_steps": 3}
    settings |= {"evaluated": True, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    run = trained(SharedPrefixGRPOTrainer, saved("qwen2"), beta=0.1, **settings)
    lines = [line for line in run.history if "loss" in line]
    sampled = [batch for batch in run.batches if len(batch) == 8]  # those of 4 are evaluation's
    assert len(lines) == len(sampled) == 3 < len(run.batches)
    for line, batch in zip(lines, sampled, strict=True):
        tokens = sum(prefixes(batch[n : n + rows]) for n in range(0, 8, rows))
        saved_tokens = sum(len(prompt + own) for prompt, own in batch) - tokens
        assert (line["flexpg/tokens"], line["flexpg/tokens_saved"]) == (tokens, saved_tokens)
        seconds = line["flexpg/update_s"]
        assert 0 < seconds < line["step_time"] * 1.01
        assert line["flexpg/update_s_saved_estimate"] == pytest.approx(seconds * saved_tokens / tokens, rel=1e-5)
    assert not [name for line in run.history if "loss" not in line for name in line if "flexpg" in name]


# ---- after training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def short_run(saved) -> Run:
    return trained(SharedPrefixGRPOTrainer, saved("qwen2"), max_steps=2)


def test_a_saved_model_is_an_ordinary_checkpoint(short_run, tmp_path):
    short_run.trainer.save_model(str(tmp_path))
    assert "flexpg" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    trained_weights = short_run.trainer.model.state_dict()
    assert all(torch.equal(weight, trained_weights[name]) for name, weight in model.state_dict().items())


def test_the_trained_model_generates_as_a_plain_one_of_its_weights(short_run, tmp_path):
    short_run.trainer.save_model(str(tmp_path))
    plain, model = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), short_run.trainer.model.eval()
    batch = padded([[5, 6, 7, PAD, 8], [8, 9]], [[], []], left=[0, 3])
    for sampling in ({"do_sample": False}, {"do_sample": True}):
        texts = []
        for each in (model, plain):
            torch.manual_seed(3)
            texts.append(
                each.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=9, **sampling)
            )
        assert torch.equal(*texts)


# ---- options that are refused when a trainer is made -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"torch_compile": True}, "torch_compile=True would compile anew for every batch's prefix tree; leave it off"),
        (
            {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True generates with sdpa alone; leave it off",
        ),
        (
            {"attention_dropout": 0.1},
            "has attention_dropout=0.1, which would differ per copy of a prefix; load the model with",
        ),
        (
            {"lora": True, "lora_dropout": 0.1},
            "has dropout 0.1, which would differ per copy of a prefix; set it to 0 (lora_dropout=0;",
        ),
    ],
    ids=["torch_compile", "continuous batching", "attention's dropout", "LoRA's dropout"],
)
def test_an_option_that_cannot_be_is_refused_before_training(saved, settings, words):
    with refused(ValueError, words):
        started(SharedPrefixGRPOTrainer, saved("qwen2"), **settings)


# ---- two processes -------------------------------------------------------------------------------------------------


def trained_parameters(rank: int, folder: str) -> list[Tensor]:
    """Of TRL's own trainer and of ours, in one of several processes."""
    settings = {"max_steps": 3, "beta": 0.1}
    return [parameters(trained(each, folder, **settings)) for each in (GRPOTrainer, SharedPrefixGRPOTrainer)]


@pytest.mark.slow
def test_two_processes_train_as_trls_own_trainer(saved):
    (expected, ours), (_, on_the_other) = run_processes(2, trained_parameters, saved("qwen2"))
    assert torch.equal(ours, on_the_other)
    assert (ours - expected).norm() / expected.norm() < 1e-5
