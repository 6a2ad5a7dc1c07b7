"""Samples of a run: what is chosen, the file that a resumed run continues, the terminal, W&B and TensorBoard."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from chat_tokenizers import chat_tokenizer
from torchtune.training.metric_logging import TensorBoardLogger, WandBLogger

from flexpg.training.causal_lm import CheckpointTokenizer
from flexpg.training.episodes import Episode, Turn
from flexpg.training.reward_calls import Log
from flexpg.training.rewards import Scores
from flexpg.training.samples_log import Sample, SamplesLog, best_and_worst, format_samples, read_samples
from flexpg.training.tasks import ByteTokenizer, Problem

TOKENIZER = ByteTokenizer()
SAMPLE = Sample(3, "Add.\n2+2=", "4", "#### 4", {"correct": 1.0, "style": None}, 1.0, 0.7, 7, False)
# Line separators that do not end a line of JSON, a fence of Markdown, a lone surrogate, which UTF-8 cannot store.
NASTY = replace(SAMPLE, step=4, completion="a\u2028b\x85c\r\nd\n```\n\ud800 \x00 \u00e9 <b>", is_truncated=True)


def turn(prompt: str, completion: str) -> Turn:
    tokens = [torch.tensor(TOKENIZER.encode(text)) for text in (prompt, completion)]
    return Turn(*tokens, torch.zeros(len(completion)), is_finished=True)


def test_best_and_worst_returns_the_highest_and_lowest_reward_as_text():
    episodes = [Episode([turn("2+2=", text)]) for text in ("3\n", "4\n", "5\n")]
    episodes.append(Episode([turn("2+2=", "four")], is_finished=False))
    style = torch.tensor([1.0, math.nan, 1.0, 0.5])
    scores = Scores(torch.tensor([0.25, 1.0, 0.25, 0.125]), {"style": style}, Log())
    best, worst = best_and_worst(3, Problem("2+2=", "4"), episodes, scores, [-0.5, 1.5, -0.5, -1.0], TOKENIZER)
    assert best == Sample(3, "2+2=", "4", "4", {"style": None}, 1.0, 1.5, 2, False)
    assert worst == Sample(3, "2+2=", "4", "four", {"style": 0.5}, 0.125, -1.0, 4, True)


def test_best_and_worst_of_equal_rewards_are_two_different_rollouts():
    episodes = [Episode([turn("2+2=", text)]) for text in "345"]
    scores = Scores(torch.zeros(3), {}, Log())
    found = best_and_worst(1, Problem("2+2=", "4"), episodes, scores, [0.0] * 3, TOKENIZER)
    assert [sample.completion for sample in found] == ["3", "5"]


def test_sample_of_several_turns_has_what_the_environment_answered():
    episode = Episode([turn("Q: ", "look\n"), turn("Q: look\n[it is 4] ", "4\n")])
    scores = Scores(torch.ones(2), {}, Log())
    sample, _ = best_and_worst(1, Problem("Q: ", "4"), [episode] * 2, scores, [0.0] * 2, TOKENIZER)
    assert (sample.completion, sample.completion_tokens) == ("look\n[it is 4] 4", 7)


def test_sample_of_several_turns_shows_special_tokens_of_a_checkpoint():
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    loaded = CheckpointTokenizer(tokenizer, [tokenizer.eos_token_id], {})
    texts = ["<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "look<|im_end|>"]
    answered = "\n<|im_start|>user\nIt is 4.<|im_end|>\n<|im_start|>assistant\n"
    first, second = (torch.tensor(loaded.encode(text)) for text in texts)
    later = torch.tensor([*first.tolist(), *second.tolist(), *loaded.encode(answered)])
    turns = [Turn(first, second, torch.zeros(len(second)), True)]
    turns.append(Turn(later, torch.tensor(loaded.encode("4<|im_end|>")), torch.zeros(2), True))
    scores = Scores(torch.ones(2), {}, Log())
    sample, single = (
        best_and_worst(1, Problem("Q", "4"), [Episode(own_turns)] * 2, scores, [0.0] * 2, loaded)[0]
        for own_turns in (turns, turns[:1])
    )
    assert sample.completion == f"look<|im_end|>{answered}4"
    assert single.completion == "look"


def test_samples_file_has_one_valid_json_object_per_line(tmp_path):
    log = SamplesLog(tmp_path / "new/samples.jsonl", steps_done=0)
    log.write([SAMPLE], None)
    log.write([NASTY], None)
    lines = log.path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and lines[2] == ""
    assert json.loads(lines[0])["rewards"] == {"correct": 1.0, "style": None}
    assert read_samples(log.path) == [SAMPLE, NASTY]


def test_resumed_run_repeats_no_samples_and_drops_a_line_that_was_cut_off(tmp_path):
    log = SamplesLog(tmp_path / "samples.jsonl", steps_done=0)
    assert not log.path.exists()
    for step in (1, 2, 3, 4):
        log.write([replace(SAMPLE, step=step)] * 2, None)
    with log.path.open("a") as file:
        file.write('{"step": 2, "prom')  # the process was killed
    resumed = SamplesLog(log.path, steps_done=2)
    resumed.write([replace(SAMPLE, step=3)], None)
    assert [sample.step for sample in read_samples(log.path)] == [1, 1, 2, 2, 3]
    SamplesLog(log.path, steps_done=0)
    assert log.path.read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_format_samples_shortens_long_prompts_and_completions():
    long = replace(SAMPLE, prompt="x" * 500 + "2+2=", completion="so" + "y" * 500 + "#### 4", is_truncated=True)
    prompt, best, worst = format_samples([long, SAMPLE]).splitlines()[:3]
    assert prompt.startswith("step    3  '...xxx") and prompt.endswith("xx2+2='") and len(prompt) < 100
    assert best.startswith("  reward 1.000 (correct 1, style -)  advantage +0.70  7 tokens, truncated  'so")
    assert best.endswith("yy#### 4'") and " ... " in best and len(best) < 180
    assert worst == "step    3  'Add.\\n2+2='"


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"step": 1}'])
def test_invalid_line_raises_and_blank_ones_are_skipped(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    SamplesLog(path, 0).write([SAMPLE], None)
    path.write_text("\n" + path.read_text() + "  \n")
    assert read_samples(path) == [SAMPLE]
    path.write_text(f"{path.read_text()}{line}\n")
    message = rf"samples.jsonl, line 4 must be a sample that the recipe wrote, got {re.escape(repr(line))[:-1]}"
    with pytest.raises(ValueError, match=message):
        SamplesLog(path, 0)


class Recorder:
    """Records calls, in place of the wandb module or of TensorBoard's writer."""

    run = True

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, row: dict[str, Any]) -> None:
        self.calls.append(row)

    def Table(self, columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]

    def add_text(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    def finish(self) -> None:
        pass

    close = finish


class WandBRecorder(WandBLogger):
    """Torchtune's logger without an account."""

    def __init__(self) -> None:
        self._wandb = Recorder()


class TensorBoardRecorder(TensorBoardLogger):
    """Torchtune's logger without the tensorboard package."""

    def __init__(self) -> None:
        self._writer = Recorder()


def test_samples_go_to_wandb_as_a_table(tmp_path):
    logger = WandBRecorder()
    SamplesLog(tmp_path / "samples.jsonl", 0).write([SAMPLE, replace(NASTY, step=3)], logger)
    (row,) = logger._wandb.calls
    assert row["global_step"] == 3
    assert [cells["completion"] for cells in row["samples"]] == [SAMPLE.completion, NASTY.completion]
    assert json.loads(row["samples"][0]["rewards"]) == SAMPLE.rewards  # a column of one type


def test_samples_go_to_tensorboard_as_text_that_is_all_code(tmp_path):
    logger = TensorBoardRecorder()
    SamplesLog(tmp_path / "samples.jsonl", 0).write([NASTY], logger)
    ((tag, text, step),) = logger._writer.calls
    assert (tag, step) == ("samples", 4)
    assert "    ```" in text
    assert all(line.startswith("    ") for line in text.split("\n") if line)


def test_tensorboard_reads_the_samples(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(str(tmp_path), organize_logs=False)
    SamplesLog(tmp_path / "samples.jsonl", 0).write([SAMPLE], logger)
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 3 and b"    #### 4" in event.tensor_proto.string_val[0]
