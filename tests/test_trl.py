"""TRL's trainers: with shared prefixes they train as TRL's own do, which are the oracle of losses and parameters.

Models compute in float64 throughout, so steps of training agree to many digits on any CPU; in float32 the optimizer
would amplify rounding by an amount that depends on the CPU. A metric that is a mean over micro-batches depends on which
rows share one, so with gradient accumulation its oracle is TRL's own trainer with the same rows in each micro-batch.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import random
import re
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from itertools import chain, pairwise
from shutil import rmtree
from typing import Any

import hf_models as hf
import pytest
import torch
import transformers
import trl.trainer.utils
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ParallelismConfig, TorchDynamoPlugin, convert_outputs_to_fp32
from cases import VOCAB, assert_within_budget, float32_floor
from cases import largest_error as largest_relative_error
from datasets import Dataset
from float64 import float32_is_float64
from hf_models import SHAPE, in_float64
from peft import LoraConfig, get_peft_model
from processes import run_processes
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict, split_tensor_dict
from trl_runs import GROUP_OPTIONS, QUIET, Float64Head, Run, assert_trained_alike

import flexpg
from flexpg.integrations.trl import (
    SharedPrefixDPOTrainer,
    SharedPrefixGRPOTrainer,
    SharedPrefixRLOOTrainer,
    batches_per_group,
    regroup,
    share_prefixes,
    versions,
)
from flexpg.integrations.trl import forward as trl_forward
from flexpg.integrations.trl.forward import pack_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning")  # TRL's use of transformers

PAD, EOS = SHAPE["pad_token_id"], SHAPE["eos_token_id"]
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MOE = {"router_aux_loss_coef": 0.1, "norm_topk_prob": True, **hf.FLOAT64_EXPERTS}
# The experts' auxiliary loss, Cohere's RoPE and Gemma2's softmax compute in float32 in a float64 model too.
TOLERANCE = {"qwen3_moe": float32_floor(), "cohere": float32_floor(), "gemma2": float32_floor()}


TRLS_HEAD = trl.trainer.utils._ChunkedLogProbFunction


@pytest.fixture(autouse=True)
def float64_head(monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Head)


def fused_model(name: str, convert: Callable = in_float64) -> transformers.PreTrainedModel:
    """Build a model of hf_models with TRL's fused output layer."""
    model = convert(hf.tiny_model(name, **(MOE if name in ("qwen3_moe", "gpt_oss") else {})))
    add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
    return model


def shared_model(name: str, convert: Callable = in_float64) -> transformers.PreTrainedModel:
    model = fused_model(name, convert)
    share_prefixes(model)
    return model


# One forward.

Batch = dict[str, Any]  # what a model is called with


def padded(rows: list[list[int]], scored: list[list[int]], left: list[int] | None = None, width: int = 0) -> Batch:
    """Pad rows, with `left` padding tokens before each; the tokens at the places `scored` are labels."""
    left = left or [0] * len(rows)
    width = max(width, *(before + len(row) for before, row in zip(left, rows, strict=True)))
    ids = torch.full((len(rows), width), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for n, (row, places, before) in enumerate(zip(rows, scored, left, strict=True)):
        ids[n, before : before + len(row)] = torch.tensor(row)
        mask[n, before : before + len(row)] = 1
        for place in places:
            labels[n, before + place] = row[place]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def random_batch(seed: int) -> Batch:
    """Draw rows that share beginnings of any length, some equal, some without a label; padded on both sides."""
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
    """Pad one prompt's completions, whose tokens are the labels."""
    rows = [prompt + completion for completion in completions]
    return padded(rows, [[*range(len(prompt), len(row))] for row in rows], **padding)


PROMPT = [5, PAD, 7, EOS, 9, 9, PAD, 4]
GROUP = group(PROMPT, [3, 4, 5], [3, 8], [6, 6, 6, 6], left=[2, 2, 2], width=16)
TWO_GROUPS = padded(
    [[*PROMPT, 3, 4], [*PROMPT, 5, 6], [8, 2, 3, 4, 5], [8, 2, 7]], [[8, 9], [8, 9], [2, 3, 4], [2]], [0, 0, 6, 6]
)
ONE = group(PROMPT, [3, 4, 5])
BATCHES = {
    "group": GROUP,
    "two_groups_left_padded": TWO_GROUPS,
    "group_of_one": ONE,
    "equal_rows": group(PROMPT, [3, 4], [3, 4], [3, 4]),
    "row_extends_another": group(PROMPT, [3, 4], [3, 4, 5, 6], [3]),
    "empty_completion": group(PROMPT, [3, 4], [], [6]),
    "equal_rows_other_labels": padded([[5, 6, 7, 8]] * 3, [[1, 3], [2], []]),
    "tool_tokens": padded([[*PROMPT, 3, 4, 5, 6], [*PROMPT, 3, 4, 8, 9]], [[8, 11], [8, 10, 11]]),
    "one_label": padded([PROMPT, PROMPT], [[], [3]]),
    "label_in_first_column": {**ONE, "labels": ONE["input_ids"]},  # which TRL ignores
}


def results(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return outputs, and gradients of a sum that weighs every log-probability and entropy differently."""
    out = model(**batch, fused_lm_head=True)
    weights = torch.randn((2, *out.log_probs.shape), generator=torch.Generator().manual_seed(1))
    total = (weights[0] * out.log_probs).sum() + (weights[1] * out.entropy).sum() + out.loss
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(total, parameters.values(), allow_unused=True, materialize_grads=True)
    outputs = {name: getattr(out, name) for name in (*OUTPUTS, "label_mask", "loss", "aux_loss")}
    outputs = {name: value.detach().double() for name, value in outputs.items() if value is not None}
    return outputs | dict(zip(parameters, gradients, strict=True))


def largest_error(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest absolute error; outputs and gradients are of size 1."""
    assert list(values) == list(expected)
    return max((values[name] - expected[name]).abs().max().item() for name in expected)


def assert_equals_trl(name: str, batch: Batch) -> None:
    ours = results(shared_model(name), batch)
    assert largest_error(ours, results(fused_model(name), batch)) < TOLERANCE.get(name, 1e-12)
    for output in OUTPUTS:
        assert not ours[output][batch["labels"][:, 1:] == -100].any()


@pytest.mark.parametrize("case", BATCHES)
def test_fused_outputs_and_gradients_equal_trl(case):
    assert_equals_trl("llama", BATCHES[case])


def test_fused_outputs_of_random_batches_equal_trl():
    for seed in range(40):
        assert_equals_trl("llama", random_batch(seed))


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h", "lfm2"])
def test_recurrent_layers_equal_trl(name):
    with float32_is_float64():
        for case in ("two_groups_left_padded", "row_extends_another", "tool_tokens"):
            ours, trls = (make(name, nn.Module.double) for make in (shared_model, fused_model))
            assert largest_error(results(ours, BATCHES[case]), results(trls, BATCHES[case])) < 1e-11


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "qwen2", "gpt_oss"])
def test_softcap_sliding_window_sinks_logit_scale_equal_trl(name):
    batches = [BATCHES["row_extends_another"], BATCHES["tool_tokens"]]
    if name != "gemma2":  # whose eager attention gives NaN on the left in float64
        batches += [GROUP, TWO_GROUPS, random_batch(3)]
    for batch in batches:
        assert_equals_trl(name, batch)


@pytest.mark.parametrize("case", ["group", "equal_rows", "empty_completion"])
def test_moe_auxiliary_loss_counts_a_shared_token_once_per_row(case):
    assert_equals_trl("qwen3_moe", {**BATCHES[case], "output_router_logits": True})


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_fused_outputs_in_low_precision_within_error_budget(kind, monkeypatch):
    """With TRL's own output layer. TRL's configs enable autocast by default."""

    def summary(model: nn.Module, is_mixed: bool = False) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            found = results(model, TWO_GROUPS)
        gradients = [value.double().flatten() for name, value in found.items() if name.endswith(("weight", "bias"))]
        return {"log_probs": found["log_probs"], "gradients": torch.cat(gradients)}

    truth = summary(fused_model("qwen2"))
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", TRLS_HEAD)
    weights = torch.bfloat16 if kind == "bfloat16" else torch.float32
    baseline, ours = (
        summary(make("qwen2", lambda model: model.to(weights)), is_mixed=kind == "autocast")
        for make in (fused_model, shared_model)
    )
    eps = torch.finfo(torch.float32 if kind == "float32" else torch.bfloat16).eps
    assert largest_relative_error(baseline, truth) < 16 * eps
    assert_within_budget(ours, baseline, truth)


def test_learned_positions_count_from_the_first_token():
    """TRL passes no positions, so in its own forward GPT-2's learned ones count the padding on the left."""
    rows = [[*PROMPT, 3, 4, 5], [*PROMPT, 6, 7, 8]]
    flush, moved = (padded(rows, [[8, 9, 10]] * 2, left=[before] * 2) for before in (0, 5))
    expected = fused_model("gpt2")(**flush, fused_lm_head=True).log_probs[:, -3:]
    assert (shared_model("gpt2")(**moved, fused_lm_head=True).log_probs[:, -3:] - expected).abs().max() < 1e-12
    assert (fused_model("gpt2")(**moved, fused_lm_head=True).log_probs[:, -3:] - expected).abs().max() > 1e-2


def test_batch_without_labels_has_zero_loss_and_zero_gradients():
    model, batch = shared_model("qwen2"), padded([[*PROMPT, 3], [*PROMPT, 4, 5]], [[], []])
    out = model(**batch, fused_lm_head=True)
    assert out.loss == 0 and not out.log_probs.any() and not out.label_mask.any()
    (out.loss + out.log_probs.sum() + out.entropy.sum()).backward()
    for parameter in model.parameters():  # each has one: ranks wait for one another's
        assert parameter.grad is not None and not parameter.grad.any()


def test_shared_prefix_is_encoded_once():
    trees = []
    model = fused_model("qwen2")
    share_prefixes(model, trees.append)
    model(**GROUP, fused_lm_head=True)
    assert [tree.num_tokens for tree in trees] == [len(PROMPT) + 2 + 1 + 1 + 4]  # two completions start with a 3


def test_calls_without_the_fused_head_are_bitwise_identical():
    plain, model = in_float64(hf.tiny_model("qwen2")), shared_model("qwen2")
    assert signature(model.forward) == signature(plain.forward)  # which decides what `generate` passes
    out, expected = model(**TWO_GROUPS), plain(**TWO_GROUPS)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    prompts = padded([[5, 6, 7], [8, 9]], [[], []], left=[0, 1])
    prompts |= {"labels": None, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompts), plain.generate(**prompts))


# What is refused.


def refused(error: type[Exception], words: str):
    return pytest.raises(error, match=re.escape(words))


@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids", "position_ids", "shift_labels", "labels"])
def test_inputs_other_than_padded_text_are_refused(name):
    got = "input_ids, attention_mask or labels missing" if name == "labels" else name
    with refused(ValueError, f"inputs must be padded text with or without images, got {got}; use TRL's own trainer"):
        shared_model("llama")(**{**GROUP, name: None if name == "labels" else GROUP["labels"]}, fused_lm_head=True)


HOLE = "attention_mask must be one run of ones in each row, got a gap in row 1"
UNPREDICTED = "labels must be -100 at padding and at the first token, got a label there in row 1"


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
def test_padding_between_tokens_and_unpredicted_labels_are_refused(mask, labels, words):
    ids = torch.tensor([[5, 6, 7, 8]] * 2)
    masks, both = torch.tensor([[1, 1, 1, 1], mask]), torch.tensor([[-100, 6, 7, 8], labels])
    with refused(ValueError, words):
        pack_batch(ids, masks, both)


def with_lora_dropout() -> nn.Module:
    return get_peft_model(fused_model("llama"), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))


def with_attention_dropout() -> nn.Module:
    model = fused_model("llama")
    model.model.layers[1].self_attn.attention_dropout = 0.1
    return model


@pytest.mark.parametrize("make", [with_lora_dropout, with_attention_dropout])
def test_dropout_is_refused_in_training_only(make):
    model = make().eval()
    share_prefixes(model)
    model(**GROUP, fused_lm_head=True)
    with pytest.raises(ValueError, match=r"dropout.* 0\.1|dropout=0\.1"):
        model.train()(**GROUP, fused_lm_head=True)


def test_share_prefixes_twice_is_refused():
    with refused(ValueError, "this LlamaForCausalLM shares prefixes already; call share_prefixes once"):
        share_prefixes(shared_model("llama"))


def test_share_prefixes_before_the_trainer_is_refused():
    with refused(ValueError, "must have TRL's fused output layer, which a trainer adds in its __init__; call share_p"):
        share_prefixes(hf.tiny_model("llama"))


def test_share_prefixes_takes_a_head_that_accelerate_wraps():
    model = fused_model("llama")
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    share_prefixes(model)
    assert model(**GROUP, fused_lm_head=True).log_probs.shape == GROUP["labels"][:, 1:].shape


@pytest.mark.parametrize("share", [share_prefixes, flexpg.enable])
@pytest.mark.parametrize("name", ["llama", "granite"])
def test_model_of_a_trainer_works_in_a_loop_of_its_user(name, share):
    model, baseline = fused_model(name), in_float64(hf.tiny_model(name))
    share(model)
    rollouts = flexpg.Rollouts.from_groups([[5, 6, 7, 8]], [[[9, 10], [9, 11, 12]]], [[1.0, 0.0]])
    flexpg.self_check(model.train(), rollouts)
    for _, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=100):
        expected = hf.baseline_logprobs(baseline, [row.tolist() for row in rollouts.sequences], [4, 4])
        assert (logprobs - expected).abs().max() < 1e-12


def test_refused_model_is_unchanged():
    model = AutoModelForCausalLM.from_config(transformers.RecurrentGemmaConfig(**SHAPE))
    add_fused_lm_head(model, outputs=OUTPUTS)
    forward = model.forward
    with refused(TypeError, "has linear_attention layers"):
        share_prefixes(model)
    assert (model.config._attn_implementation, model.forward) == ("sdpa", forward)


def test_copied_model_uses_its_own_weights():
    """TRL's head is copied too, as for a reference model or an average of weights."""
    model, expected = shared_model("llama"), fused_model("llama")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*copied.parameters(), *expected.parameters()):
            parameter.mul_(1.5)
    ours = results(copied, GROUP)
    assert largest_error(ours, results(expected, GROUP)) < 1e-12
    assert (model(**GROUP, fused_lm_head=True).log_probs - ours["log_probs"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "before", "warns"),
    [("llama", "eager", True), ("llama", "sdpa", False), ("gemma2", "eager", False)],
)
def test_replaced_attention_warns_unless_it_is_the_usual_one(name, before, warns):
    model = fused_model(name)
    model.set_attn_implementation(before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        share_prefixes(model)
    expected = "replacing attn_implementation='eager' by 'flexpg', which uses sdpa outside of packed forwards"
    assert [str(w.message) for w in caught] == ([expected] if warns else [])


def test_rope_scaling_by_the_longest_sequence_warns():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, rope_parameters=rope))
    add_fused_lm_head(model, outputs=OUTPUTS)
    with pytest.warns(UserWarning, match=r"RoPE scaling 'dynamic' .* exceeds 256 tokens, .* within 256 tokens"):
        share_prefixes(model)


def installed_version(other: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if other == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        return other

    return version


@pytest.mark.parametrize("other", ["1.15.2", "0.29.1", "none"])
def test_older_version_of_trl_is_refused(other, monkeypatch):
    monkeypatch.setattr(versions, "version", installed_version(other))
    with refused(ImportError, f"trl must be 1.16 or newer, got {other}: pip install 'flexpg[trl]'"):
        versions.check_version()


@pytest.mark.parametrize("other", ["1.17.0", "1.160.0", "2.16.0"])
def test_newer_version_of_trl_warns_if_it_has_not_changed(other, monkeypatch):
    monkeypatch.setattr(versions, "version", installed_version(other))
    message = f"flexpg was tested with trl 1.16, and {other} is installed; compare the losses of a few steps"
    with pytest.warns(UserWarning, match=message):
        versions.check_version()
    monkeypatch.setattr(versions, "version", installed_version("1.16.3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_version()


@dataclass
class OtherOutput:
    log_probs: torch.Tensor


def no_chunks(tensor_dict):
    return [tensor_dict]


@pytest.mark.parametrize(
    ("name", "changed", "missing"),
    [
        ("FusedCausalLMOutput", OtherOutput, "FusedCausalLMOutput.entropy"),
        ("split_tensor_dict", no_chunks, r"split_tensor_dict\(num_chunks\)"),
    ],
)
def test_changed_private_part_of_trl_is_refused(name, changed, missing, monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, name, changed)
    with pytest.raises(ImportError, match=f"has changed where flexpg extends it .*{missing}.*pip install 'trl==1.16"):
        versions.check_version()


# Training.

CHARACTERS = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz +?"]
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
    """Build a tokenizer with a token per letter; "<pad>" and "<eos>" in a text are the special tokens."""
    letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[]))
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")


def prompts() -> Dataset:
    """Return prompts of different lengths, some of which contain the padding or the end-of-sequence token."""
    texts = [f"{WORDS[n % 8]} {WORDS[n * 3 % 7]} {'abcdefghij'[n % 10]}" for n in range(24)]
    return Dataset.from_dict({"prompt": texts})


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
    """Return the folder of a tiny model by its name: TRL loads its reference model from a path."""
    folders = {}

    def folder(name: str) -> str:
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            changes = {key: MOE[key] for key in ("router_aux_loss_coef", "norm_topk_prob")} if "moe" in name else {}
            if name in hf.COMPOSITES:
                config = copy.deepcopy(hf.COMPOSITES[name])
                config.text_config.vocab_size = len(CHARACTERS)
                hf.model_from_config(config).save_pretrained(folders[name])
                return folders[name]
            hf.tiny_model(name, vocab_size=len(CHARACTERS), **changes).save_pretrained(folders[name])
        return folders[name]

    return folder


def make_run(
    trainer_class: type,
    folder: str,
    lora: bool = False,
    lora_dropout: float = 0.0,
    evaluated: bool = False,
    attention_dropout: float = 0.0,
    rollout_func: Callable | None = None,
    convert: Callable = in_float64,
    **settings: Any,
) -> Run:
    """Build a trainer of a float64 model, or of what `convert` returns, always from the same seed."""
    torch.manual_seed(0)  # LoRA draws its matrices before the trainer sets its seed
    is_dpo = issubclass(trainer_class, DPOTrainer)
    config = DPOConfig if is_dpo else RLOOConfig if issubclass(trainer_class, RLOOTrainer) else GRPOConfig
    batching = {"per_device_train_batch_size": 4, "max_length": 64} if is_dpo else GROUP_OPTIONS
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]  # as TRL does
    changes = {"attention_dropout": attention_dropout} if attention_dropout else {}
    model = getattr(transformers, architecture).from_pretrained(folder, experts_implementation="eager", **changes)
    adapter = LoraConfig(r=4, lora_alpha=32, lora_dropout=lora_dropout, target_modules="all-linear")
    dataset, encode = preferences() if is_dpo else prompts(), tokenizer()
    batches = []

    def reward(prompts, completions, completion_ids, **columns):
        """Reward a completion's letters, so that the completions of a prompt differ."""
        ids = encode(prompts)["input_ids"]
        batches.append([(tuple(p), tuple(c)) for p, c in zip(ids, completion_ids, strict=True)])
        return [float(sum(token * 7 % 11 for token in completion) % 5) for completion in completion_ids]

    options = {} if is_dpo else {"reward_funcs": reward}
    options |= {} if rollout_func is None else {"rollout_func": rollout_func}
    trainer = trainer_class(
        model=convert(model),
        args=config(**{"output_dir": folder + "/runs"} | QUIET | batching | settings),
        processing_class=tokenizer(),
        peft_config=adapter if lora else None,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)) if evaluated else None,
        **options,
    )
    for each in (trainer.model, trainer.ref_model):  # TRL adds adapters and loads a reference model in float32
        if each is not None:
            convert(each)
            each.config._experts_implementation = "eager"  # torch's grouped product has no float64
    return Run(trainer, batches)


def train(*args: Any, **settings: Any) -> Run:
    run = make_run(*args, **settings)
    run.trainer.train()
    return run


class Regrouped:
    """TRL's own trainer, with the rows of each micro-batch that the trainer with shared prefixes has."""

    def _prepare_inputs(self, batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = regroup(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


class RegroupedGRPOTrainer(Regrouped, GRPOTrainer):
    pass


class RegroupedRLOOTrainer(Regrouped, RLOOTrainer):
    pass


# Each case with the metrics that show that what it is there for has happened: in some line of the log they are above 0
# and, unless they are the auxiliary loss, below 1.
GRPO_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dapo_reference_checkpointing": ({"loss_type": "dapo", "beta": 0.1, "gradient_checkpointing": True}, ["kl"]),
    "dr_grpo_two_iterations_sequence_ratios": (
        {
            "loss_type": "dr_grpo",
            "num_iterations": 2,
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
        },
        ["clip_ratio/region_mean"],
    ),
    "cispo_two_iterations": ({"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 1.1}, ["cispo_clip_ratio"]),
    "grpo_entropy_bonus": (
        {"loss_type": "grpo", "entropy_coef": 0.5, "top_entropy_quantile": 0.4},
        ["entropy_coef"],
    ),
    "masked_truncated_completions_evaluated": (
        {
            "mask_truncated_completions": True,
            "evaluated": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        ["completions/clipped_ratio", "eval_completions/clipped_ratio"],
    ),
    "lora_reference_two_iterations_checkpointing": (
        {
            "lora": True,
            "beta": 0.1,
            "num_iterations": 2,
            "gradient_checkpointing": True,
            "learning_rate": 1e-2,
        },
        ["kl", "clip_ratio/region_mean"],
    ),
    "moe_auxiliary_loss": ({"model": "qwen3_moe"}, ["aux_loss"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GRPO_CASES)
def test_grpo_trains_as_trl(case, saved):
    settings, happened = GRPO_CASES[case]
    settings = dict(settings)
    folder = saved(settings.pop("model", "qwen2"))
    ours, expected = train(SharedPrefixGRPOTrainer, folder, **settings), train(GRPOTrainer, folder, **settings)
    # The sums of the experts' auxiliary loss are float32 in transformers.
    assert_trained_alike(ours, expected, tolerance=float32_floor() if case == "moe_auxiliary_loss" else 1e-12)
    assert len({len(completion) for batch in ours.batches for _, completion in batch}) > 3
    assert all(any(0 < value < 1 or name == "aux_loss" for value in ours.logged(name)) for name in happened)


SINKS_AND_RECURRENT_LAYERS_CASES = {
    "grpo": (SharedPrefixGRPOTrainer, GRPOTrainer, {"num_iterations": 2}),
    "grpo_lora": (SharedPrefixGRPOTrainer, GRPOTrainer, {"lora": True, "beta": 0.1}),
    "rloo": (SharedPrefixRLOOTrainer, RLOOTrainer, {"beta": 0.1, "num_iterations": 2}),
    "dpo": (SharedPrefixDPOTrainer, DPOTrainer, {}),
}


SINKS_AND_RECURRENT_LAYERS_PAIRS = [
    *(("gpt_oss", "grpo"), ("gpt_oss", "dpo"), ("qwen3_5", "grpo_lora"), ("qwen3_5", "rloo")),
    *(("nemotron_h", "grpo"), ("lfm2", "grpo_lora")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), SINKS_AND_RECURRENT_LAYERS_PAIRS)
def test_sinks_and_recurrent_layers_train_as_trl(name, case, saved):
    *trainer_classes, settings = SINKS_AND_RECURRENT_LAYERS_CASES[case]
    runs = []
    for trainer_class in trainer_classes:
        runs.append(make_run(trainer_class, saved(name), **settings))
        with float32_is_float64():
            runs[-1].trainer.train()
    assert_trained_alike(*runs, tolerance=1e-11)


# Text-only data of models that take images too. Their RoPE computes in float32 in a float64 model, and in GRPO TRL
# counts positions from the padding on the left, which rounds otherwise.
COMPOSITE_CASES = {
    "grpo_reference": (SharedPrefixGRPOTrainer, GRPOTrainer, {"beta": 0.1, "num_iterations": 2}),
    "grpo_lora_checkpointing": (SharedPrefixGRPOTrainer, GRPOTrainer, {"lora": True, "gradient_checkpointing": True}),
    "dpo": (SharedPrefixDPOTrainer, DPOTrainer, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"),
    [("gemma3_vl", "grpo_reference"), ("qwen2_5_vl", "grpo_lora_checkpointing"), ("gemma3_vl", "dpo")],
)
def test_composite_model_trains_on_text_as_trl(name, case, saved):
    ours_class, trls_class, settings = COMPOSITE_CASES[case]
    ours, expected = (train(each, saved(name), **settings) for each in (ours_class, trls_class))
    assert_trained_alike(ours, expected, tolerance=1e-12 if case == "dpo" else 1e-6)
    assert any(re.search("vision|visual", path) for path, _ in ours.trainer.model.named_parameters())


@pytest.mark.slow
def test_gradient_accumulation_trains_as_trl(saved):
    settings = {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2}
    settings |= {"folder": saved("qwen2"), "per_device_train_batch_size": 4}
    ours = train(SharedPrefixGRPOTrainer, **settings)
    assert_trained_alike(ours, train(RegroupedGRPOTrainer, **settings))
    expected = train(GRPOTrainer, **settings)
    assert_trained_alike(ours, expected, {"grad_norm", "reward", "reward_std"})
    assert_trained_alike(ours, expected, {"loss"}, tolerance=float32_floor())  # Trainer sums losses in float32


# Random options: each is left out or has one of its values; some losses need further ones.
OPTIONS = {
    **{"gradient_accumulation_steps": [2], "gradient_checkpointing": [True], "lora": [True], "max_grad_norm": [0.01]},
    **{"pad_to_multiple_of": [8, 64]},
}
GROUP_TRAINER_OPTIONS = OPTIONS | {
    **{"num_generations": [2, 4, 8], "num_iterations": [2], "beta": [0.1], "shuffle_dataset": [False]},
    **{"mask_truncated_completions": [True], "epsilon": [0.02], "temperature": [0.7], "top_k": [10]},
    **{"repetition_penalty": [1.1], "steps_per_generation": [4]},
}
GRPO_OPTIONS = GROUP_TRAINER_OPTIONS | {
    **{"scale_rewards": ["batch", "none"], "top_entropy_quantile": [0.5], "entropy_coef": [0.1]},
    **{"use_adaptive_entropy": [True], "off_policy_mask_threshold": [0.001]},
}
RLOO_OPTIONS = GROUP_TRAINER_OPTIONS | {"normalize_advantages": [True], "reward_clip_range": [(-1, 2)]}
DPO_OPTIONS = OPTIONS | {
    **{"beta": [0.5], "ld_alpha": [0.5], "max_length": [16, 24], "truncation_mode": ["keep_end"]},
    **{"precompute_ref_log_probs": [True]},
}
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
CLIPPED_OPTIONS = {"delta": [1.5], "importance_sampling_level": ["sequence"]}
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
NEEDED = {
    "cispo": {"epsilon_high": 1.1},
    "luspo": {"importance_sampling_level": "sequence"},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
}
PAIRS = [
    (SharedPrefixGRPOTrainer, RegroupedGRPOTrainer),
    (SharedPrefixRLOOTrainer, RegroupedRLOOTrainer),
    (SharedPrefixDPOTrainer, DPOTrainer),
]


def random_options(trainer: type, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    loss, choices = None, RLOO_OPTIONS
    if issubclass(trainer, DPOTrainer):
        loss, choices = draw.choice(DPO_LOSSES), DPO_OPTIONS
    elif issubclass(trainer, GRPOTrainer):
        loss = draw.choice([*CLIPPED_LOSSES, "cispo", "sapo", "vespo", "luspo"])
        choices = GRPO_OPTIONS | (CLIPPED_OPTIONS if loss in CLIPPED_LOSSES else {})
    options = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.3}
    chosen = {} if loss is None else {"loss_type": [loss] if choices is DPO_OPTIONS else loss}
    return options | chosen | NEEDED.get(loss, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:steps_per_generation=4 is more")
@pytest.mark.parametrize("seed", range(int(os.environ.get("TRL_CASES", 12))))
def test_random_options_train_as_trl(seed, saved):
    ours_class, trls_class = PAIRS[seed % 3]
    options = random_options(ours_class, seed)
    ours, expected = (train(each, saved("qwen2"), **options) for each in (ours_class, trls_class))
    # Trainer sums losses in float32. Where DPO's rewards should be 0, accuracies depend on rounding.
    assert_trained_alike(ours, expected, tolerance=1e-11, without="^(train_)?loss$|accuracies")
    assert_trained_alike(ours, expected, {"loss"}, tolerance=float32_floor())
    assert sum(ours.logged("flexpg/tokens_saved")) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:steps_per_generation=2 is more")
@pytest.mark.parametrize(("group_size", "equal"), [(8, True), (4, False)])
def test_steps_of_part_of_one_group_train_as_trl(group_size, equal, saved):
    """Of several groups they do not, which is what the warning says."""
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_generations": group_size}
    ours, expected = (train(each, saved("qwen2"), **settings) for each in (SharedPrefixGRPOTrainer, GRPOTrainer))
    assert ours.batches[0] == expected.batches[0]
    if equal:
        assert_trained_alike(ours, expected)
    else:
        assert abs(ours.logged("loss")[0] - expected.logged("loss")[0]) > 1e-3


def rollouts_with_tool_tokens(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    """Draw completions with a tool's tokens between the model's; two of each four start alike."""
    draw = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(3, len(CHARACTERS), (len(prompts), 9), generator=draw)
    ids[1::4, :6] = ids[::4, :6]
    completions = [row[: 5 + n % 5].tolist() for n, row in enumerate(ids)]
    by_model = [[int(not 2 <= place < 2 + n % 3) for place in range(len(c))] for n, c in enumerate(completions)]
    prompt_ids = tokenizer()(prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None, "env_mask": by_model}


@pytest.mark.slow
def test_tool_tokens_are_context_only_as_in_trl(saved, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental
    settings = {"folder": saved("qwen2"), "rollout_func": rollouts_with_tool_tokens, "beta": 0.1, "num_iterations": 2}
    ours, expected = train(SharedPrefixGRPOTrainer, **settings), train(GRPOTrainer, **settings)
    assert_trained_alike(ours, expected)
    assert not all(batch["tool_mask"].all() for batch in ours.trainer._buffered_inputs)


@pytest.mark.slow
def test_rloo_trains_as_trl(saved):
    settings = {"folder": saved("qwen2"), "beta": 0.1, "num_iterations": 2}
    ours, expected = train(SharedPrefixRLOOTrainer, **settings), train(RLOOTrainer, **settings)
    assert_trained_alike(ours, expected)
    assert max(ours.logged("kl")) > 0 and min(ours.logged("flexpg/tokens_saved")) > 0


DPO_CASES = {
    "sigmoid_evaluated": {"loss_type": ["sigmoid"], "evaluated": True, "eval_strategy": "steps", "eval_steps": 2},
    "sigmoid_and_bco_pair_weighted": {"loss_type": ["sigmoid", "bco_pair"], "use_weighting": True},
    "lora": {"loss_type": ["sigmoid"], "lora": True},
    "precomputed_reference": {"loss_type": ["sigmoid"], "precompute_ref_log_probs": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_trains_as_trl(case, saved):
    settings = {"folder": saved("qwen2"), **DPO_CASES[case]}
    ours, expected = train(SharedPrefixDPOTrainer, **settings), train(DPOTrainer, **settings)
    assert_trained_alike(ours, expected)
    assert {"entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins"} <= set(ours.history[0])
    assert min(ours.logged("flexpg/tokens_saved")) > 0


def train_both(rank: int, folder: str) -> list[Tensor]:
    """Return the parameters that TRL's own trainer and ours reach, in one of several processes."""
    trl.trainer.utils._ChunkedLogProbFunction = Float64Head
    return [train(each, folder, max_steps=3, beta=0.1).parameters for each in (GRPOTrainer, SharedPrefixGRPOTrainer)]


@pytest.mark.slow
def test_two_ranks_train_as_trl(saved):
    (expected, ours), (_, on_the_other) = run_processes(2, train_both, saved("qwen2"))
    assert torch.equal(ours, on_the_other)
    assert (ours - expected).norm() < 1e-12 * expected.norm()


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",  # a mesh of the CPU; torch's own would be of CUDA in its CUDA builds
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ZERO3_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # or parameters as small as these would not be sharded
        "stage3_gather_16bit_weights_on_model_save": True,  # for accelerate's get_state_dict, whatever the dtype
    },
    "bf16": {"enabled": False},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def unconverted(model: nn.Module) -> nn.Module:
    """Leave a model in float32: TRL shards its reference model at once, after which norms cannot be replaced."""
    return model


def train_sharded(rank: int, folder: str, variables: dict, cases: list[tuple[list[type], dict]]) -> list[list[Any]]:
    """Return the samples, the log and the parameters of each case's trainers, in one of several processes."""
    os.environ.update(variables | {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    # accelerate shards on accelerators only, and takes the CPU for one here.
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    trl.trainer.utils._ChunkedLogProbFunction = Float64Head
    return [[sharded_results(trainer, folder, settings) for trainer in trainers] for trainers, settings in cases]


def sharded_results(trainer_class: type, folder: str, settings: dict) -> tuple[list, dict, dict]:
    run = train(trainer_class, folder, use_cpu=False, max_steps=3, beta=0.1, **settings)
    trainer = run.trainer
    assert trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    log = {name: run.logged(name) for name in ("loss", "grad_norm")}
    return run.batches, log, trainer.accelerator.get_state_dict(trainer.model_wrapped)


def assert_sharded_train_alike(ours: tuple, expected: tuple, tolerance: float) -> None:
    assert ours[0] == expected[0]
    for name, values in expected[1].items():
        assert len(values) == 3 and ours[1][name] == pytest.approx(values, rel=tolerance, abs=tolerance), name
    assert largest_error(ours[2], expected[2]) < tolerance


GRPO, RLOO = [GRPOTrainer, SharedPrefixGRPOTrainer], [RLOOTrainer, SharedPrefixRLOOTrainer]
DPO = [DPOTrainer, SharedPrefixDPOTrainer]
FULL = {"convert": unconverted}
ACCUMULATED = FULL | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
ADAPTER = {"lora": True, "gradient_checkpointing": True}
SHARDED_CASES = {
    "grpo": (GRPO, ACCUMULATED, 2e-4),
    "grpo_lora": (GRPO, ADAPTER, 1e-12),
    "rloo": (RLOO, FULL, 2e-4),
    "dpo": (DPO, FULL, 2e-4),
    "dpo_lora": (DPO, ADAPTER, 1e-12),
}


@pytest.mark.distributed
def test_fsdp2_trains_as_trl(saved):
    """In one launch: importing TRL takes longer than to train."""
    cases = [(trainers, settings) for trainers, settings, _ in SHARDED_CASES.values()]
    results, _ = run_processes(2, train_sharded, saved("qwen2"), FSDP2, cases, timeout_s=300)
    for (expected, ours), (_, _, tolerance) in zip(results, SHARDED_CASES.values(), strict=True):
        assert_sharded_train_alike(ours, expected, tolerance)


@pytest.mark.proof
@pytest.mark.parametrize("case", SHARDED_CASES)
def test_deepspeed_zero3_trains_as_trl(case, saved):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    trainers, settings, _ = SHARDED_CASES[case]
    settings = settings | {"convert": unconverted, "deepspeed": ZERO3_CONFIG}  # which computes in float32
    ((expected, ours),), _ = run_processes(2, train_sharded, saved("qwen2"), ZERO3, [(trainers, settings)])
    assert_sharded_train_alike(ours, expected, 2e-4)


def prefixes(rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
    """Count the tokens to encode: all different beginnings of all rows."""
    return len({(prompt + completion)[: n + 1] for prompt, completion in rows for n in range(len(prompt + completion))})


def test_reference_and_old_policy_are_shared_too(saved, monkeypatch):
    trees = []

    def counted(*args):
        batch = pack_batch(*args)
        trees.append(batch.tree)
        return batch

    monkeypatch.setattr(trl_forward, "pack_batch", counted)
    run = train(SharedPrefixGRPOTrainer, saved("qwen2"), beta=0.1, num_iterations=2, max_steps=2)
    assert len(trees) == 4  # old, reference, and two updates
    assert {tree.num_tokens for tree in trees} == {prefixes(run.batches[0])}


# Groups.


def generated(groups: int, size: int) -> dict[str, Any]:
    """Build rows as TRL generates them: row n belongs to prompt n // size and contains its number."""
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
def test_regroup_keeps_every_row_once_and_groups_together(groups, size, count):
    whole = generated(groups, size)
    for seed in range(10):
        batches = regroup(micro_batches(whole, count, seed))
        assert [len(batch["advantages"]) for batch in batches] == [groups * size // count] * count
        order = torch.cat([batch["advantages"] for batch in batches]).long()
        assert order.sort().values.tolist() == list(range(groups * size))
        for name in ("prompt_ids", "prompt_mask", "completion_ids"):
            assert torch.equal(torch.cat([batch[name] for batch in batches]), whole[name][order])
        assert [name for batch in batches for name in batch["names"]] == [f"row {n}" for n in order.tolist()]
        assert all(batch["num_items_in_batch"] == 99 and batch["old_per_token_logps"] is None for batch in batches)
        assert sum(a != b for a, b in pairwise((order // size).tolist())) == groups - 1  # split by batch ends only


def test_regroup_shuffles_groups_as_trl_shuffles_rows():
    orders = set()
    for seed in range(20):
        batches = micro_batches(generated(4, 4), 4, seed)
        shuffled = torch.cat([batch["advantages"] for batch in batches]).long() // 4
        first_seen = tuple(dict.fromkeys(shuffled.tolist()))
        state = torch.get_rng_state()
        assert tuple(int(batch["advantages"][0]) // 4 for batch in regroup(batches)) == first_seen
        assert torch.equal(torch.get_rng_state(), state)
        orders.add(first_seen)
    assert len(orders) > 8


@pytest.mark.parametrize(
    ("order", "present", "expected"),
    [
        ([0, 2, 1, 3], [0, 0, 0, 0], [0, 1, 2, 3]),  # the 9 of row 2 is padding
        ([0, 2, 1, 3], [0, 1, 0, 0], [0, 1, 2, 3]),  # it is a token
        ([0, 2, 1, 3], [0, 0, 1, 0], [0, 2, 3, 1]),  # the padding id of row 1 is a token
    ],
)
def test_regroup_compares_prompt_tokens_without_padding(order, present, expected):
    rows = generated(2, 2)
    rows["prompt_ids"][2, 0] = 9
    mixed = {name: rows[name][order] for name in ("prompt_ids", "advantages")}
    mixed["prompt_mask"] = torch.tensor([[first, 1, 1] for first in present])
    assert regroup([mixed])[0]["advantages"].tolist() == expected


def row(batch: dict[str, Tensor], n: int) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    parts = [batch[f"{part}_ids"][n][batch[f"{part}_mask"][n].bool()] for part in ("prompt", "completion")]
    return *(tuple(part.tolist()) for part in parts), batch["advantages"][n].item()


@pytest.mark.parametrize(
    "ours_and_trls", [(SharedPrefixGRPOTrainer, GRPOTrainer), (SharedPrefixRLOOTrainer, RLOOTrainer)]
)
def test_prepared_batch_keeps_groups_whole_and_random_numbers(ours_and_trls, saved):
    buffers, states = [], []
    for trainer_class in ours_and_trls:
        settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}
        trainer = make_run(trainer_class, saved("qwen2"), **settings).trainer
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
    ("rows", "group_size", "generated", "parts"),
    [(8, 8, 32, 1), (16, 8, 32, 1), (4, 8, 32, 2), (1, 8, 8, 8), (6, 4, 24, 4 / 3), (3, 4, 12, 2), (5, 2, 10, 6 / 5)],
)
def test_batches_per_group_counts_encodings_of_a_prompt(rows, group_size, generated, parts):
    assert batches_per_group(rows, group_size, generated) == pytest.approx(parts)


@pytest.mark.parametrize("trainer_class", [SharedPrefixGRPOTrainer, SharedPrefixRLOOTrainer])
@pytest.mark.parametrize("splits", [False, True])
def test_split_groups_warn_with_their_cost(trainer_class, splits, saved):
    settings = {"per_device_train_batch_size": 4, "num_generations": 8, "gradient_accumulation_steps": 2}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_run(trainer_class, saved("qwen2"), **(settings if splits else {}))
    ours = [str(w.message) for w in caught if re.search("splits groups|replacing attn", str(w.message))]
    words = "per_device_train_batch_size=4 splits groups of num_generations=8: a prompt is encoded 2 times per update"
    assert [message[: len(words)] for message in ours] == ([words] if splits else [])


@pytest.mark.parametrize("trainer_class", [SharedPrefixGRPOTrainer, SharedPrefixRLOOTrainer])
@pytest.mark.parametrize(
    ("generations", "steps", "group_size", "differs"), [(2, 1, 4, True), (2, 2, 4, False), (2, 1, 8, False)]
)
def test_steps_of_part_of_a_generation_batch_warn(trainer_class, generations, steps, group_size, differs, saved):
    settings = {"per_device_train_batch_size": 4, "num_generations": group_size}
    settings |= {"steps_per_generation": generations, "gradient_accumulation_steps": steps}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_run(trainer_class, saved("qwen2"), **settings)
    words = "steps_per_generation=2 is more than gradient_accumulation_steps=1: an optimizer step has whole groups"
    assert [str(w.message).startswith(words) for w in caught if "steps_per_generation=" in str(w.message)] == (
        [True] if differs else []
    )


# The log, and the trained model.


@pytest.mark.parametrize(("rows", "accumulated"), [(8, 1), (4, 2)])
def test_log_counts_the_tokens_of_each_update(rows, accumulated, saved):
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated, "max_steps": 3}
    settings |= {"evaluated": True, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    run = train(SharedPrefixGRPOTrainer, saved("qwen2"), beta=0.1, **settings)
    lines = [line for line in run.history if "loss" in line]
    sampled = [batch for batch in run.batches if len(batch) == 8]  # those of 4 are evaluation's
    assert len(lines) == len(sampled) == 3 < len(run.batches)
    for line, batch in zip(lines, sampled, strict=True):
        tokens = sum(prefixes(batch[n : n + rows]) for n in range(0, 8, rows))
        saved_tokens = sum(len(prompt + completion) for prompt, completion in batch) - tokens
        assert (line["flexpg/tokens"], line["flexpg/tokens_saved"]) == (tokens, saved_tokens)
        seconds = line["flexpg/update_s"]
        assert 0 < seconds < line["step_time"] * 1.01
        assert line["flexpg/update_s_saved_estimate"] == pytest.approx(seconds * saved_tokens / tokens, rel=1e-5)
    assert not [name for line in run.history if "loss" not in line for name in line if "flexpg" in name]


def test_saved_model_is_an_ordinary_checkpoint_and_generates_the_same(saved, tmp_path):
    trainer = train(SharedPrefixGRPOTrainer, saved("qwen2"), max_steps=2).trainer
    trainer.save_model(str(tmp_path))
    assert "flexpg" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert plain.config._attn_implementation == "sdpa"
    weights = trainer.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.state_dict().items())
    batch = padded([[5, 6, 7, PAD, 8], [8, 9]], [[], []], left=[0, 3]) | {"labels": None}
    for do_sample in (False, True):
        texts = []
        for model in (trainer.model.eval(), in_float64(plain)):
            torch.manual_seed(3)
            texts.append(model.generate(**batch, max_new_tokens=9, do_sample=do_sample))
        assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention_dropout": 0.1}, "has attention_dropout=0.1, which would differ between the copies of a prefix"),
        ({"lora": True, "lora_dropout": 0.1}, "has dropout 0.1, which would differ between the copies of a prefix"),
    ],
    ids=["attention_dropout", "lora_dropout"],
)
def test_dropout_is_refused_before_training(saved, settings, words):
    with refused(ValueError, words):
        make_run(SharedPrefixGRPOTrainer, saved("qwen2"), **settings)


def assert_same_parameters(run, other):
    parameters = dict(run.trainer.model.named_parameters())
    for name, parameter in other.trainer.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_disable_dropout_covers_lora_dropout(saved):
    settings = {"folder": saved("qwen2"), "lora": True, "max_steps": 1}
    run = train(SharedPrefixGRPOTrainer, lora_dropout=0.1, disable_dropout=True, **settings)
    assert_same_parameters(run, train(SharedPrefixGRPOTrainer, **settings))


def test_resumed_lora_run_equals_uninterrupted_run(saved, tmp_path):
    settings = {"folder": saved("qwen2"), "lora": True, "output_dir": tmp_path, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "max_steps": 3}
    run = train(SharedPrefixGRPOTrainer, **settings)
    rmtree(tmp_path / "checkpoint-3")
    resumed = make_run(SharedPrefixGRPOTrainer, **settings)
    resumed.trainer.train(resume_from_checkpoint=True)
    assert resumed.batches == run.batches[2:]
    assert_same_parameters(resumed, run)


CONFIGS = {
    SharedPrefixGRPOTrainer: GRPOConfig,
    SharedPrefixRLOOTrainer: RLOOConfig,
    SharedPrefixDPOTrainer: DPOConfig,
}
NO_MODEL = "a folder that does not exist"  # which TRL would fail to load


RECOMPILES = "torch_compile must be False: every batch's prefix tree would recompile"
REFUSED_OPTIONS = {
    "torch_compile": (True, RECOMPILES),
    "torch_compile_backend": ("eager", RECOMPILES),
    "neftune_noise_alpha": (5.0, "neftune_noise_alpha must be None: noise would differ between the copies of a prefix"),
    "use_transformers_continuous_batching": (
        True,
        "use_transformers_continuous_batching must be False: it generates with sdpa only",
    ),
}


@pytest.mark.parametrize(
    ("trainer_class", "option"),
    [(c, o) for c in CONFIGS for o in REFUSED_OPTIONS if hasattr(CONFIGS[c], o)],  # DPO does not generate
)
def test_unsupported_option_is_refused_before_models_load(trainer_class, option, tmp_path):
    value, words = REFUSED_OPTIONS[option]
    options = CONFIGS[trainer_class](output_dir=str(tmp_path), use_cpu=True, bf16=False, **{option: value})
    with refused(ValueError, words):
        trainer_class(NO_MODEL, None, options)
    with refused(ValueError, words):
        trainer_class(model=NO_MODEL, args=options)


COMPILED = "accelerate's dynamo_backend must be 'no', got 'eager': every batch's prefix tree would recompile; unset"


@pytest.mark.parametrize("trainer_class", CONFIGS)
def test_compile_by_accelerate_environment_is_refused(trainer_class, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    for options in (None, CONFIGS[trainer_class](output_dir=str(tmp_path), use_cpu=True, bf16=False)):
        with refused(ValueError, COMPILED):
            trainer_class(model=NO_MODEL, args=options)


@pytest.mark.parametrize("trainer_class", CONFIGS)
def test_context_parallel_by_accelerate_is_refused(trainer_class, monkeypatch, tmp_path):
    words = "parallelism_config must have cp_size=1 and sp_size=1, got 2 and 1"
    options = CONFIGS[trainer_class](output_dir=str(tmp_path), use_cpu=True, bf16=False)
    options.parallelism_config = ParallelismConfig(cp_size=2)  # GRPOConfig(parallelism_config=...) raises an error too
    with refused(ValueError, words):
        trainer_class(model=NO_MODEL, args=options)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with refused(ValueError, words):
        trainer_class(model=NO_MODEL, args=None)


def test_compile_by_an_existing_accelerator_is_refused(monkeypatch, tmp_path):
    options = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    Accelerator(cpu=True)
    monkeypatch.setattr(AcceleratorState(), "dynamo_plugin", TorchDynamoPlugin(backend="eager"))
    with refused(ValueError, COMPILED):
        SharedPrefixGRPOTrainer(NO_MODEL, args=options)
