"""What was sampled for a problem: an episode is one answer, of a single turn or of several with an environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexpg.advantages import ScaleRewards, group_advantages, rewards_minus_kl
from flexpg.rollouts import Rollouts
from flexpg.sampling import Samples
from flexpg.training.distributed import World
from flexpg.tree import PrefixTree


@dataclass(frozen=True, eq=False)
class Turn:
    """One completion.

    Attributes:
        prompt: [P] int64, the tokens that the model saw, earlier turns included.
        completion: [T] int64, the tokens that were sampled.
        logprobs: [T] float32, their log-probabilities as the sampler reported them.
        is_finished: Whether it ended with a stop token.
    """

    prompt: Tensor
    completion: Tensor
    logprobs: Tensor
    is_finished: bool

    def cpu(self) -> Turn:
        """Return the turn on the CPU."""
        return Turn(self.prompt.cpu(), self.completion.cpu(), self.logprobs.cpu(), self.is_finished)


@dataclass(frozen=True, eq=False)
class Episode:
    """The turns of one answer to a problem.

    Attributes:
        turns: At least one.
        reward: The environment's reward; 0 without one.
        is_finished: Whether no limit on tokens ended it.
    """

    turns: list[Turn]
    reward: float = 0.0
    is_finished: bool = True

    def cpu(self) -> Episode:
        """Return the episode on the CPU."""
        return Episode([turn.cpu() for turn in self.turns], self.reward, self.is_finished)


@dataclass(frozen=True, eq=False)
class StepRollouts:
    """The turns of a step as rollouts, with where each comes from.

    Attributes:
        rollouts: N rollouts, problem by problem; turns with equal prompts share a group. All turns of an episode have
            its reward.
        episode: [N] int64, the number of each rollout's episode in the step.
        problem: [N] int64, the number of its problem in the step.
    """

    rollouts: Rollouts
    episode: Tensor
    problem: Tensor

    @property
    def first_turns(self) -> Tensor:
        """[episodes] int64, the number of each episode's first rollout."""
        is_first = self.episode.diff(prepend=self.episode.new_tensor([-1])) > 0
        return is_first.nonzero()[:, 0]


def sampled_turns(prompts: Sequence[Tensor], samples: Samples) -> list[Turn]:
    """Return the samples of some prompts as turns, those of each prompt one after another.

    Args:
        prompts: P prompts.
        samples: G completions of each.
    """
    group_size, is_finished = len(samples.completions) // max(len(prompts), 1), samples.is_finished.tolist()
    return [
        Turn(prompts[n // group_size], tokens, samples.logprobs[n, : len(tokens)], is_finished[n])
        for n, tokens in enumerate(samples.completions)
    ]


def single_turn_episodes(prompts: Sequence[Tensor], samples: Samples) -> list[list[Episode]]:
    """Return the samples of each prompt as episodes of one turn."""
    if not prompts:  # of a rank with fewer problems than others
        return []
    episodes = [Episode([turn], is_finished=turn.is_finished) for turn in sampled_turns(prompts, samples)]
    group_size = len(episodes) // len(prompts)
    return [episodes[n : n + group_size] for n in range(0, len(episodes), group_size)]


def build_rollouts(
    groups: Sequence[Sequence[Episode]], rewards: Tensor, device: torch.device, *, with_logprobs: bool
) -> StepRollouts:
    """Build the rollouts of a step.

    Args:
        groups: For each problem its G episodes.
        rewards: [problems, G] float, the reward of each episode.
        device: The device of the rollouts.
        with_logprobs: Keep the sampler's log-probabilities.
    """
    episodes = [(problem, episode) for problem, group in enumerate(groups) for episode in group]
    turns = [(n, problem, turn) for n, (problem, episode) in enumerate(episodes) for turn in episode.turns]
    group_of: dict[bytes, int] = {}  # by the tokens of the prompt
    keys = [turn.prompt.cpu().numpy().tobytes() for _, _, turn in turns]
    prompts: list[Tensor] = []
    for key, (_, _, turn) in zip(keys, turns, strict=True):
        if key not in group_of:
            group_of[key] = len(prompts)
            prompts.append(turn.prompt.to(device))
    episode = torch.tensor([n for n, _, _ in turns], device=device)
    logprobs = None
    if with_logprobs:
        logprobs = pad_sequence([turn.logprobs for _, _, turn in turns], batch_first=True).to(device)  # [N, C]
    rollouts = Rollouts(
        prompts=prompts,
        completions=[turn.completion.to(device) for _, _, turn in turns],
        group_ids=torch.tensor([group_of[key] for key in keys], device=device),
        rewards=rewards.flatten().to(device)[episode],
        sampler_logprobs=logprobs,
    )
    return StepRollouts(rollouts, episode, torch.tensor([problem for _, problem, _ in turns], device=device))


def episode_advantages(step: StepRollouts, scale_rewards: ScaleRewards) -> Tensor:
    """Compare the reward of each episode with those of the same problem.

    Args:
        step: The rollouts.
        scale_rewards: As in `group_advantages`.

    Returns:
        [N] float32, the advantage of each rollout's episode.
    """
    first = step.first_turns
    values = group_advantages(step.rollouts.select(first), scale_rewards, group_ids=step.problem[first])
    return values[step.episode].float()


def subtract_kl(step: StepRollouts, weight: float, world: World) -> tuple[StepRollouts, float]:
    """Subtract the KL divergence of each episode from the reference policy, the sum over its turns, from its reward.

    Args:
        step: The rollouts; old and reference log-probabilities are 0 for those of other ranks.
        weight: The weight of the KL divergence.
        world: The ranks.

    Returns:
        The rollouts with these rewards, and the mean KL divergence of an episode.
    """
    zeros = torch.zeros_like(step.rollouts.rewards)
    penalties = -rewards_minus_kl(replace(step.rollouts, rewards=zeros), beta=1.0)  # [N]
    summed = world.all_reduce_sum({str(n): value for n, value in enumerate(penalties.tolist())})
    kl = zeros.new_zeros(len(step.first_turns)).index_add(0, step.episode, zeros.new_tensor(list(summed.values())))
    rewards = step.rollouts.rewards - weight * kl[step.episode]
    return replace(step, rollouts=replace(step.rollouts, rewards=rewards)), kl.mean().item()


def first_problems(step: StepRollouts, count: int) -> PrefixTree:
    """Return the tree of the first problems; completions of one turn are not merged, so that a plot shows them all."""
    rollouts = step.rollouts.select((step.problem < count).nonzero()[:, 0])
    if rollouts.num_groups > count:  # several turns
        return rollouts.tree
    completions: list[list[Tensor]] = [[] for _ in rollouts.prompts]
    for completion, group in zip(rollouts.completions, rollouts.group_ids.tolist(), strict=True):
        completions[group].append(completion)
    return PrefixTree.from_groups(rollouts.prompts, completions)
