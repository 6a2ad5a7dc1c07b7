"""Bad input of the library, door by door: what is wrong, the call, its error, and words that the message contains.

The rows of files, texts and rewards stand in bad_data.py, the recipe and the command line in test_bad_commands.py.
"""

import math

import bad_data
import pytest
import torch
import transformers
from baseline import MAX_SEQ_LEN, VOCAB, tiny_model
from torch import nn

from flexpg import (
    EncodedPrefix,
    PrefixTree,
    Rollouts,
    SamplingParams,
    attention,
    block_mask,
    dense_mask,
    group_advantages,
    group_block_mask,
    grpo_loss,
    loss_normalizer,
    pack,
    sample,
    token_logprobs,
    tree_mask_mod,
)
from flexpg.integrations import torchtune
from flexpg.integrations import transformers as integration

NAN, INF = math.nan, math.inf
ZEROS, ONES = torch.zeros, torch.ones


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def ids(*tokens):
    return torch.tensor(tokens, dtype=torch.int64)


def floats(*values):
    return torch.tensor(values)


def meta(tensor):
    return tensor.to("meta")


TREE = PrefixTree.from_groups([[1, 2, 3], [4, 5]], [[[6, 7], [8]], [[9, 6]]])  # 3 sequences of 5, 4 and 4 tokens
LENGTHS_ONLY = PrefixTree.from_lengths([3, 2], [[2, 1], [2]])
MASK = block_mask(TREE)


def rollouts(**changed):
    """Two prompts and three rollouts of 2, 1 and 3 tokens; the first and the last belong to prompt 1."""
    fields = {"prompts": [ids(1, 2), ids(3)], "completions": [ids(4, 5), ids(6), ids(7, 8, 9)]}
    return Rollouts(**fields | {"group_ids": ids(1, 0, 1), "rewards": floats(1.0, 0.0, 2.0)} | changed)


def completed(tokens):
    return rollouts(completions=[ids(4, 5), tokens, ids(7, 8, 9)])


def logprobs(**changed):
    row = {"hidden": ZEROS(1, 256, 8), "output": nn.Linear(8, 10), "tree": TREE, "prompt_lens": ids(3, 3, 2)}
    return token_logprobs(**row | changed)


def loss(**changed):
    """Two rollouts of two tokens."""
    tables = {"logprobs": ZEROS(2, 2), "old_logprobs": None, "advantages": ONES(2), "mask": ONES(2, 2).bool()}
    return grpo_loss(**tables | changed)


def attend(q=(1, 4, 256, 8), k=(1, 2, 256, 8), v=None, mask=MASK, **options):
    """Tensors, or the shapes of some of zeros; v is like k."""
    k = ZEROS(k) if isinstance(k, tuple) else k
    v = torch.zeros_like(k) if v is None else v
    return attention(ZEROS(q) if isinstance(q, tuple) else q, k, v, mask, **options)


def elsewhere(**options):
    return attend(*meta(ZEROS(2, 1, 4, 256, 8)), mask=MASK.to("meta"), **options)


def drawn(uniforms=None, prompts=((1, 2), (3,)), group_size=2, **params):
    """Up to two tokens for each of two prompts."""
    model, params = tiny_model("llama3"), SamplingParams(**{"max_new_tokens": 2} | params)
    return sample(torchtune.decoder(model), torchtune.output(model), prompts, group_size, params, uniforms)


def tune(tree, make=lambda: tiny_model("llama3")):
    return torchtune.forward(make(), tree)


def qwen2(**changed):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = transformers.Qwen2Config(**sizes | {"vocab_size": VOCAB, "intermediate_size": 16} | changed)
    integration.register()
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flexpg")


def hf(tree):
    return integration.forward(qwen2(), tree)


ROLLOUTS = [
    ("prompts as one tensor", lambda: rollouts(prompts=ONES(2, 3)), TypeError, "prompts is a Tensor; give a list of"),
    ("prompts None", lambda: rollouts(prompts=None), TypeError, "prompts is a NoneType; give a list of 1-D int64"),
    ("prompts as a tuple", lambda: rollouts(prompts=(ids(1), ids(2))), TypeError, "prompts is a tuple; give a list"),
    ("a prompt that is a number", lambda: rollouts(prompts=[ids(1), 7]), TypeError, "prompt 1 of 2 is a int; give"),
    ("no prompts", lambda: rollouts(prompts=[]), ValueError, "prompts is empty; give at least one prompt"),
    ("an empty prompt", lambda: rollouts(prompts=[ids(1), ids()]), ValueError, "prompt 1 of 2 has no token; its last"),
    ("a prompt of floats", lambda: rollouts(prompts=[floats(1.0)]), ValueError, "prompt 0 of 1 is torch.float32 [1]"),
    ("a 2-D prompt", lambda: rollouts(prompts=[ids([1])]), ValueError, "torch.int64 [1, 1]; token ids are 1-D"),
    ("a padded prompt", lambda: rollouts(prompts=[ids(4), ids(-100)]), ValueError, "prompt 1 of 2 has token id -100"),
    ("no completions", lambda: rollouts(completions=[]), ValueError, "completions is empty; give at least one rollout"),
    ("a completion of ints", lambda: completed([6]), TypeError, "rollout 1 of 3 is a list; give a 1-D int64 tensor"),
    ("a completion without tokens", lambda: completed(ids()), ValueError, "rollout 1 of 3 has no completion token;"),
    ("a negative token", lambda: completed(ids(-1)), ValueError, "rollout 1 of 3 has token id -1; ids start at 0"),
    ("a completion elsewhere", lambda: completed(meta(ids(6))), ValueError, "rollout 1 of 3 is on meta, rollout 0 on"),
    ("all elsewhere", lambda: rollouts(completions=[meta(ids(6))]), ValueError, "completions are on meta, prompts on"),
    ("groups None", lambda: rollouts(group_ids=None), TypeError, "group_ids is a NoneType; give a tensor"),
    ("groups of 2 rollouts", lambda: rollouts(group_ids=ids(1, 0)), ValueError, "group_ids is torch.int64 [2]", "[3]"),
    ("groups in floats", lambda: rollouts(group_ids=ONES(3)), ValueError, "group_ids is torch.float32", "torch.int64"),
    ("a group too high", lambda: rollouts(group_ids=ids(1, 0, 2)), ValueError, "rollout 2 of 3 names group 2; with 2"),
    ("a group below 0", lambda: rollouts(group_ids=ids(1, 0, -1)), ValueError, "rollout 2 of 3 names group -1"),
    ("an unused prompt", lambda: rollouts(group_ids=ids(1, 1, 1)), ValueError, "prompt 0 of 2 has no rollout; drop it"),
    ("rewards in a list", lambda: rollouts(rewards=[1.0, 0.0, 2.0]), TypeError, "rewards is a list; give a tensor"),
    ("rewards in ints", lambda: rollouts(rewards=ids(1, 0, 2)), ValueError, "rewards is torch.int64", "torch.float32"),
    ("rewards [3, 1]", lambda: rollouts(rewards=ZEROS(3, 1)), ValueError, "rewards is torch.float32 [3, 1]", "[3]"),
    ("a reward of NaN", lambda: rollouts(rewards=floats(1, NAN, 0)), ValueError, "rollout 1 of 3 has reward nan; drop"),
    ("a reward of -inf", lambda: rollouts(rewards=floats(1, 0, -INF)), ValueError, "rollout 2 of 3 has reward -inf"),
    ("rewards elsewhere", lambda: rollouts(rewards=meta(ONES(3))), ValueError, "rewards is on meta, prompts on cpu"),
    ("a loss mask of ints", lambda: rollouts(loss_mask=ids([1])), ValueError, "loss_mask is torch.int64", "torch.bool"),
    ("a loss mask cut short", lambda: rollouts(loss_mask=ONES(3, 2).bool()), ValueError, "[3, 2]", "[3, 3]"),
    ("a loss mask on pads", lambda: rollouts(loss_mask=ONES(3, 3).bool()), ValueError, "rollout 0 of 3 is True at 2"),
    ("old of 2 rollouts", lambda: rollouts(old_logprobs=ZEROS(2, 3)), ValueError, "old_logprobs is torch.float32 [2,"),
    ("old with a NaN", lambda: rollouts(old_logprobs=ZEROS(3, 3) * NAN), ValueError, "old_logprobs of", "is nan"),
    ("reference of ints", lambda: rollouts(ref_logprobs=ids([1])), ValueError, "ref_logprobs is torch.int64 [1, 1]"),
    ("reference of -inf", lambda: rollouts(ref_logprobs=ZEROS(3, 3) - INF), ValueError, "is -inf at trained token 0"),
    ("reference in a list", lambda: rollouts(ref_logprobs=[[0.0]]), TypeError, "ref_logprobs is a list; give a tensor"),
    ("select nothing", lambda: rollouts().select([]), ValueError, "indices are empty; give the index of at least one"),
    ("select by a mask", lambda: rollouts().select(ONES(3).bool()), ValueError, "indices are torch.bool", "nonzero()"),
    ("select beyond", lambda: rollouts().select([3]), ValueError, "indices name rollout 3; there are 0 to 2"),
    ("select from the end", lambda: rollouts().select([-1]), ValueError, "indices name rollout -1; there are 0 to 2"),
]
ADVANTAGES = [
    ("rewards in a list", lambda: group_advantages([1.0], ids(0)), TypeError, "rewards is a list; give a tensor"),
    ("groups in a list", lambda: group_advantages(ONES(1), [0]), TypeError, "group_ids is a list; give a tensor"),
    ("rewards in ints", lambda: group_advantages(ids(1), ids(0)), ValueError, "rewards are torch.int64; give floats"),
    ("other shapes", lambda: group_advantages(ONES(2, 1), ids(0, 0)), ValueError, "rewards are [2, 1], group_ids [2]"),
    ("a NaN", lambda: group_advantages(floats(1, NAN), ids(0, 0)), ValueError, "rollout 1 of 2 has reward nan; drop"),
    ("two devices", lambda: group_advantages(ONES(1), meta(ids(0))), ValueError, "rewards are on cpu, group_ids on"),
    ("other scaling", lambda: group_advantages(ONES(1), ids(0), "std"), ValueError, "is 'std'; allowed are group,"),
]

sequences, groups, lengths = PrefixTree.from_sequences, PrefixTree.from_groups, PrefixTree.from_lengths
TREES = [
    ("None", lambda: sequences(None), TypeError, "sequences is a NoneType; give a list"),
    ("a generator", lambda: sequences([t] for t in (1, 2)), TypeError, "sequences is a generator; give a list"),
    ("nothing", lambda: sequences([]), ValueError, "no sequence came; a tree needs at least one"),
    ("one sequence for a list", lambda: sequences([1, 2]), ValueError, "sequence 0 of 2 has shape (); give each one"),
    ("text", lambda: sequences(["1+1="]), TypeError, "sequence 0 of 1 is text; give its token ids, as a tokenizer"),
    ("a tokenizer's dict", lambda: sequences([{"input_ids": [1]}]), TypeError, "sequence 0 of 1 is no row of token"),
    ("None for a token", lambda: sequences([[1], [1, None]]), TypeError, "sequence 1 of 2 is no row of token ids"),
    ("nested lists", lambda: sequences([[[1], [2, 3]]]), TypeError, "sequence 0 of 1 is no row of token ids"),
    ("an id beyond 64 bits", lambda: sequences([[2**70]]), TypeError, "sequence 0 of 1 is no row", "Overflow"),
    ("an empty sequence", lambda: sequences([[1], []]), ValueError, "sequence 1 of 2 is empty; drop it, or give it at"),
    ("floats", lambda: sequences([[1], floats(1.0)]), TypeError, "sequence 1 of 2 has dtype torch.float32; token ids"),
    ("bools", lambda: sequences([torch.tensor([True])]), TypeError, "sequence 0 of 1 has dtype torch.bool; token ids"),
    ("a batch", lambda: sequences([ids([1, 2])]), ValueError, "sequence 0 of 1 has shape (1, 2); give each one as a"),
    ("a padding id", lambda: sequences([[1], [4, -100]]), ValueError, "sequence 1 of 2 holds token id -100; ids start"),
    ("two devices", lambda: sequences([[1], meta(ids(1))]), ValueError, "sequence 1 of 2 is on meta, those before it"),
    ("no groups", lambda: groups([], []), ValueError, "no prompt came; a tree needs at least one"),
    ("completions None", lambda: groups([[1]], None), TypeError, "completions is a NoneType; give a list"),
    ("an empty prompt", lambda: groups([[1], []], [[[1]], [[2]]]), ValueError, "prompt 1 of 2 is empty"),
    ("an empty completion", lambda: groups([[1]], [[[1], []]]), ValueError, "completion 1 of 2 is empty"),
    ("an empty group", lambda: groups([[1], [2]], [[[1]], []]), ValueError, "group 1 of 2 has no completion; drop its"),
    ("a flat completion", lambda: groups([[1]], [[1, 2]]), ValueError, "completion 0 of 2 has shape (); give each one"),
    ("a number for a group", lambda: groups([[1]], [7]), TypeError, "group 0 of 1 is a int; give a list"),
    ("a list too few", lambda: groups([[1], [2]], [[[1]]]), ValueError, "2 prompts came with 1 lists of completions"),
    ("a prompt of floats", lambda: groups([[1.5]], [[[1]]]), TypeError, "prompt 0 of 1 has dtype torch.float32"),
    ("a prompt of text", lambda: groups(["1+1="], [[[1]]]), TypeError, "prompt 0 of 1 is text; give its token ids"),
    ("a completion of text", lambda: groups([[1]], [["2"]]), TypeError, "completion 0 of 1 is text"),
    ("a negative completion", lambda: groups([[1]], [[[1], [-1]]]), ValueError, "completion 1 of 2 holds token id -1"),
    ("no lengths", lambda: lengths([], []), ValueError, "no prefix length came; a tree needs at least one"),
    ("one length", lambda: lengths(3, [[1]]), TypeError, "prefix_lens is a int; give a list"),
    ("flat suffix lengths", lambda: lengths([3], [1]), TypeError, "group 0 of 1 is a int; give a list"),
    ("a length of 0", lambda: lengths([0], [[1]]), ValueError, "prefix 0 has length 0; every prefix and suffix needs"),
    ("a length of 2.7", lambda: lengths([2.7], [[1]]), ValueError, "prefix 0 has length 2.7; every prefix and suffix"),
    ("a length of NaN", lambda: lengths([NAN], [[1]]), ValueError, "prefix 0 has length nan; every prefix and suffix"),
    ("a length of text", lambda: lengths(["3"], [[1]]), ValueError, "prefix 0 has length '3'; every prefix and suffix"),
    (
        "a length of true",
        lambda: lengths([True], [[1]]),
        ValueError,
        "prefix 0 has length True; every prefix and suffix",
    ),
    ("a length of None", lambda: lengths([None], [[1]]), ValueError, "prefix 0 has length None; every prefix and"),
    ("a suffix of -1", lambda: lengths([3, 2], [[1], [4, -1]]), ValueError, "suffix 1 of group 1 has length -1"),
    ("a group of no suffix", lambda: lengths([3], [[]]), ValueError, "group 0 of 1 has no completion"),
    ("a suffix list too few", lambda: lengths([3, 4], [[1]]), ValueError, "2 prefix lengths came with 1 lists of"),
]
PACKING = [
    ("a list", lambda: pack([[1, 2]], 100), TypeError, "rollouts is a list; make them with flexpg.Rollouts(prompts"),
    ("a tree", lambda: pack(TREE, 100), TypeError, "rollouts is a PrefixTree; make them with flexpg.Rollouts"),
    ("a budget of 0", lambda: pack(rollouts(), 0), ValueError, "max_tokens is 0; give the number of tokens, 1 or more"),
    ("a budget of NaN", lambda: pack(rollouts(), NAN), ValueError, "max_tokens is nan; give the number of tokens, 1"),
    ("a budget of text", lambda: pack(rollouts(), "9"), ValueError, "max_tokens is '9'; give the number of tokens"),
    ("a budget of true", lambda: pack(rollouts(), True), ValueError, "max_tokens is True; give the number of tokens"),
    ("too little", lambda: pack(rollouts(), 3), ValueError, "rollout 2 of 3 has 1 + 3 tokens, over max_tokens=3;"),
    ("no process", lambda: pack(rollouts(), 9, 0), ValueError, "world_size is 0; give the number of processes, 1 or"),
    ("half a process", lambda: pack(rollouts(), 9, 1.5), ValueError, "world_size is 1.5; give the number of processes"),
    ("a process of true", lambda: pack(rollouts(), 9, True), ValueError, "world_size is True; give the number of"),
    ("no indices", lambda: pack(rollouts(), 9, indices=[]), ValueError, "indices are empty; give the index of at"),
    ("an index of 3", lambda: pack(rollouts(), 9, indices=[0, 3]), ValueError, "indices name rollout 3; there are 0"),
    ("an index of 0.5", lambda: pack(rollouts(), 9, indices=[0.5]), ValueError, "indices are torch.float32 [1]; give"),
    ("a mask", lambda: pack(rollouts(), 9, indices=ONES(3).bool()), ValueError, "indices are torch.bool [3]; give 1-D"),
    ("twice", lambda: pack(rollouts(), 9, indices=ids(1, 1)), ValueError, "indices name rollout 1 more than once, and"),
]
MASKS = [
    ("sequences for a tree", lambda: block_mask([[1, 2]]), TypeError, "tree is of type list; make one with"),
    ("end for a tree", lambda: block_mask(TREE.end), TypeError, "tree is of type Tensor; make one with PrefixTree."),
    ("a tree for end", lambda: dense_mask(TREE), TypeError, "end is a PrefixTree; give the tensor `tree.end`"),
    ("None for end", lambda: tree_mask_mod(None), TypeError, "end is a NoneType; give the tensor `tree.end`"),
    ("a window of 0", lambda: block_mask(TREE, 0), ValueError, "window is 0; a token sees at least itself, so give 1"),
    ("a window of -3", lambda: block_mask(TREE, -3), ValueError, "window is -3; a token sees at least itself"),
    ("a window of 2.5", lambda: block_mask(TREE, 2.5), ValueError, "window is 2.5; a token sees at least itself"),
    ("a window of text", lambda: block_mask(TREE, "4"), ValueError, "window is '4'; a token sees at least itself"),
    ("a window of true", lambda: block_mask(TREE, True), ValueError, "window is True; a token sees at least itself"),
    ("a first query of 1", lambda: block_mask(TREE, first_query=1), ValueError, "first_query is 1; give a multiple of"),
    ("a suffix of 0", lambda: group_block_mask([3], [[2, 0]]), ValueError, "suffix 1 of group 0 has length 0"),
    ("flat suffixes", lambda: group_block_mask([3], [2]), TypeError, "group 0 of 1 is a int; give a list"),
]
ATTENTION = [
    ("a dense mask", lambda: attend(mask=ONES(256, 256)), TypeError, "mask is a Tensor; make it with"),
    ("a tree for a mask", lambda: attend(mask=TREE), TypeError, "mask is a PrefixTree; make it with flexpg.block_mask"),
    ("q None", lambda: attend(q=None), TypeError, "q, k and v are NoneType, Tensor, Tensor; give tensors"),
    ("q [Hq, S, D]", lambda: attend(q=(4, 256, 8)), ValueError, "a packed row is q [1, Hq, S, D]", "got q (4, 256, 8)"),
    ("a batch of 2", lambda: attend(q=(2, 4, 256, 8)), ValueError, "a packed row is q [1, Hq, S, D] with k and v [1,"),
    ("128 tokens", lambda: attend((1, 4, 128, 8), (1, 2, 128, 8)), ValueError, "the mask's tree has 256 packed tokens"),
    ("3 heads over 2", lambda: attend(q=(1, 3, 256, 8)), ValueError, "a number of heads that divides q's; got q (1,"),
    ("v of one head", lambda: attend(v=ZEROS(1, 1, 256, 8)), ValueError, "k and v need one shape", "v (1, 1, 256, 8)"),
    ("another head size", lambda: attend(q=(1, 4, 256, 4)), ValueError, "q's head size", "got q (1, 4, 256, 4)"),
    ("two dtypes", lambda: attend(k=ZEROS(1, 2, 256, 8).double()), ValueError, "one floating dtype; got torch.float32"),
    ("ints", lambda: attend(ZEROS(1, 4, 256, 8).long()), ValueError, "one floating dtype; got torch.int64,"),
    ("two devices", lambda: attend(meta(ZEROS(1, 4, 256, 8))), ValueError, "are on meta, cpu, cpu, cpu; move them to"),
    ("another backend", lambda: attend(backend="fast"), ValueError, "unknown attention backend 'fast'; choose one of"),
    ("backend None", lambda: attend(backend=None), ValueError, "unknown attention backend None; choose one of auto,"),
    ("split, softcap", lambda: attend(backend="split", softcap=5.0), ValueError, 'backend "split" has no softcap or'),
    ("split, window", lambda: attend(backend="split", window=2), ValueError, "(got None and 2); use"),
    ("a softcap of 0", lambda: attend(softcap=0.0), ValueError, "softcap is 0.0; give a positive number, or None"),
    ("a softcap of NaN", lambda: attend(softcap=NAN), ValueError, "softcap is nan; give a positive number, or None"),
    ("a window of 0", lambda: attend(window=0), ValueError, "window is 0; a token sees at least itself"),
    ("flex, training", lambda: attend(ONES(1, 4, 256, 8).requires_grad_(), backend="flex"), ValueError, "no backward"),
    ("flex, float64", lambda: attend(*ZEROS(2, 1, 4, 256, 8).double(), backend="flex"), ValueError, "no float64 on"),
    ("split on meta", lambda: elsewhere(backend="split"), ValueError, 'backend "split" runs on the CPU and q'),
    ("auto on meta", lambda: elsewhere(), ValueError, 'no attention backend is chosen on meta; ask for "flex" or'),
]
LOGPROBS = [
    ("a list for a tree", lambda: logprobs(tree=[[1, 2]]), TypeError, "tree is of type list; make one with"),
    ("a tree of lengths", lambda: logprobs(tree=LENGTHS_ONLY), ValueError, "made from lengths and has no tokens; use"),
    ("hidden None", lambda: logprobs(hidden=None), TypeError, "hidden is a NoneType", "give a tensor [1, S, E]"),
    ("hidden [255]", lambda: logprobs(hidden=ZEROS(1, 255, 8)), ValueError, "hidden is (1, 255, 8); the tree's packed"),
    ("hidden [S, E]", lambda: logprobs(hidden=ZEROS(256, 8)), ValueError, "hidden is (256, 8); the tree's packed row"),
    ("hidden elsewhere", lambda: logprobs(hidden=meta(ZEROS(1, 256, 8))), ValueError, "hidden is on meta and the tree"),
    ("a weight for a layer", lambda: logprobs(output=ONES(10, 8)), TypeError, "output a Tensor; give", "the output"),
    ("a small vocabulary", lambda: logprobs(output=nn.Linear(8, 9)), ValueError, "token ids up to 9 need logits [5,"),
    ("logits of one row", lambda: logprobs(output=lambda rows: rows[0]), ValueError, "output made (8,) of rows (5, 8)"),
    ("lengths in a list", lambda: logprobs(prompt_lens=[3, 3, 2]), TypeError, "prompt_lens is of type list; give an"),
    ("lengths in floats", lambda: logprobs(prompt_lens=ONES(3)), TypeError, "prompt_lens is torch.float32; lengths"),
    ("lengths as a mask", lambda: logprobs(prompt_lens=ONES(3).bool()), TypeError, "prompt_lens is torch.bool;"),
    ("lengths of 2", lambda: logprobs(prompt_lens=ids(3, 3)), ValueError, "prompt_lens is (2,); the tree has 3"),
    ("a prompt of 0", lambda: logprobs(prompt_lens=ids(3, 0, 2)), ValueError, "sequence 1 has 4 tokens and a prompt"),
    ("no completion", lambda: logprobs(prompt_lens=ids(3, 4, 2)), ValueError, "sequence 1 has 4 tokens and a prompt"),
    ("a mask in a list", lambda: logprobs(mask=[[True]]), TypeError, "mask is a list; give a bool tensor [N, C]"),
    ("a mask in floats", lambda: logprobs(mask=ONES(3, 2)), ValueError, "mask is torch.float32 (3, 2); give bool [3,"),
    ("a mask of one value", lambda: logprobs(mask=torch.tensor(True)), ValueError, "mask is torch.bool (); give bool"),
    ("a mask of 2 rows", lambda: logprobs(mask=ONES(2, 2).bool()), ValueError, "mask is torch.bool (2, 2); give bool"),
    ("a mask on pads", lambda: logprobs(mask=ONES(3, 2).bool()), ValueError, "mask trains sequence 1 beyond its 1"),
    ("temperature 0", lambda: logprobs(temperature=0.0), ValueError, "temperature is 0.0; give a positive number"),
    ("temperature NaN", lambda: logprobs(temperature=NAN), ValueError, "temperature is nan; give a positive number"),
    ("temperature of text", lambda: logprobs(temperature="1"), ValueError, "temperature is '1'; give a positive"),
    ("chunks of 0", lambda: logprobs(chunk_tokens=0), ValueError, "chunk_tokens is 0; give a whole number, 1 or more"),
    ("chunks of 2.5", lambda: logprobs(chunk_tokens=2.5), ValueError, "chunk_tokens is 2.5; give a whole number, 1 or"),
]
LOSSES = [
    ("logprobs in a list", lambda: loss(logprobs=[[0.0]]), TypeError, "logprobs is a list; give a tensor"),
    ("logprobs in ints", lambda: loss(logprobs=ids([0, 0])), ValueError, "logprobs is torch.int64 [1, 2]; give floats"),
    ("logprobs [C]", lambda: loss(logprobs=ZEROS(2)), ValueError, "logprobs is torch.float32 [2]; give floats [N, C]"),
    ("advantages in a list", lambda: loss(advantages=[1.0, 2.0]), TypeError, "advantages is a list; give a tensor"),
    ("advantages [N, 1]", lambda: loss(advantages=ONES(2, 1)), ValueError, "[2, 1], logprobs [2, 2]; give one"),
    ("advantages elsewhere", lambda: loss(advantages=meta(ONES(2))), ValueError, "advantages is on meta, logprobs on"),
    ("mask None", lambda: loss(mask=None), TypeError, "mask is a NoneType; give a tensor"),
    ("mask in floats", lambda: loss(mask=ONES(2, 2)), ValueError, "mask is torch.float32 [2, 2]; it must be"),
    ("mask [N, 1]", lambda: loss(mask=ONES(2, 1).bool()), ValueError, "mask is [2, 1], logprobs [2, 2]; both must be"),
    ("nothing trained", lambda: loss(mask=ZEROS(2, 2).bool()), ValueError, "none of the 2 rollouts has a trained"),
    ("old in a list", lambda: loss(old_logprobs=[[0.0]]), TypeError, "old_logprobs is a list; give a tensor"),
    ("old of 1 rollout", lambda: loss(old_logprobs=ZEROS(1, 2)), ValueError, "old_logprobs is [1, 2], logprobs [2, 2]"),
    ("old elsewhere", lambda: loss(old_logprobs=meta(ZEROS(2, 2))), ValueError, "old_logprobs is on meta, logprobs on"),
    ("reference [2, 3]", lambda: loss(ref_logprobs=ZEROS(2, 3)), ValueError, "ref_logprobs is [2, 3], logprobs [2, 2]"),
    ("entropies [2]", lambda: loss(entropies=ZEROS(2)), ValueError, "entropies is [2], logprobs [2, 2]; both must be"),
    ("another loss", lambda: loss(loss_type="ppo"), ValueError, "loss_type is 'ppo'; allowed are grpo, bnpo, dr_grpo"),
    ("another level", lambda: loss(importance_sampling_level="word"), ValueError, "is 'word'; allowed are token,"),
    ("beta alone", lambda: loss(beta=0.1), ValueError, "beta is 0.1, but the KL term needs ref_logprobs; give them or"),
    ("beta below 0", lambda: loss(beta=-0.1), ValueError, "beta is -0.1; give a number, 0 or more"),
    ("beta None", lambda: loss(beta=None), ValueError, "beta is None; give a number, 0 or more"),
    ("beta true", lambda: loss(beta=True), ValueError, "beta is True; give a number, 0 or more"),
    ("epsilon below 0", lambda: loss(epsilon=-1.0), ValueError, "epsilon is -1.0; give a number, 0 or more"),
    ("epsilon None", lambda: loss(epsilon=None), ValueError, "epsilon is None; give a number, 0 or more"),
    ("epsilon of text", lambda: loss(epsilon="0.2"), ValueError, "epsilon is '0.2'; give a number, 0 or more"),
    ("epsilon true", lambda: loss(epsilon=True), ValueError, "epsilon is True; give a number, 0 or more"),
    ("epsilon_high false", lambda: loss(epsilon_high=False), ValueError, "epsilon_high is False; give a number, 0 or"),
    ("epsilon_high NaN", lambda: loss(epsilon_high=NAN), ValueError, "epsilon_high is nan; give a number, 0 or more"),
    ("normalizer 0", lambda: loss(normalizer=0.0), ValueError, "normalizer is 0.0; a step without a trained token"),
    ("normalizers", lambda: loss(normalizer=ONES(2)), ValueError, "normalizer is [2]; give the step's one number"),
    ("dr_grpo, no length", lambda: loss(loss_type="dr_grpo"), ValueError, "'dr_grpo' divides by max_completion_length"),
    ("count by another loss", lambda: loss_normalizer(ONES(2, 2).bool(), "sum"), ValueError, "loss_type is 'sum';"),
    ("count in ints", lambda: loss_normalizer(ids([1])), ValueError, "mask is torch.int64 [1, 1]; it must be"),
    ("count in a list", lambda: loss_normalizer([[True]]), TypeError, "mask is a list; give a tensor"),
    ("no length", lambda: loss_normalizer(ONES(1, 1).bool(), "dr_grpo"), ValueError, "by max_completion_length"),
    ("length 0", lambda: loss_normalizer(ONES(1, 1).bool(), "dr_grpo", 0), ValueError, "is 0; give a number of tokens"),
    ("length true", lambda: loss_normalizer(ONES(1, 1).bool(), "dr_grpo", True), ValueError, "is True; give a number"),
]
SAMPLING = [
    ("no tokens", lambda: SamplingParams(0), ValueError, "max_new_tokens is 0; give a whole number, 1 or more"),
    ("tokens of text", lambda: SamplingParams("5"), ValueError, "max_new_tokens is '5'; give a whole number, 1 or"),
    ("tokens of true", lambda: SamplingParams(True), ValueError, "max_new_tokens is True; give a whole number, 1 or"),
    ("temperature -1", lambda: SamplingParams(3, -1.0), ValueError, "temperature is -1.0; give 0 for greedy or a"),
    ("temperature true", lambda: SamplingParams(3, True), ValueError, "temperature is True; give 0 for greedy or a"),
    ("temperature NaN", lambda: SamplingParams(3, NAN), ValueError, "temperature is nan; give 0 for greedy or a"),
    ("temperature inf", lambda: SamplingParams(3, INF), ValueError, "temperature is inf; give 0 for greedy or a"),
    ("top_k 0", lambda: SamplingParams(3, top_k=0), ValueError, "top_k is 0; give a whole number, 1 or more, or None"),
    ("top_k 2.5", lambda: SamplingParams(3, top_k=2.5), ValueError, "top_k is 2.5; give a whole number, 1 or more"),
    ("top_k true", lambda: SamplingParams(3, top_k=True), ValueError, "top_k is True; give a whole number, 1 or more"),
    ("top_p 0", lambda: SamplingParams(3, top_p=0.0), ValueError, "top_p is 0.0; give a probability above 0, up to 1"),
    ("top_p 1.1", lambda: SamplingParams(3, top_p=1.1), ValueError, "top_p is 1.1; give a probability above 0, up to"),
    ("top_p true", lambda: SamplingParams(3, top_p=True), ValueError, "top_p is True; give a probability above 0, up"),
    ("one stop token", lambda: SamplingParams(3, stop_tokens=2), ValueError, "stop_tokens is 2; give a list of token"),
    ("stops None", lambda: SamplingParams(3, stop_tokens=[None]), ValueError, "stop_tokens is [None]; give a list of"),
    ("stops of true", lambda: SamplingParams(3, stop_tokens=[True]), ValueError, "stop_tokens is [True]; give a list"),
    ("stops as text", lambda: SamplingParams(3, stop_tokens="\n"), ValueError, "stop_tokens is '\\n'; give a list of"),
    ("no completion", lambda: drawn(group_size=0), ValueError, "group_size is 0; give 1 completion per prompt or more"),
    ("half a completion", lambda: drawn(group_size=1.5), ValueError, "group_size is 1.5; give 1 completion per prompt"),
    ("a completion of true", lambda: drawn(group_size=True), ValueError, "group_size is True; give 1 completion per"),
    ("an empty prompt", lambda: drawn(prompts=[[1], []]), ValueError, "sequence 1 of 2 is empty; drop it, or give it"),
    ("beyond the vocabulary", lambda: drawn(prompts=[[VOCAB]], temperature=0), ValueError, "token id 50 is beyond the"),
    ("no uniforms", lambda: drawn(), ValueError, "uniforms is None, and temperature 1.0 draws; give a [4, 2] float64"),
    ("uniforms [4, 3]", lambda: drawn(torch.rand(4, 3).double()), ValueError, "uniforms is [4, 3]", "need [4, 2]"),
    ("uniforms [2, 2]", lambda: drawn(torch.rand(2, 2).double()), ValueError, "uniforms is [2, 2]", "4 rollouts of up"),
    ("uniforms in float32", lambda: drawn(torch.rand(4, 2)), ValueError, "uniforms is [4, 2] torch.float32", "float64"),
    ("uniforms of 1", lambda: drawn(ONES(4, 2).double()), ValueError, "uniforms holds numbers outside [0, 1); make it"),
    ("uniforms below 0", lambda: drawn(ONES(4, 2).double() * -1e-9), ValueError, "uniforms holds numbers outside [0,"),
    ("uniforms of NaN", lambda: drawn(ONES(4, 2).double() * NAN), ValueError, "uniforms holds numbers outside [0, 1)"),
]
MODELS = [
    ("a module", lambda: tune(TREE, lambda: nn.Linear(2, 2)), TypeError, "model is a Linear; shared prefixes work in"),
    ("a list", lambda: tune([[1, 2]]), TypeError, "tree is of type list; make one with PrefixTree.from_groups("),
    ("a tree of lengths", lambda: tune(LENGTHS_ONLY), ValueError, "has no tokens; use from_groups"),
    ("a vocabulary of 50", lambda: tune(sequences([[VOCAB]])), ValueError, "token id 50 is beyond the model's"),
    ("too long", lambda: tune(sequences([[1] * (MAX_SEQ_LEN + 1)])), ValueError, "193 tokens is longer than the"),
    ("two devices", lambda: tune(TREE.to("meta")), ValueError, "the tokens are on meta and the model on cpu; move"),
    ("an empty prefix", lambda: EncodedPrefix([]), ValueError, "is empty; drop it, or give it at least one token"),
    ("a prefix of text", lambda: EncodedPrefix("1+1="), TypeError, "is text; give its token ids, as a tokenizer makes"),
    ("hf, a module", lambda: integration.forward(nn.Linear(2, 2), TREE), TypeError, "model is of type Linear; give a"),
    ("transformers, a list", lambda: hf([[1, 2]]), TypeError, "tree is of type list; make one with PrefixTree."),
    ("transformers, lengths", lambda: hf(LENGTHS_ONLY), ValueError, "made from lengths and has no tokens; use"),
    ("transformers, meta", lambda: hf(TREE.to("meta")), ValueError, "the tree is on meta and the model on cpu; move"),
    ("transformers, 50 ids", lambda: hf(sequences([[VOCAB]])), ValueError, "token id 50 is beyond the model's"),
]

DOORS = {
    **{"Rollouts": ROLLOUTS, "group_advantages": ADVANTAGES, "PrefixTree": TREES, "pack": PACKING, "mask": MASKS},
    **{"attention": ATTENTION, "token_logprobs": LOGPROBS, "grpo_loss": LOSSES, "sampling": SAMPLING},
    **{"models": MODELS},
    **bad_data.DOORS,
}
CASES = [
    pytest.param(call, error, words, id=f"{door}: {what}")
    for door, rows in DOORS.items()
    for what, call, error, *words in rows
]


@pytest.mark.parametrize(("call", "error", "words"), CASES)
def test_a_mistake_is_refused_in_words_that_say_what_came(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_no_two_rows_have_one_name():
    assert len({case.id for case in CASES}) == len(CASES)
