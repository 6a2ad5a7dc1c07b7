"""Bad input of the recipe and of `python -m flexpg`: what is wrong, what is given, and words of the line that ends it.

The library's own doors stand in test_bad_input.py, files and texts in bad_data.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks.sharing import recipe
from recipes.grpo import SETUP_ERRORS, recipe_main

ROOT = Path(__file__).parent.parent
TINY, GSM8K = "recipes/configs/tiny_cpu.yaml", "recipes/configs/gsm8k_bytes_cpu.yaml"
ASSETS = ROOT / "recipes/assets/tiny"
LORA = (
    "model._component_=torchtune.models.qwen2.lora_qwen2 model.lora_attn_modules=[q_proj,v_proj] model.lora_rank=4 "
    "model.lora_alpha=8"
)
QWEN_TOKENIZER = "tokenizer._component_=torchtune.models.qwen2_5.qwen2_5_tokenizer tokenizer.merges_file=/no"


def table(rows):
    return [pytest.param(given, words, id=what) for what, given, *words in rows]


def holds(message, words):
    """The message is one line and has all the words."""
    assert message and "\n" not in message and all(word in message for word in words), message


OPTIONS = [
    ("a key too many", "groupsize=4", "unknown option groupsize; did you mean group_size?"),
    ("a key like no other", "zebra=4", "unknown option zebra; the recipe has activation_checkpointing, ", "seed"),
    ("steps of 0", "num_steps=0", "num_steps is 0; give a whole number, 1 or more"),
    ("steps of text", "num_steps=ten", "num_steps is 'ten'; give a whole number, 1 or more"),
    ("steps of true", "num_steps=true", "num_steps is True; give a whole number, 1 or more"),
    ("steps of null", "num_steps=null", "num_steps is None; give a whole number, 1 or more"),
    ("steps of 1e3", "num_steps=1e3", "num_steps is 1000.0; give a whole number, 1 or more"),
    ("a seed of text", "seed=abc", "seed is 'abc'; give a whole number, 0 or more"),
    ("a seed below 0", "seed=-1", "seed is -1; give a whole number, 0 or more"),
    ("a key that is a number", "seed.x=1", "seed is {'x': 1}; give a whole number, 0 or more"),
    ("a reference to nothing", "seed=${nowhere}", "Interpolation key 'nowhere' not found"),
    ("no tokens", "max_tokens=0", "max_tokens is 0; give a whole number, 1 or more"),
    ("no cache", "max_cache_tokens=0", "max_cache_tokens is 0; give a whole number, 1 or more"),
    ("no evaluation", "eval_every_n_steps=0", "eval_every_n_steps is 0; give a whole number, 1 or more"),
    ("no checkpoint kept", "keep_last_n_checkpoints=0", "keep_last_n_checkpoints is 0; give a whole number, 1 or more"),
    ("another sharing", "sharing=maybe", "sharing is 'maybe'; allowed are auto, true, false"),
    ("resume of 1", "resume=1", "resume is 1; allowed are true, false"),
    ("another dtype", "dtype=fp12", "dtype is 'fp12'; allowed are fp32, bf16"),
    ("parameters in less", "dtype=fp32 param_dtype=bf16", "param_dtype is bf16 and dtype fp32; set dtype to bf16"),
    ("another device", "device=gpu", "device is 'gpu'; give cpu or cuda"),
    ("a device not here", "device=cuda:99", "device ", "cuda:99"),
    ("another format", "prompt_format=prose", "prompt_format is 'prose'; allowed are plain, bos, chat"),
    ("another scaling", "scale_rewards=std", "scale_rewards is 'std'; allowed are group, batch, none"),
    ("a group of 1", "group_size=1", "group_size is 1, which makes every advantage zero; give 2 or more"),
    ("8 prompts in 3", "minibatches=3", "prompts_per_step=8 in minibatches=3 on a world of 1: give a multiple of"),
    ("clipping below 0", "clip_grad_norm=-1", "clip_grad_norm is -1; give a number above 0, .inf for no clipping"),
    ("clipping at true", "clip_grad_norm=true", "clip_grad_norm is True; give a number above 0"),
    ("no output", "output_dir=null", "output_dir is None; give a folder"),
    ("an empty output", "output_dir=''", "output_dir is ''; give a folder"),
]
COMPONENTS = [
    ("another loss", "loss.loss_type=ppo", "loss: loss_type is 'ppo'; allowed are grpo, bnpo, dr_grpo, dapo"),
    ("another level", "loss.importance_sampling_level=word", "is 'word'; allowed are token, sequence"),
    ("a misspelt loss option", "loss.epsilonn=0.1", "loss: ", "unexpected keyword argument 'epsilonn'"),
    ("epsilon below 0", "loss.epsilon=-1", "loss: epsilon is -1; give a number, 0 or more"),
    ("epsilon of text", "loss.epsilon=abc", "loss: epsilon is 'abc'; give a number, 0 or more"),
    ("beta of null", "loss.beta=null", "loss: beta is None; give a number, 0 or more"),
    ("a tensor of the loss", "loss.entropies=1", "loss: entropies is a int; give a tensor"),
    ("the loss's length", "loss.max_completion_length=9", "and sampling.max_new_tokens as the length"),
    ("no loss", "loss=null", "loss is None; give grpo_loss its options"),
    ("no rewards", "rewards=null", "rewards is None; give one or more, as `name: {function: dotpath, weight: 1.0}`"),
    ("a number for a reward", "rewards.correct=1", "reward 'correct' is 1; give `function: dotpath` and its options"),
    ("a weight of text", "rewards.correct.weight=much", "reward 'correct': weight is 'much'; give a finite number"),
    ("a reward's option", "rewards.correct.digits=3", "reward 'correct'", "unexpected keyword argument 'digits'"),
    (
        "a module for a reward",
        "rewards.correct.function=flexpg.training.tasks",
        "'flexpg.training.tasks', a module; name a function",
    ),
    ("no test reward", "test_reward=null", "reward 'test_reward' is None; give `function: dotpath` and its options"),
    (
        "a misspelt reward",
        "test_reward.function=flexpg.training.tasks.no_such_reward",
        "has no attribute 'no_such_reward'",
    ),
    ("temperature 0", "sampling.temperature=0", "sampling.temperature is 0; rollouts need a number above 0"),
    ("temperature of text", "sampling.temperature=warm", "sampling.temperature is 'warm'; rollouts need a number"),
    ("temperature inf", "sampling.temperature=.inf", "sampling: temperature is inf; give 0 for greedy or a positive"),
    ("half a token", "sampling.max_new_tokens=36.5", "sampling: max_new_tokens is 36.5; give a whole number"),
    ("top_k of text", "sampling.top_k=ten", "sampling: top_k is 'ten'; give a whole number"),
    ("its own stops", "sampling.stop_tokens=[5]", "sampling.stop_tokens are the tokenizer's; leave them out"),
    ("no checkpointer", "checkpointer=null", "checkpointer is None; give a _component_ and its arguments"),
    ("an unknown family", "checkpointer.model_type=LAMA3", "checkpointer: ", "does not know 'LAMA3'"),
    ("another family", "checkpointer.model_type=LLAMA3", "checkpointer: "),
    ("no such weights", "checkpointer.checkpoint_files=[nothing.safetensors]", "nothing.safetensors"),
    ("no such checkpoint", "checkpointer.checkpoint_dir=recipes/nowhere", "recipes/nowhere"),
    ("an output that is a file", "output_dir=README.md", "checkpointer: [Errno 17] File exists: 'README.md'"),
    ("an output nowhere", "output_dir=/proc/no", "checkpointer: [Errno 2] No such file or directory: '/proc/no'"),
    ("a misspelt model", "model._component_=torchtune.models.no_such_model", "model: ", "no_such_model"),
    ("a model of no width", "model.embed_dim=64", "does not fit `model`", "tok_embeddings.weight is [260, 128] there"),
    ("a model of -4", "model.embed_dim=-4", "model: "),
    ("a model of text", "model.embed_dim=abc", "model: unsupported operand type(s)"),
    ("no heads", "model.num_heads=0", "model: ZeroDivisionError: "),
    ("other heads", "model.num_heads=8 model.num_kv_heads=4", "it has (4, 2) heads, the model (8, 4)"),
    ("dropout", "model.attn_dropout=0.1", "attn_dropout=0.1"),
    ("DoRA", f"{LORA} model.use_dora=true", "use_dora and quantize_base are not supported; set both to false"),
    ("a short context", "model.max_seq_len=128", "train problem 0 of 16: ", "longer than the model's max_seq_len=128"),
    ("a small vocabulary", "model.vocab_size=40", "train problem 0 of 16: token id ", "the model's vocabulary of 40"),
    ("long completions", "sampling.max_new_tokens=5000", "train problem 0 of 16: ", "the model's max_seq_len=4096"),
    ("a small budget", "max_tokens=200", "train problem 0 of 16: prompt and completion of ", "exceed max_tokens=200"),
    ("a small cache", "max_cache_tokens=200", "train problem 0 of 16: ", "exceed max_cache_tokens=200"),
    ("too few problems", "train_problems.size=5", "train_problems has 5; this run needs 8 or more"),
    ("a size of text", "train_problems.size=abc", "train_problems: size is 'abc'; give a whole number, 1 or more"),
    ("a misspelt split", "train_problems.splitt=train", "train_problems: ", "unexpected keyword argument 'splitt'"),
    ("a tokenizer of no file", f"{QWEN_TOKENIZER} tokenizer.path=/no", "tokenizer: ", "No such file"),
    ("a stop of 5", "tokenizer.stop=5", "tokenizer: stop is 5; a stop character must be ASCII"),
    ("a misspelt optimizer", "optimizer._component_=torch.optim.Adamm", "optimizer: Error loading 'torch.optim.Adamm'"),
    ("a rate of text", "optimizer.lr=fast", "optimizer: "),
    ("a rate below 0", "optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
    ("a misspelt schedule", "lr_scheduler.factorr=2", "lr_scheduler: ", "factorr"),
    ("no log", "metric_logger=null", "metric_logger is None; give a _component_ and its arguments"),
]


@pytest.mark.parametrize(("given", "words"), table(OPTIONS + COMPONENTS))
def test_an_option_is_refused_before_anything_is_trained_or_written(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output_dir = tmp_path / "out"
    with pytest.raises(SETUP_ERRORS) as caught:
        recipe(TINY, True, output_dir, ["train_problems.size=16", "test_problems.size=8", *given.split()])
    assert all(word in str(caught.value) for word in words), caught.value
    assert not output_dir.exists() or not any(output_dir.iterdir())


def of_files(rows):
    return [pytest.param(name, content, words, id=what) for what, name, content, *words in rows]


DATA = [
    ("no file", "no.jsonl", None, "no file or directory ", "no.jsonl' (working directory "),
    ("an empty file", "no.jsonl", "", "no.jsonl has 0 rows, too few for 6 shots; lower `shots`"),
    ("a line cut off", "a.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question":', "a.jsonl line 2 is not JSON"),
    ("no question", "a.jsonl", '{"answer": "#### 1"}\n' * 9, "a.jsonl line 1 has nothing under 'question'"),
    ("no number", "a.jsonl", '{"question": "q", "answer": "1"}\n' * 9, "line 1: the answer has no number after '####'"),
    ("another kind", "a.txt", "{}", "a.txt is not a .jsonl, .json, .parquet, .csv file; convert it"),
]


@pytest.mark.parametrize(("name", "content", "words"), of_files(DATA))
def test_data_that_cannot_be_read_is_named_before_anything_is_trained(name, content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SETUP_ERRORS) as caught:
        recipe(GSM8K, True, tmp_path / "out", [f"train_problems.source={tmp_path / name}"])
    holds(str(caught.value), ["train_problems: ", *words])
    assert not (tmp_path / "out").exists()


WEIGHTS = [
    ("weights cut off", "model.safetensors", (ASSETS / "model.safetensors").read_bytes()[:-1000], "model.safetensors"),
    ("weights of text", "model.safetensors", b"nothing", "Unable to load checkpoint from ", "model.safetensors"),
    ("a config cut off", "config.json", b"{", "checkpointer: Expecting property name"),
    ("no config", "config.json", None, "checkpointer: [Errno 2] No such file or directory: ", "config.json"),
    ("no weights", "model.safetensors", None, "model.safetensors"),
]


@pytest.mark.parametrize(("name", "content", "words"), of_files(WEIGHTS))
def test_a_checkpoint_that_cannot_be_read_is_named(name, content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "weights"
    shutil.copytree(ASSETS, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(SETUP_ERRORS) as caught:
        recipe(TINY, True, tmp_path / "out", ["train_problems.size=16", f"checkpointer.checkpoint_dir={folder}"])
    holds(str(caught.value), words)


RECIPE_LINES = [
    ("no such file", "--config nowhere.yaml", "No such file or directory: ", "nowhere.yaml"),
    ("a folder", "--config .", "Is a directory: "),
    ("broken YAML", "--config broken.yaml", "while parsing a flow ", "broken.yaml", "line 2"),
    ("a list", "--config list.yaml", "the file of --config has no names at its top; give a YAML of `name: value`"),
    ("numbers for names", "--config numbers.yaml", "the file of --config has no names at its top; give a YAML of"),
    ("an empty file", "--config empty.yaml", "missing option activation_checkpointing, "),
    ("no text", "--config binary.yaml", "'utf-8' codec can't decode byte 0xff"),
    ("a word", "--config tiny.yaml output_dir", "overrides must be in the form of key=value, got output_dir"),
    ("two signs", "--config tiny.yaml a=b=c", "overrides must be in the form of key=value, got a=b=c"),
    ("broken YAML in it", "--config tiny.yaml seed=[1", "while parsing a flow sequence"),
    ("a flag", "--config tiny.yaml --seed 3", "Additional flag arguments not supported: ['--seed']"),
    ("no key to leave out", "--config tiny.yaml ~nokey", "Could not find key nokey in yaml config to remove"),
    ("a key left out", "--config tiny.yaml ~seed", "missing option seed; the recipe has "),
    ("a reference to nothing", "--config tiny.yaml num_steps=${nowhere}", "Interpolation key 'nowhere' not found"),
]


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A folder of configurations, most of them broken."""
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.load(ROOT / TINY)
    cfg.output_dir = "out"
    OmegaConf.save(cfg, "tiny.yaml")
    for name, content in {"broken": "model: [\n", "list": "- 1\n", "numbers": "1: 2\n", "empty": ""}.items():
        Path(f"{name}.yaml").write_text(content)
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(("given", "words"), table(RECIPE_LINES))
def test_a_command_line_of_the_recipe_is_refused_in_one_line(given, words, configs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo.py", *given.split()])
    with pytest.raises(SystemExit) as caught:
        recipe_main()
    assert str(caught.value).startswith("error: ")
    holds(str(caught.value), words)
    assert not Path("out").exists()


@pytest.mark.parametrize("given", ["", "--config", "--confg tiny.yaml"])
def test_a_command_line_without_a_configuration_gets_the_usage(given, configs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo.py", *given.split()])
    with pytest.raises(SystemExit, match=r"^2$"):
        recipe_main()
    assert capsys.readouterr().err.startswith("usage: grpo.py [-h] --config CONFIG")


PROCESSES = [
    ("recipes.grpo --config nowhere.yaml", 1, "error: [Errno 2] No such file or directory: "),
    (f"recipes.grpo --config {TINY} loss.loss_type=ppo", 1, "error: loss: loss_type is 'ppo'; allowed are grpo, "),
]


@pytest.mark.parametrize(("given", "status", "words"), PROCESSES)
def test_a_process_ends_with_its_status_and_without_a_traceback(given, status, words):
    command = [sys.executable, "-m", *given.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
