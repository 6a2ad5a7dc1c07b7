"""Bad data: files, transcripts, tasks, rewards and texts that cannot be read; test_bad_input.py tests the rows.

A row is what is wrong, the call, its error, and what the message contains.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch

from flexpg.training.rewards import (
    Reward,
    RewardError,
    named_rewards,
    number_closeness,
    number_correct,
    reward,
    score,
    short_enough,
)
from flexpg.training.tasks import ByteTokenizer, arithmetic, gsm8k, problems
from flexpg.training.tasks.tau_bench import tau_bench

NAN, INF = math.nan, math.inf
USER, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TASK = {"task_id": 1, "reward": 0.0, "traj": [USER, SAID]}
ROW, OTHER = {"q": "1+1", "a": 2}, {"q": "2+2", "a": 4}


def file(name, *rows):
    """A file of lines: bytes as they are, anything else as JSON."""
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    Path(name).write_bytes(b"".join(line + b"\n" for line in lines))
    return name


def tau(text):
    Path("tau.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return tau_bench("tau.json")


def asked(*rows, template="{q}", answer="{a}", **options):
    return problems(file("rows.jsonl", *rows), template, answer, **options)


def scored(value):
    """The second of two rollouts has this value."""
    return score(
        [Reward("mine", lambda completion, answer: value if completion == "b" else 1.0)], ["a", "b"], ["5"] * 2
    )


def matches(**options):
    return reward("format", "flexpg.training.rewards.matches", **options)


TAU = [
    ("no file", lambda: tau_bench("none.json"), FileNotFoundError, "no file 'none.json' (working directory /"),
    ("cut off", lambda: tau("[{"), ValueError, "tau.json is not JSON: "),
    ("an object", lambda: tau({}), ValueError, "tau.json holds '{}'; tau-bench's results are a list of conversations"),
    ("nothing", lambda: tau([]), ValueError, "tau.json holds '[]'; tau-bench's results are a list of conversations"),
    ("a number", lambda: tau([TASK, 3]), ValueError, "tau.json entry 1 of 2 is '3'; it needs an object with task_id"),
    ("a task of text", lambda: tau([TASK | {"task_id": "x"}]), ValueError, "entry 0 of 1 has task_id 'x'; it needs a"),
    ("no reward", lambda: tau([TASK | {"reward": None}]), ValueError, "entry 0 of 1 has reward None; it needs a"),
    ("a reward of true", lambda: tau([TASK | {"reward": True}]), ValueError, "has reward True; it needs a finite"),
    ("a reward of text", lambda: tau([TASK | {"reward": "1"}]), ValueError, "has reward '1'; it needs a finite number"),
    ("a huge reward", lambda: tau([TASK, TASK | {"reward": 10**400}]), ValueError, "entry 1 of 2 has reward"),
    ("no messages", lambda: tau([TASK | {"traj": None}]), ValueError, "has traj 'None'; it needs a list of messages"),
    ("a message of 1", lambda: tau([TASK | {"traj": [USER, 1]}]), ValueError, "entry 0 of 1, traj: message 1 is a int"),
    ("calls of 5", lambda: tau([TASK | {"traj": [SAID | {"tool_calls": 5}]}]), ValueError, "message 0 has tool_calls"),
]
PROBLEMS = [
    ("no file", lambda: problems("no.jsonl", "{q}", "{a}"), FileNotFoundError, "no file or directory 'no.jsonl'"),
    ("no folder", lambda: problems("/nowhere", "{q}", "{a}"), FileNotFoundError, "no file or directory '/nowhere'"),
    ("a long path", lambda: problems("a/b/c", "{q}", "{a}"), FileNotFoundError, "no file or directory 'a/b/c'"),
    ("a home", lambda: problems("~/nowhere/no", "{q}", "{a}"), FileNotFoundError, "no file or directory"),
    ("no source", lambda: problems(None, "{q}", "{a}"), ValueError, "source is None; give a text"),
    ("an empty source", lambda: problems("", "{q}", "{a}"), ValueError, "source is ''; give a text"),
    ("a .txt file", lambda: problems(file("a.txt"), "{q}", "{a}"), ValueError, "a.txt is not a .jsonl, .json,"),
    ("an empty file", lambda: asked(), ValueError, "rows.jsonl has 0 rows, too few for a question"),
    ("another split", lambda: asked(ROW, split="test"), ValueError, "is one file, whose split is 'train', not 'test';"),
    ("a line cut off", lambda: asked(ROW, b"", b"{broken"), ValueError, "rows.jsonl line 3 is not JSON: Expecting"),
    ("no text", lambda: asked(ROW, b"\xdc\xff"), ValueError, "rows.jsonl line 2 is not JSON: 'utf-8' codec can't"),
    ("a list", lambda: asked(ROW, [1]), ValueError, "rows.jsonl line 2 is '[1]'; a row is an object like"),
    ("no answer", lambda: asked({"q": "1"}), ValueError, "line 1 has nothing under 'a', which `answer` needs; it has"),
    ("a null", lambda: asked({"q": None, "a": 2}), ValueError, "line 1 has nothing under 'q', which `template` needs;"),
    ("no columns", lambda: asked({}), ValueError, "nothing under 'q', which `template` needs; it has no columns"),
    ("a broken list", lambda: problems(file("a.json", b"[{}", b","), "{q}", ""), ValueError, "a.json is not JSON"),
    ("another column", lambda: asked(ROW, template="{x}"), ValueError, "nothing under 'x', which `template` needs; it"),
    ("no template", lambda: asked(ROW, template=None), ValueError, "template is None; give a text"),
    ("an open brace", lambda: asked(ROW, template="{q"), ValueError, "template '{q' cannot be filled: expected '}'"),
    ("empty braces", lambda: asked(ROW, template="{}"), ValueError, "template '{}' cannot be filled: Format string"),
    ("an attribute", lambda: asked(ROW, template="{q.x}"), ValueError, "cannot be filled: 'str' object has no"),
    ("a place too far", lambda: asked(ROW, template="{q[9]}"), ValueError, "cannot be filled: string index out of"),
    ("a number's format", lambda: asked(ROW, template="{q:d}"), ValueError, "cannot be filled: Unknown format code"),
    ("too few left", lambda: asked(ROW, OTHER, shots=1, skip=1), ValueError, "has 2 rows, too few for a question"),
    ("too few shots", lambda: asked(ROW, shots=2), ValueError, "rows.jsonl has 1 rows, too few for 2 shots; lower"),
    ("a size of 0", lambda: asked(ROW, size=0), ValueError, "size is 0; give a whole number, 1 or more"),
    ("a size of True", lambda: asked(ROW, size=True), ValueError, "size is True; give a whole number, 1 or more"),
    ("a skip of -1", lambda: asked(ROW, skip=-1), ValueError, "skip is -1; give a whole number, 0 or more"),
    ("shots of 1.5", lambda: asked(ROW, shots=1.5), ValueError, "shots is 1.5; give a whole number, 0 or more"),
    ("GSM8K of no source", lambda: gsm8k(5), ValueError, "source is 5; give a text"),
    ("arithmetic, dev", lambda: arithmetic("dev"), ValueError, "split is 'dev'; arithmetic has 'train' and 'test'"),
    ("arithmetic, short", lambda: arithmetic(size=1, examples=2), ValueError, "2 worked examples make a prompt of"),
    ("arithmetic, none", lambda: arithmetic(size=0), ValueError, "size is 0; give a whole number, 1 or more"),
    ("arithmetic, text", lambda: arithmetic(size="9"), ValueError, "size is '9'; give a whole number, 1 or more"),
]
REWARDS = [
    ("no module", lambda: reward("r", "no_such.f"), ValueError, "reward 'r'", "cannot be imported: No module named"),
    (
        "no function",
        lambda: reward("r", "flexpg.training.rewards.none"),
        ValueError,
        "module 'flexpg.training.rewards' has no attribute",
    ),
    ("nothing", lambda: reward("r", ""), ValueError, "reward 'r': function is '', which cannot be imported"),
    ("None", lambda: reward("r", None), ValueError, "reward 'r': function is None; name it as 'module.function'"),
    ("a number", lambda: reward("r", "math.pi"), ValueError, "function is 'math.pi', a float; name a function"),
    (
        "a module",
        lambda: reward("r", "flexpg.training.rewards"),
        ValueError,
        "'flexpg.training.rewards', a module; name a function",
    ),
    ("no signature", lambda: reward("r", "builtins.str"), ValueError, "str does not tell its arguments; wrap it in a"),
    (
        "an option missing",
        lambda: matches(),
        ValueError,
        "reward 'format': flexpg.training.rewards.matches(",
        "'pattern'",
    ),
    ("an option too many", lambda: matches(pattern="a", flags=2), ValueError, "unexpected keyword argument 'flags'"),
    ("an option twice", lambda: matches(completion="a"), ValueError, "multiple values for argument 'completion'"),
    ("a weight of NaN", lambda: Reward("r", len, NAN), ValueError, "reward 'r': weight is nan; give a finite number"),
    ("a weight of inf", lambda: Reward("r", len, INF), ValueError, "reward 'r': weight is inf; give a finite number"),
    ("a weight of 1e39", lambda: Reward("r", len, 1e39), ValueError, "weight is 1e+39; give a finite number"),
    ("a huge weight", lambda: Reward("r", len, 10**400), ValueError, "reward 'r': weight is 1000", "give a finite"),
    ("a weight of True", lambda: Reward("r", len, True), ValueError, "weight is True; give a finite number"),
    ("a weight of text", lambda: Reward("r", len, "1"), ValueError, "weight is '1'; give a finite number"),
    ("a weight of None", lambda: Reward("r", len, None), ValueError, "weight is None; give a finite number"),
    ("a name for it", lambda: Reward("r", "math.sin"), ValueError, "reward 'r': function is 'math.sin'; give one, or"),
    ("described by None", lambda: named_rewards(None), ValueError, "rewards is None; give one or more, as `name:"),
    ("described by text", lambda: named_rewards({"r": "f"}), ValueError, "reward 'r' is 'f'; give `function: dotpath`"),
    ("two names", lambda: named_rewards({"r": {"function": "f", "name": "s"}}), ValueError, "reward 'r' is ", "give"),
    ("no rewards", lambda: score([], ["a"], ["b"]), ValueError, "rewards are []; give at least one, each with a name"),
    ("a plain function", lambda: score([number_correct], ["1"], ["1"]), TypeError, "rewards hold a function; make it"),
    ("one name twice", lambda: score([Reward("x", len)] * 2, [], []), ValueError, "rewards are ['x', 'x']; give at"),
    ("an answer too few", lambda: score([Reward("x", len)], ["a"], []), ValueError, "there are 1 completions and 0"),
    ("the sum of much", lambda: score([Reward("x", lambda *_: 1e30, 1e30)], [""], [""]), RewardError, "total is inf;"),
    ("a value of NaN", lambda: scored(NAN), RewardError, "reward 'mine': rollout 1 of 2 returned nan; return a finite"),
    ("a value of -inf", lambda: scored(-INF), RewardError, "returned -inf; return a finite number (completion 'b',"),
    ("a value of 1e39", lambda: scored(1e39), RewardError, "rollout 1 of 2 returned 1e+39; return a finite number"),
    ("a value of 5001 digits", lambda: scored(10**5000), RewardError, "returned inf; return a finite number"),
    ("a value of None", lambda: scored(None), RewardError, "returned None of type NoneType; return a finite number"),
    ("a value of text", lambda: scored("1.0"), RewardError, "returned '1.0' of type str; return a finite number"),
    ("a value of 1j", lambda: scored(1j), RewardError, "returned 1j of type complex; return a finite number"),
    ("a value in a tensor", lambda: scored(torch.ones(())), RewardError, "returned tensor(1.) of type Tensor; return"),
    ("long texts", lambda: score([Reward("r", lambda *_: None)], ["x" * 81], ["5"]), RewardError, f"'{'x' * 80}'..., "),
    ("no right number", lambda: number_correct("Paris", "Paris"), ValueError, "the answer has no number to compare"),
    ("no close number", lambda: number_closeness("4", "Paris"), ValueError, "the answer has no number to compare with"),
    ("0 characters", lambda: short_enough("", "", max_chars=0), ValueError, "max_chars is 0; give 1 or more"),
]
IMAGE = SimpleNamespace(role="user", content=[{"type": "image"}], masked=True)
TEXTS = [
    ("an unknown id", lambda: ByteTokenizer().decode([97, 260]), ValueError, "token id 260 is outside this"),
    ("a wide stop", lambda: ByteTokenizer(stop="。"), ValueError, "stop is '。'; a stop character must be ASCII to be"),
    ("a stop of 5", lambda: ByteTokenizer(stop=5), ValueError, "stop is 5; a stop character must be ASCII to be one"),
    ("a length of 0", lambda: ByteTokenizer(max_seq_len=0), ValueError, "max_seq_len is 0; give a whole number, 1 or"),
    ("a length of text", lambda: ByteTokenizer(max_seq_len="9"), ValueError, "max_seq_len is '9'; give a whole number"),
    ("an image", lambda: ByteTokenizer().tokenize_messages([IMAGE]), ValueError, "a user message holds 'image'"),
]

DOORS = {
    **{"tau-bench": TAU, "tasks": PROBLEMS},
    **{"rewards": REWARDS, "byte tokenizer": TEXTS},
}
