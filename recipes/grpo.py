"""GRPO with every group's prompt encoded once: sample, score, update.

    tune run --nproc_per_node 1 recipes/grpo.py --config recipes/configs/tiny_cpu.yaml

A recipe in torchtune's manner: every component comes from the YAML, and this file is yours to change.
"""

import logging
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torchtune import config, training, utils
from torchtune.config._errors import InstantiationError
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from flexpg import (
    Cost,
    MicroBatch,
    PrefixTree,
    Rollouts,
    Samples,
    dense_cost,
    group_advantages,
    group_cost,
    grpo_loss,
    loss_normalizer,
    pack,
    sample,
    shared_cost,
    token_logprobs_and_entropies,
)
from flexpg.integrations import torchtune as flexpg_torchtune
from flexpg.plot import plot_mask, plot_reward, plot_savings

# What a mistake in the configuration, the data or the checkpoint raises, in this file or in a component.
SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, AttributeError, InstantiationError, OmegaConfBaseException)


@dataclass
class Step:
    """What one step leaves for the log, the progress bar and the pictures."""

    metrics: dict[str, float]
    rollouts: Rollouts
    unshared: Cost  # every prompt once per completion
    prompts_once: Cost
    shared: Cost  # every common prefix once, those of completions too


class GRPORecipe(FTRecipeInterface):
    """One process, full fine-tuning; the policy, its old and its reference log-probabilities share prompts alike."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = utils.get_device(cfg.device)
        self.dtype = training.get_dtype(cfg.dtype, device=self.device)
        self.sharing = cfg.sharing
        self.temperature = cfg.sampling.get("temperature", 1.0)
        self.output_dir = Path(cfg.output_dir)
        utils.get_logger().addFilter(lambda record: record.levelno >= logging.WARNING)  # we say what there is to say
        training.set_seed(cfg.seed)
        self.generator = torch.Generator(self.device).manual_seed(cfg.seed)

    def setup(self) -> None:
        """Makes every component, and finds what is wrong before anything is trained or written."""
        cfg = self.cfg
        self.loss = partial(grpo_loss, **cfg.loss)
        self._check_options()
        self.tokenizer = config.instantiate(cfg.tokenizer)
        self.reward = resolve_name(cfg.reward)
        self.problems = config.instantiate(cfg.train_problems)
        self.test_problems = config.instantiate(cfg.test_problems)
        self.sampling = config.instantiate(cfg.sampling, stop_tokens=self.tokenizer.stop_tokens)
        self.greedy = replace(self.sampling, temperature=0)
        self.model = self._model(cfg.model)
        self.prompts = self._tokenized("train", self.problems)
        self.test_prompts = self._tokenized("test", self.test_problems)
        weights = self.load_checkpoint()
        self._load(self.model, weights)
        self.reference = None
        if cfg.loss.get("beta", 0.0) != 0.0:
            self.reference = self._model(cfg.model).requires_grad_(False)
            self._load(self.reference, weights)
        self.optimizer = config.instantiate(cfg.optimizer, self.model.parameters())
        self.metric_logger = config.instantiate(cfg.metric_logger)
        self.metric_logger.log_config(cfg)

    def load_checkpoint(self) -> dict[str, Tensor]:
        """The checkpoint's weights, in torchtune's names."""
        self.checkpointer = config.instantiate(self.cfg.checkpointer)
        return self.checkpointer.load_checkpoint()[training.MODEL_KEY]

    def train(self) -> None:
        """Steps until `num_steps`, with held-out accuracy before the first, every so often, and after the last."""
        self.history: list[Step] = []
        self.accuracies = {0: self.evaluate()}
        print(f"step {0:>4}  held-out accuracy {self.accuracies[0]:.3f}")
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(self.cfg.seed)).tolist()
        size = self.cfg.prompts_per_step
        bar = tqdm(range(1, self.cfg.num_steps + 1), desc="GRPO", disable=None)
        for number in bar:
            chosen = [order[i % len(order)] for i in range((number - 1) * size, number * size)]
            step = self.step(chosen)
            self.history.append(step)
            self.metric_logger.log_dict(step.metrics, step=number)
            ratio = step.unshared.tokens / step.shared.tokens
            bar.set_postfix_str(f"reward {step.metrics['reward']:.2f}, {ratio:.1f} x fewer tokens")
            if number % self.cfg.eval_every_n_steps == 0 or number == self.cfg.num_steps:
                self.accuracies[number] = self.evaluate()
                self.metric_logger.log("held_out_accuracy", self.accuracies[number], step=number)
                bar.clear()
                reward = sum(s.metrics["reward"] for s in self.history[-10:]) / len(self.history[-10:])
                print(f"step {number:>4}  held-out accuracy {self.accuracies[number]:.3f}  reward {reward:.3f}")
        bar.close()

    def step(self, chosen: list[int]) -> Step:
        """Samples a group for each chosen problem, scores the rollouts, and updates the model on them."""
        started = time.perf_counter()
        rollouts = self.sample(chosen)
        sampled = time.perf_counter()
        batches = pack(rollouts, self.cfg.max_tokens, sharing=self.sharing)
        with torch.no_grad():
            needs_old = self.cfg.num_iterations > 1  # in the first iteration the old policy is the one in training
            old = [self.logprobs(self.model, batch)[0] if needs_old else None for batch in batches]
            ref = [self.logprobs(self.reference, batch)[0] if self.reference else None for batch in batches]
        scored = time.perf_counter()
        advantages = group_advantages(rollouts.rewards, rollouts.group_ids, self.cfg.scale_rewards)
        normalizer = loss_normalizer(rollouts.trained, self.loss.keywords["loss_type"], self.sampling.max_new_tokens)
        for _ in range(self.cfg.num_iterations):
            metrics = self.update(batches, old, ref, advantages, normalizer)
        trained = time.perf_counter()
        metrics |= {
            "reward": rollouts.rewards.mean().item(),
            "completion_tokens": rollouts.completion_lens.float().mean().item(),
            "sample_s": sampled - started,
            "score_s": scored - sampled,
            "train_s": trained - scored,
        }
        trees = [batch.tree for batch in (batches if self.sharing else pack(rollouts, self.cfg.max_tokens))]
        unshared = sum((dense_cost(tree) for tree in trees), Cost(0, 0))
        shared = sum((shared_cost(tree) for tree in trees), Cost(0, 0))
        return Step(metrics, rollouts, unshared, group_cost(rollouts), shared)

    def update(
        self,
        batches: list[MicroBatch],
        old: list[Tensor | None],
        ref: list[Tensor | None],
        advantages: Tensor,
        normalizer: Tensor,
    ) -> dict[str, float]:
        """One optimizer step: the micro-batches' losses add up to the loss of the whole step."""
        self.optimizer.zero_grad()
        total, sums, tokens = 0.0, {}, 0.0
        for batch, old_logprobs, ref_logprobs in zip(batches, old, ref, strict=True):
            logprobs, entropies = self.logprobs(self.model, batch)
            loss, metrics = self.loss(
                logprobs,
                old_logprobs,
                advantages[batch.indices],
                batch.rollouts.trained,
                ref_logprobs=ref_logprobs,
                normalizer=normalizer,
                entropies=entropies,
            )
            loss.backward()
            total += loss.item()
            count = metrics.pop("tokens").item()
            tokens += count
            for name, mean in metrics.items():
                sums[name] = sums.get(name, 0.0) + mean.item() * count
        grad_norm = clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad_norm, error_if_nonfinite=True)
        self.optimizer.step()
        return {"loss": total, "grad_norm": grad_norm.item()} | {name: value / tokens for name, value in sums.items()}

    def logprobs(self, model: torch.nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [n, C] of a micro-batch's completions."""
        if not self.sharing:
            return unshared_logprobs(model, batch.rollouts, self.temperature)
        tree = batch.tree
        return token_logprobs_and_entropies(
            flexpg_torchtune.forward(model, tree),
            flexpg_torchtune.output(model),
            tree,
            prompt_lens=batch.rollouts.prompt_lens,
            mask=batch.rollouts.trained,
            temperature=self.temperature,
        )

    def sample(self, chosen: list[int]) -> Rollouts:
        """A group of rewarded completions for each chosen problem."""
        prompts = [self.prompts[i] for i in chosen]
        samples = self._drawn(prompts, self.cfg.group_size, self.sampling)
        group_ids = torch.arange(len(prompts), device=self.device).repeat_interleave(self.cfg.group_size)
        answers = [self.problems[chosen[group]].answer for group in group_ids.tolist()]
        return Rollouts(prompts, samples.completions, group_ids, self._rewards(samples, answers))

    def evaluate(self) -> float:
        """Mean reward of the likeliest completion of every held-out problem."""
        samples = self._drawn(self.test_prompts, 1, self.greedy)
        return self._rewards(samples, [problem.answer for problem in self.test_problems]).mean().item()

    def save_checkpoint(self) -> None:
        """The trained weights, in the format that the checkpointer read."""
        self.checkpointer.save_checkpoint({training.MODEL_KEY: self.model.state_dict()}, epoch=0)

    def draw(self) -> None:
        """Pictures of what was learned, of the first step's mask, and of what sharing saves on it."""
        plot_reward(self.output_dir / "reward.png", [s.metrics["reward"] for s in self.history], self.accuracies)
        rollouts, size = self.history[0].rollouts, self.cfg.group_size
        count = min(2, rollouts.num_groups)  # few groups, so that completions can be told apart
        completions = [rollouts.completions[group * size : (group + 1) * size] for group in range(count)]
        plot_mask(self.output_dir / "mask.png", PrefixTree.from_groups(rollouts.prompts[:count], completions))
        plot_savings(self.output_dir / "savings.png", rollouts)

    def summarize(self) -> None:
        """Prints what was learned, where the time went and what sharing saved."""
        steps = len(self.history)
        rewards = [step.metrics["reward"] for step in self.history]
        accuracies = list(self.accuracies.values())
        seconds = [sum(s.metrics[part] for s in self.history) / steps for part in ("sample_s", "score_s", "train_s")]
        unshared = sum(step.unshared.tokens for step in self.history) / steps
        prompts_once = sum(step.prompts_once.tokens for step in self.history) / steps
        shared = sum(step.shared.tokens for step in self.history) / steps
        print(f"held-out accuracy   {accuracies[0]:.3f} -> {accuracies[-1]:.3f} in {steps} steps")
        print(f"training reward     {rewards[0]:.3f} -> {rewards[-1]:.3f}")
        print("seconds per step    {:.2f}: sample {:.2f}, score {:.2f}, train {:.2f}".format(sum(seconds), *seconds))
        print(f"tokens per step     {unshared:,.0f} with every prompt once per completion")
        print(f"                    {prompts_once:,.0f} with every prompt once ({unshared / prompts_once:.1f} x fewer)")
        print(f"                    {shared:,.0f} with equal beginnings merged too ({unshared / shared:.1f} x fewer)")
        print(f"                    {shared if self.sharing else unshared:,.0f} is what this run trained on")
        print(f"pictures            {self.output_dir}/{{reward,mask,savings}}.png")

    def cleanup(self) -> None:
        """Closes the log."""
        self.metric_logger.close()

    def _check_options(self) -> None:
        cfg, one = self.cfg, torch.ones(1, 1)
        for name in (
            "num_steps",
            "prompts_per_step",
            "group_size",
            "max_tokens",
            "num_iterations",
            "eval_every_n_steps",
        ):
            if not isinstance(cfg[name], int) or cfg[name] < 1:
                raise ValueError(f"{name} is {cfg[name]!r}; give a whole number, 1 or more")
        if not isinstance(cfg.sharing, bool):
            raise ValueError(f"sharing is {cfg.sharing!r}; give true or false")
        if "loss_type" not in cfg.loss:
            raise ValueError("loss has no loss_type; give grpo, bnpo, dr_grpo or dapo")
        self.loss(one, one, one[0], one.bool(), ref_logprobs=one, normalizer=1.0)  # an unknown option speaks up here
        group_advantages(one[0], one[0].long(), cfg.scale_rewards)

    def _model(self, model_cfg: DictConfig) -> torch.nn.Module:
        with training.set_default_dtype(self.dtype), self.device:
            return config.instantiate(model_cfg)

    def _load(self, model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise ValueError(
                f"the checkpoint in {self.cfg.checkpointer.checkpoint_dir} does not fit `model`: {first}"
            ) from None

    def _tokenized(self, name: str, problems: list) -> list[Tensor]:
        """Every problem's prompt as tokens on the device, all of which the model can complete."""
        prompts = [torch.tensor(self.tokenizer.encode(p.prompt, add_bos=False, add_eos=False)) for p in problems]
        if not prompts:
            raise ValueError(f"{name}_problems is empty; give at least one problem")
        prompts = [prompt.to(self.device) for prompt in prompts]
        flexpg_torchtune.decoder(self.model, prompts, self.sampling.max_new_tokens)
        return prompts

    def _drawn(self, prompts: list[Tensor], group_size: int, params) -> Samples:
        decoder = flexpg_torchtune.decoder(self.model, prompts, params.max_new_tokens)
        return sample(decoder, flexpg_torchtune.output(self.model), prompts, group_size, params, self.generator)

    def _rewards(self, samples: Samples, answers: list[str]) -> Tensor:
        texts = [self.tokenizer.decode(tokens.tolist()) for tokens in samples.completions]
        rewards = [self.reward(text, answer) for text, answer in zip(texts, answers, strict=True)]
        return torch.tensor(rewards, dtype=torch.float32, device=self.device)


def unshared_logprobs(model: torch.nn.Module, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
    """What sharing is compared with: each prompt once per completion, in padded rows, and logits of every token."""
    rows = pad_sequence(rollouts.sequences, batch_first=True)  # [n, T], padded on the right: causal rows never see it
    scores = (model(rows) / temperature).log_softmax(-1)  # [n, T, V]
    at = rollouts.prompt_lens[:, None] + torch.arange(rollouts.trained.shape[1], device=rows.device)  # [n, C]
    at = at.clamp(max=rows.shape[1] - 1)
    scores = scores.gather(1, (at - 1)[..., None].expand(-1, -1, scores.shape[-1]))  # [n, C, V]
    logprobs = scores.gather(-1, rows.gather(1, at)[..., None])[..., 0]
    entropies = -(scores.exp() * scores).sum(-1).detach()
    return logprobs.where(rollouts.trained, 0), entropies.where(rollouts.trained, 0)


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe; a mistake in the configuration or the data ends it with one line."""
    try:
        OmegaConf.resolve(cfg)
        recipe = GRPORecipe(cfg)
        recipe.setup()
    except SETUP_ERRORS as error:
        sys.exit(f"error: {error}")
    recipe.train()
    recipe.save_checkpoint()
    recipe.draw()
    recipe.summarize()
    recipe.cleanup()


if __name__ == "__main__":
    recipe_main()
