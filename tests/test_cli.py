"""`flexpg` copies recipes that run where they are put, prints reports, and reports mistakes in one line."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_tokenizers import chat_tokenizer
from matplotlib.image import imread

from flexpg import __version__
from flexpg.__main__ import main, recipe_files
from flexpg.analysis.flops import ModelShape
from flexpg.analysis.report import report, rollouts_from_lengths
from flexpg.analysis.rollout_files import read_rollouts

ROOT = Path(__file__).parent.parent
RECIPES, TINY, TINY_YAML = ROOT / "recipes", ROOT / "recipes/assets/tiny", ROOT / "recipes/configs/tiny_cpu.yaml"
CONFIGS = sorted(path.stem for path in RECIPES.glob("configs/*.yaml"))
PYTHON_FILES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def _in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def contents(folder):
    """Return the files of a folder: path -> bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_python(code, **options):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, **options)


def test_cli_without_command_prints_help_and_imports_no_framework():
    lazy = "{'rich', 'matplotlib', 'transformers', 'torchtune', 'omegaconf', 'flexpg.analysis.plots'}"
    code = f"import sys; from flexpg.__main__ import main; main([]); main(['ls']); assert not {lazy} & set(sys.modules)"
    result = run_python(code)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: flexpg ")


def test_cli_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"flexpg {__version__}\n"


# ls, cp


def test_ls_prints_every_name_with_the_first_sentence_of_its_file(capsys):
    main(["ls"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == PYTHON_FILES + CONFIGS == list(recipe_files(RECIPES))
    assert all(line[-1] in ".?" for line in lines.values()), lines


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_cp_recipe_copies_all_that_it_imports_from_recipes(name, tmp_path, capsys):
    main(["cp", name])
    assert contents(tmp_path).keys() == {"recipes/__init__.py", f"recipes/{name}.py"}
    assert capsys.readouterr().out.splitlines() == ["recipes/__init__.py", f"recipes/{name}.py"]
    for node in ast.walk(ast.parse((RECIPES / f"{name}.py").read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
        assert not any(str(module).split(".")[0] == "recipes" for module in modules), ast.unparse(node)


@pytest.mark.parametrize("name", CONFIGS)
def test_cp_config_copies_the_assets_that_it_names(name, tmp_path):
    main(["cp", name, "somewhere/else"])
    here = tmp_path / "somewhere/else"
    copied = contents(here)
    assert copied.items() <= {f"recipes/{path}": content for path, content in contents(RECIPES).items()}.items()
    named = re.findall(r"recipes/assets/\S+", copied[f"recipes/configs/{name}.yaml"].decode())
    assert all((here / asset).exists() for asset in named)
    assert bool(named) == ("recipes/assets/README.md" in copied) == (len(copied) > 1)  # the licenses of the assets


def test_cp_all_copies_the_folder(tmp_path):
    main(["cp", "all"])
    assert contents(tmp_path / "recipes") == contents(RECIPES)


def test_cp_keeps_files_that_differ_unless_forced(tmp_path):
    changed = tmp_path / "recipes/configs/tiny_cpu.yaml"
    changed.parent.mkdir(parents=True)
    changed.write_text("mine")
    with pytest.raises(SystemExit, match=r"^error: files exist and differ: recipes/configs/tiny_cpu.yaml; --force"):
        main(["cp", "tiny_cpu"])
    assert contents(tmp_path) == {"recipes/configs/tiny_cpu.yaml": b"mine"}
    main(["cp", "tiny_cpu", "--force"])
    assert changed.read_bytes() == TINY_YAML.read_bytes()
    main(["cp", "tiny_cpu"])


# report

TEXTS = [{"prompt": f"{n} + {n} =", "completions": [f" {2 * n}", f" {n}, no"]} for n in (1, 2)]
MESSAGES = [{"role": role, "content": "Four?"} for role in ("user", "assistant", "user", "assistant")]


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("model", [TINY, TINY / "config.json", TINY_YAML], ids=["folder", "config.json", "yaml"])
def test_report_prints_tables_and_writes_figure_and_json(model, capsys):
    write("rollouts.jsonl", *TEXTS)
    command = ["report", "rollouts.jsonl", "--model", str(model), "--max-tokens", "8,64", "--json", "r.json"]
    main([*command, "--tokenizer", "bytes"] if model == TINY_YAML else command)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and "…" not in out
    assert "4 rollouts of 2 prompts: 14 prompt tokens, 16 completion tokens, 16 in the loss" in out
    assert "does not fit: line 1, completions[1] has 13 tokens" in out
    assert out.splitlines()[-2:] == ["wrote r.json", "wrote report.png"]
    assert imread("report.png").std() > 0.05
    rollouts, names = read_rollouts("rollouts.jsonl", encode=lambda text: list(text.encode()))
    written = json.loads(Path("r.json").read_text())
    shape = ModelShape(**written["shape"])
    assert (shape.num_layers, shape.embed_dim, shape.intermediate_dim, shape.vocab_size) == (4, 128, 384, 260)
    assert written == report(rollouts, shape, max_tokens=[8, 64], names=names).as_dict()


def test_report_of_lengths_needs_no_file():
    lengths = "--prompt-tokens 40 --completion-tokens 10 --group-size 3 --prompts 2".split()
    main(["report", *lengths, "--model", str(TINY), "--activation-checkpointing", "--json", "r.json"])
    written = json.loads(Path("r.json").read_text())
    expected = report(
        rollouts_from_lengths([40, 40], [[10] * 3] * 2), ModelShape(**written["shape"]), activation_checkpointing=True
    )
    assert written == expected.as_dict()


def test_report_of_messages_needs_a_chat_template_and_counts_turns(capsys):
    write("chats.jsonl", {"messages": MESSAGES})
    command = ["report", "chats.jsonl", "--model", str(TINY), "--out", "chats.svg"]
    with pytest.raises(SystemExit, match=r"^error: chats.jsonl:1: messages need a tokenizer with a chat template"):
        main(command)
    shutil.copytree(TINY, "chat")
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    Path("chat/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    main([*command, "--tokenizer", "chat"])
    assert "1 rollout of 1 prompt:" in capsys.readouterr().out
    main([*command, "--tokenizer", "chat", "--per-turn"])
    out = capsys.readouterr().out
    assert "2 rollouts of 2 prompts" in out and "By group size" not in out
    write("group.jsonl", *[{"messages": MESSAGES}] * 2)  # the first turns have a prompt in common
    main(["report", "group.jsonl", *command[2:], "--tokenizer", "chat", "--per-turn"])
    out = capsys.readouterr().out
    assert "4 rollouts of " in out and "By group size" not in out
    main(["report", "group.jsonl", *command[2:], "--tokenizer", "chat"])
    assert "By group size" in capsys.readouterr().out
    assert Path("chats.svg").read_text().startswith("<?xml")


def test_report_skips_bad_rows_and_notes_rewritten_conversations(capsys):
    chat_tokenizer("qwen3", "qwen3").save_pretrained("chat")
    bad = '{"messages": [\n'
    Path("chats.jsonl").write_text(bad + json.dumps({"messages": MESSAGES}) + "\n" + bad)
    command = ["report", "chats.jsonl", "--model", str(TINY), "--tokenizer", "chat"]
    with pytest.raises(SystemExit, match=r"^error: chats.jsonl:1: must be JSON: "):
        main(command)
    with pytest.raises(SystemExit, match=r"^error: chats.jsonl must have at least one rollout; skipped 3 rows: "):
        main([*command, "--skip-bad"])  # the tokenizer has ids that the model does not have
    config = json.loads((TINY / "config.json").read_text())
    Path("large.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    command[3] = "large.json"
    main([*command, "--skip-bad"])
    out, err = capsys.readouterr()
    assert "2 rollouts of 2 prompts" in out
    notes = err.splitlines()
    assert notes[0].startswith("note: 1 conversation stored turn by turn, ") and "line 2: messages[1] is" in notes[0]
    assert notes[1].startswith("note: skipped 2 rows: line 1, line 3; line 1: must be JSON: ") and len(notes) == 2


@pytest.mark.parametrize(
    ("stops", "tokens"), [("<|im_end|>", 1), ("<|endoftext|>,<|im_end|>", 1), ("<|endoftext|>", 2)]
)
def test_report_stop_tokens_end_turns(stops, tokens, capsys):
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    tokenizer.save_pretrained("chat")
    Path("large.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | {"vocab_size": 1000}))
    write("chats.jsonl", {"messages": [MESSAGES[0], MESSAGES[1] | {"content": ""}]})
    command = ["report", "chats.jsonl", "--model", "large.json", "--tokenizer", "chat", "--stop-tokens"]
    for option in (stops, ",".join(str(tokenizer.convert_tokens_to_ids(name)) for name in stops.split(","))):
        main([*command, option])
        assert f"{tokens} in the loss" in capsys.readouterr().out  # with the template's newline or without
    with pytest.raises(SystemExit, match=r"^error: --stop-tokens must be ids or tokens of the tokenizer, got '<end>'"):
        main([*command, "<end>"])


def test_report_template_options_reach_the_template(capsys):
    chat_tokenizer("qwen3", "qwen3_6").save_pretrained("chat")
    Path("large.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | {"vocab_size": 1000}))
    write("chats.jsonl", {"messages": MESSAGES[:2]})
    command = ["report", "chats.jsonl", "--model", "large.json", "--tokenizer", "chat", "--template-options"]
    counts = []
    for thinks in ("true", "false"):
        main([*command, f'{{"enable_thinking": {thinks}}}'])
        counts.append(int(re.search(r"(\d+) in the loss", capsys.readouterr().out)[1]))
    assert counts[0] > counts[1]  # with </think>


def run_without(packages, command):
    """Run a command as if packages were not installed."""
    missing = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))"
    return run_python(f"{missing}; from flexpg.__main__ import main; main({command})")


@pytest.mark.slow
def test_report_works_with_the_report_extra_only():
    write("rollouts.jsonl", *TEXTS)
    command = ["report", "rollouts.jsonl", "--model", str(TINY)]
    recipe_packages = ["torchtune", "torchao", "omegaconf", "datasets", "peft", "trl", "math_verify"]
    result = run_without(recipe_packages, command)
    assert result.returncode == 0, result.stderr
    for package, extra, model in (("matplotlib", "report", TINY), ("torchtune", "recipes", TINY_YAML)):
        result = run_without([package], [*command[:3], str(model)])
        assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: ")
        assert result.stderr.endswith(f"run: pip install 'flexpg[{extra}]'\n")


# Mistakes

LINES = [
    ("lss", "invalid choice: 'lss'"),
    ("cp grop", "argument NAME: must be a name that `flexpg ls` prints, got 'grop'; did you mean grpo?"),
    ("cp nothing", "argument NAME: must be a name that `flexpg ls` prints, got 'nothing'"),
    ("cp grpo file", "Not a directory: 'file/recipes'"),
    ("report good.jsonl", "the following arguments are required: --model"),
    ("report --model TINY", "give either FILE, or --prompt-tokens, --completion-tokens and --group-size"),
    ("report --prompt-tokens 9 --model TINY", "give either FILE, or "),
    ("report good.jsonl --prompts 2 --model TINY", "give either FILE, or "),
    ("report good.jsonl --model TINY --max-tokens=4096,", "must be a positive integer, got ''"),
    ("report good.jsonl --model TINY --max-tokens=1e3", "must be a positive integer, got '1e3'"),
    ("report gone.jsonl --model TINY", "No such file or directory: 'gone.jsonl'"),
    ("report large.jsonl --model TINY", "large.jsonl:2: token ids must be below the model's vocabulary size of 260"),
    ("report text.jsonl --model YAML", "text.jsonl:1: prompt is text, which needs a tokenizer"),
    ("report good.jsonl --model TINY --per-turn", "good.jsonl:1: per-turn rollouts need `messages`"),
    ("report good.jsonl --model gone", "no file gone; pass a checkpoint's folder or its config.json"),
    ("report good.jsonl --model .", "no file config.json; pass a checkpoint's folder"),
    ("report good.jsonl --model other", "--model other: ValueError: Unrecognized model in other"),
    ("report good.jsonl --model gone.yaml", "No such file or directory: "),
    ("report good.jsonl --model list.yaml", "list.yaml must have a `model` option"),
    ("report good.jsonl --model broken.yaml", "--model broken.yaml: ParserError: while parsing a flow node"),
    ("report good.jsonl --model headless.yaml", "--model headless.yaml: ZeroDivisionError: "),
    ("report good.jsonl --model adapter", "base_model_name_or_path in adapter/adapter_config.json must be a local"),
    ("report good.jsonl --model TINY --tokenizer gone", "no folder gone; pass one that holds a tokenizer"),
    ("report good.jsonl --model TINY --tokenizer bad", "--tokenizer bad: KeyError: "),
    ("report good.jsonl --model TINY --stop-tokens <end>", "--stop-tokens must be ids or tokens of the tokenizer"),
    ("report good.jsonl --model TINY --template-options [1]", "must be a JSON object, got '[1]'"),
    ("report good.jsonl --model TINY --out r.txt", "Format 'txt' is not supported"),
]


@pytest.fixture
def files():
    for name, content in {
        "file": "",
        "good.jsonl": '{"prompt": [1, 2], "completions": [[3]]}\n',
        "large.jsonl": '{"prompt": [1], "completion": [2]}\n{"prompt": [1], "completion": [260]}\n',
        "text.jsonl": '{"prompt": "1 + 1 =", "completion": " 2"}\n',
        "other/config.json": "{}",
        "bad/tokenizer_config.json": (TINY / "tokenizer_config.json").read_text(),
        "bad/tokenizer.json": '{"model": 1}',
        "adapter/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}',
        "headless.yaml": TINY_YAML.read_text().replace("num_heads: 4", "num_heads: 0"),
        "list.yaml": "- 1\n",
        "broken.yaml": "model: [\n",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)


@pytest.mark.parametrize(("command", "expected"), LINES)
def test_mistake_on_the_command_line_is_one_line(command, expected, files, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command.replace("TINY", str(TINY)).replace("YAML", str(TINY_YAML)).split())
    if caught.value.code == 2:
        usage, *_, message = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: flexpg") and ": error: " in message
    else:
        message = str(caught.value)
        assert message.startswith("error: ") and "\n" not in message
    assert expected in message


def test_ctrl_c_exits_with_status_130(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexpg.__main__.list_recipes", interrupt)
    with pytest.raises(SystemExit, match=r"^130$"):
        main(["ls"])


@pytest.mark.slow
@pytest.mark.parametrize(("command", "status"), [("report gone.jsonl --model gone", 1), ("cp grop", 2)])
def test_mistake_ends_the_process_without_traceback(command, status):
    command = [sys.executable, "-m", "flexpg", *command.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (status, "")
    assert "error: " in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
