"""Episodes of several turns, against the turns that flexpg.conversations reads from the finished conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from chat_tokenizers import chat_tokenizer
from torch import Tensor

from flexpg import PrefixTree
from flexpg.conversations.chat_template import assistant_turns
from flexpg.sampling import Samples
from flexpg.training.causal_lm import CheckpointTokenizer
from flexpg.training.dialogues import sample_dialogues
from flexpg.training.distributed import World
from flexpg.training.environments import EnvironmentConfig
from flexpg.training.episodes import build_rollouts, episode_advantages, subtract_kl
from flexpg.training.prompts import prompt_tokens
from flexpg.training.tasks import ByteTokenizer, Problem

PROBLEM = Problem("What is 6 times 7?", "42")


class Script:
    """A sampler that writes given texts, each with a stop token unless it ends with an ellipsis."""

    def __init__(self, tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.seeds: list[int] = []

    def __call__(self, prompts: Sequence[Tensor], group_size: int, seeds: Sequence[int]) -> Samples:
        own = [self.texts.pop(0) for _ in range(len(prompts) * group_size)]
        self.seeds += seeds
        stop = self.tokenizer.stop_tokens[:1]
        tokens = [torch.tensor(self.tokenizer.encode(text) + stop * (not text.endswith("..."))) for text in own]
        logprobs = torch.zeros(len(own), max(map(len, tokens), default=0))
        return Samples(tokens, logprobs, torch.tensor([not text.endswith("...") for text in own]))


def tool(messages: list, problem: Problem) -> tuple[list, float]:
    """Answer every turn but one that says `done`."""
    is_done = "done" in messages[-1]["content"]
    return ([], 1.0) if is_done else ([{"role": "tool", "content": f"saw {len(messages)} messages"}], 0.125)


def played(tokenizer, texts: Sequence[str], group_size: int = 1, max_turns: int = 5, **options):
    environment = EnvironmentConfig(lambda problem: lambda messages: tool(messages, problem), max_turns)
    options = {"prompt_format": "chat", "max_prompt": 10_000, "world": None} | options
    prompt = torch.tensor(prompt_tokens(tokenizer, PROBLEM.prompt, options["prompt_format"]))
    script = Script(tokenizer, texts)
    (group,) = sample_dialogues(environment, script, tokenizer, [PROBLEM], [prompt], group_size, [7], **options)
    assert not script.texts
    return group, script


def checkpoint_tokenizer(family: str) -> CheckpointTokenizer:
    tokenizer = chat_tokenizer(family, family)
    return CheckpointTokenizer(tokenizer, [tokenizer.eos_token_id], {})


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3"])
def test_turns_equal_those_read_from_the_finished_conversation(family):
    tokenizer = checkpoint_tokenizer(family)
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""  # its template writes one in any case
    texts = [f"{thought}{text}" for text in ("I multiply.", "Again.", "It is done.")]
    ([episode], _) = played(tokenizer, texts)
    messages = [{"role": "user", "content": PROBLEM.prompt}]
    for n, text in enumerate(texts):
        messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": f"saw {2 * n + 2} messages"}]
    expected = assistant_turns(tokenizer.tokenizer, messages[:-1])
    assert len(expected) == len(episode.turns) == 3
    for turn, read in zip(episode.turns, expected, strict=True):
        assert turn.prompt.tolist() == read.history.tolist()
        assert turn.completion.tolist() == read.completion.tolist()
    assert (episode.reward, episode.is_finished) == (0.125 + 0.125 + 1.0, True)


def test_template_that_drops_reasoning_makes_prompts_without_it():
    tokenizer = checkpoint_tokenizer("qwen3")

    def asks_again(messages: list) -> tuple[list, float]:
        return [{"role": "user", "content": "And now?"}] if len(messages) == 2 else [], 0.0

    prompt = torch.tensor(prompt_tokens(tokenizer, PROBLEM.prompt, "chat"))
    texts = ["<think>\nhm\n</think>\n\nIt is 42.", "<think>\nok\n</think>\n\nStill 42."]
    [[episode]] = sample_dialogues(
        EnvironmentConfig(lambda problem: asks_again, 3),
        Script(tokenizer, texts),
        tokenizer,
        [PROBLEM],
        [prompt],
        1,
        [0],
        prompt_format="chat",
        max_prompt=1000,
        world=None,
    )
    first, second = episode.turns
    assert "hm" in tokenizer.decode(first.completion.tolist())
    seen = tokenizer.decode_all(second.prompt.tolist())
    assert "hm" not in seen and "It is 42." in seen and "And now?" in seen


def test_plain_format_appends_the_answers_text():
    ([episode], _) = played(ByteTokenizer(), ["a", "done"], prompt_format="plain")
    assert [bytes(turn.prompt.tolist()).decode(errors="replace") for turn in episode.turns[:1]] == [PROBLEM.prompt]
    stop = ByteTokenizer().stop_tokens[0]
    after = [*PROBLEM.prompt.encode(), *b"a", stop, *b"saw 2 messages"]
    assert episode.turns[1].prompt.tolist() == after


def test_episodes_of_a_group_end_at_different_turns():
    texts = [
        "one",
        "done",
        "cut off...",
        "one",
        "done",
        "one",
    ]  # the first turns of four episodes, then two second ones
    group, script = played(ByteTokenizer(), texts, group_size=4, max_turns=2, prompt_format="plain")
    assert [len(own.turns) for own in group] == [2, 1, 1, 2]
    assert [own.reward for own in group] == [0.125 + 1.0, 1.0, 0.125, 0.25]
    assert [own.is_finished for own in group] == [True, True, False, True]
    assert len(set(script.seeds)) == 3  # of the problem, and of each second turn


def test_prompt_over_the_limit_ends_the_episode_unfinished():
    size = len(PROBLEM.prompt)
    (group, _) = played(ByteTokenizer(), ["one"], max_prompt=size + 5, prompt_format="plain")
    assert (len(group[0].turns), group[0].is_finished, group[0].reward) == (1, False, 0.125)


def test_rollouts_of_turns_share_their_histories():
    group, _ = played(ByteTokenizer(), ["x" * 50, "y" * 50, "done", "done"], group_size=2, prompt_format="plain")
    data = build_rollouts([group], torch.tensor([[3.0, 1.0]]), torch.device("cpu"), with_logprobs=True)
    assert data.episode.tolist() == [0, 0, 1, 1] and data.problem.tolist() == [0] * 4
    assert data.rollouts.rewards.tolist() == [3.0, 3.0, 1.0, 1.0]
    assert data.rollouts.group_ids.tolist() == [0, 1, 0, 2]
    tree = PrefixTree.from_sequences(data.rollouts.sequences)
    longest = [len(episode.turns[-1].prompt) + 5 for episode in group]
    assert tree.num_tokens <= sum(longest) - len(PROBLEM.prompt)


def test_episode_advantages_count_an_episode_once():
    group, _ = played(ByteTokenizer(), ["x", "done", "done"], group_size=2, prompt_format="plain")
    data = build_rollouts([group], torch.tensor([[3.0, 1.0]]), torch.device("cpu"), with_logprobs=False)
    assert episode_advantages(data, "none").tolist() == [1.0, 1.0, -1.0]  # a mean over turns would be 7 / 3


def test_subtract_kl_sums_over_the_turns_of_an_episode():
    group, _ = played(ByteTokenizer(), ["x", "done", "done"], group_size=2, prompt_format="plain")
    data = build_rollouts([group], torch.tensor([[3.0, 1.0]]), torch.device("cpu"), with_logprobs=False)
    assert data.episode.tolist() == [0, 0, 1]
    mask = data.rollouts.loss_mask
    tables = {"old_logprobs": mask * -1.0, "ref_logprobs": mask * torch.tensor([-1.5, -2.0, -0.75])[:, None]}
    data = replace(data, rollouts=replace(data.rollouts, **tables))
    shifted, mean = subtract_kl(data, 2.0, World(0, 1, torch.device("cpu")))
    first = 0.5 * len("x\n") + 1.0 * len("done\n")
    second = -0.25 * len("done\n")
    assert mean == (first + second) / 2
    assert shifted.rollouts.rewards.tolist() == [3 - 2 * first] * 2 + [1 - 2 * second]
