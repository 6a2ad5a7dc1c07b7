"""GRPO with every group's prompt encoded once: sample, score, update.

    tune run --nproc_per_node 1 recipes/grpo.py --config recipes/configs/tiny_cpu.yaml

A recipe in torchtune's manner: every component comes from the YAML, and this file is yours to change.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torchtune import config, training, utils
from torchtune.config._errors import InstantiationError
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from flexpg import (
    Cost,
    MicroBatch,
    PrefixTree,
    Rollouts,
    Samples,
    SamplingParams,
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

# What a mistake in the configuration, the data or the checkpoint raises: here, or in a component that is misspelt.
SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, InstantiationError, OmegaConfBaseException)
COMPONENTS = (
    "tokenizer",
    "model",
    "checkpointer",
    "train_problems",
    "test_problems",
    "sampling",
    "optimizer",
    "metric_logger",
)
COUNTS = ("num_steps", "prompts_per_step", "group_size", "num_iterations", "max_tokens", "eval_every_n_steps")
OPTIONS = (
    "output_dir",
    "device",
    "dtype",
    "seed",
    "add_bos",
    "reward",
    "test_reward",
    "sharing",
    "scale_rewards",
    "loss",
    "clip_grad_norm",
)


@dataclass(frozen=True)
class Step:
    """What one step leaves for the log, the progress bar and the summary."""

    metrics: dict[str, float]
    unshared: Cost  # every prompt once per completion
    prompts_once: Cost
    shared: Cost  # every common prefix once, those of completions too


class GRPORecipe(FTRecipeInterface):
    """One process, full fine-tuning; the policy, its old and its reference log-probabilities share prompts alike."""

    def __init__(self, cfg: DictConfig) -> None:
        check_options(cfg)
        self.cfg = cfg
        self.device = utils.get_device(cfg.device)
        if self.device.type != torch.device(cfg.device).type:
            raise ValueError(f"device is {cfg.device} and this machine has none; set device to {self.device.type}")
        self.dtype = training.get_dtype(cfg.dtype, device=self.device)
        self.sharing = cfg.sharing
        self.temperature = cfg.sampling.temperature
        self.output_dir = Path(cfg.output_dir)
        utils.get_logger().addFilter(is_warning)  # torchtune's own; what there is to say is said here
        training.set_seed(cfg.seed)
        self.generator = torch.Generator(self.device).manual_seed(cfg.seed)

    def setup(self) -> None:
        """Makes every component, and finds what is wrong before anything is trained or written."""
        cfg = self.cfg
        self.loss = partial(grpo_loss, **cfg.loss)
        self.tokenizer = component("tokenizer", cfg)
        self.reward, self.test_reward = function("reward", cfg.reward), function("test_reward", cfg.test_reward)
        self.problems, self.test_problems = component("train_problems", cfg), component("test_problems", cfg)
        self.sampling = component("sampling", cfg, stop_tokens=self.tokenizer.stop_tokens)
        self.greedy = replace(self.sampling, temperature=0)
        self.model = self._model()
        self.decoder = flexpg_torchtune.decoder(self.model)
        self.prompts = self._tokenized("train", self.problems)
        self.test_prompts = self._tokenized("test", self.test_problems)
        weights = self.load_checkpoint()
        self._load(self.model, weights)
        self.first_rollouts = self.reference = None
        if cfg.loss.get("beta", 0.0) != 0.0:
            self.reference = self._model().requires_grad_(False)
            self._load(self.reference, weights)
        self.optimizer = component("optimizer", cfg, self.model.parameters())
        self.metric_logger = component("metric_logger", cfg)
        self.metric_logger.log_config(cfg)

    def load_checkpoint(self) -> dict[str, Tensor]:
        """The checkpoint's weights, in torchtune's names."""
        self.checkpointer = component("checkpointer", self.cfg)
        try:
            return self.checkpointer.load_checkpoint()[training.MODEL_KEY]
        except Exception as error:  # of a model_type that is not the checkpoint's, torchtune raises no narrower one
            raise ValueError(f"checkpointer: {type(error).__name__}: {error}") from error

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
        """Samples a group for each chosen problem, scores the rollouts, and updates the model on them.

        With several iterations the loss, its gradient and its metrics are those of the last.
        """
        started = self._seconds()
        rollouts = self.sample(chosen)
        self.first_rollouts = self.first_rollouts or rollouts
        sampled = self._seconds()
        batches = pack(rollouts, self.cfg.max_tokens, sharing=self.sharing)
        with torch.no_grad():
            needs_old = self.cfg.num_iterations > 1  # in the first iteration the old policy is the one in training
            old = [self.logprobs(self.model, batch)[0] if needs_old else None for batch in batches]
            ref = [self.logprobs(self.reference, batch)[0] if self.reference else None for batch in batches]
        scored = self._seconds()
        advantages = group_advantages(rollouts.rewards, rollouts.group_ids, self.cfg.scale_rewards)
        normalizer = loss_normalizer(rollouts.trained, self.loss.keywords["loss_type"], self.sampling.max_new_tokens)
        for _ in range(self.cfg.num_iterations):
            metrics = self.update(batches, old, ref, advantages, normalizer)
        trained = self._seconds()
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
        return Step(metrics, unshared, group_cost(rollouts), shared)

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
        return Rollouts(prompts, samples.completions, group_ids, self._rewards(self.reward, samples, answers))

    def evaluate(self) -> float:
        """Mean `test_reward` of the likeliest completion of every held-out problem."""
        samples = self._drawn(self.test_prompts, 1, self.greedy)
        answers = [problem.answer for problem in self.test_problems]
        return self._rewards(self.test_reward, samples, answers).mean().item()

    def save_checkpoint(self) -> None:
        """The trained weights, in the format that the checkpointer read."""
        self.checkpointer.save_checkpoint({training.MODEL_KEY: self.model.state_dict()}, epoch=0)

    def draw(self) -> None:
        """Pictures of what was learned, of the mask of the first step's first two groups, and of what sharing saves.

        In the mask equal beginnings of completions are not merged, as training does, so that all can be seen.
        """
        plot_reward(self.output_dir / "reward.png", [s.metrics["reward"] for s in self.history], self.accuracies)
        rollouts, size = self.first_rollouts, self.cfg.group_size
        count = min(2, rollouts.num_groups)
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

    def _model(self) -> torch.nn.Module:
        with training.set_default_dtype(self.dtype), self.device:
            return component("model", self.cfg)

    def _load(self, model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
        folder = Path(self.cfg.checkpointer.checkpoint_dir)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise ValueError(f"the checkpoint in {folder} does not fit `model`: {first}") from None
        if not (folder / "config.json").exists():  # not a checkpoint in Hugging Face's format
            return
        theirs = json.loads((folder / "config.json").read_text())
        heads = (theirs["num_attention_heads"], theirs.get("num_key_value_heads", theirs["num_attention_heads"]))
        attn = next(module for module in model.modules() if isinstance(module, MultiHeadAttention | Gemma2Attention))
        if heads != (attn.num_heads, attn.num_kv_heads):  # other heads may well have weights of the same shape
            ours = (attn.num_heads, attn.num_kv_heads)
            raise ValueError(f"the checkpoint in {folder} does not fit `model`: it has {heads} heads, the model {ours}")

    def _tokenized(self, name: str, problems: list) -> list[Tensor]:
        """Every problem's prompt as tokens on the device; one that the model cannot complete is named."""
        if not problems:
            raise ValueError(f"{name}_problems is empty; give at least one problem")
        prompts = []
        for number, problem in enumerate(problems):
            tokens = self.tokenizer.encode(problem.prompt, add_bos=self.cfg.add_bos, add_eos=False)
            try:
                if not tokens:
                    raise ValueError("its prompt is empty")
                length = len(tokens) + self.sampling.max_new_tokens
                if length > self.cfg.max_tokens:
                    raise ValueError(
                        f"prompt and completion of {length} tokens exceed max_tokens={self.cfg.max_tokens}"
                    )
                flexpg_torchtune.check_fits(self.model, max(tokens), length, self.device)
            except ValueError as error:
                raise ValueError(f"{name} problem {number} of {len(problems)}: {error}") from None
            prompts.append(torch.tensor(tokens, device=self.device))
        return prompts

    def _drawn(self, prompts: list[Tensor], group_size: int, params: SamplingParams) -> Samples:
        output = flexpg_torchtune.output(self.model)
        return sample(self.decoder, output, prompts, group_size, params, self.generator)

    def _rewards(self, reward: Callable[[str, str], float], samples: Samples, answers: list[str]) -> Tensor:
        texts = [self.tokenizer.decode(tokens.tolist()) for tokens in samples.completions]
        rewards = [reward(text, answer) for text, answer in zip(texts, answers, strict=True)]
        return torch.tensor(rewards, dtype=torch.float32, device=self.device)

    def _seconds(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def check_options(cfg: DictConfig) -> None:
    """Refuses options that are missing, unknown or out of range, before anything is made."""
    known = {*COMPONENTS, *COUNTS, *OPTIONS}
    for problem, names in (("unknown", set(cfg) - known), ("missing", known - set(cfg))):
        if names:
            raise ValueError(f"{problem} option {', '.join(sorted(names))}; the recipe has {', '.join(sorted(known))}")
    for name in COUNTS:
        if type(cfg[name]) is not int or cfg[name] < 1:
            raise ValueError(f"{name} is {cfg[name]!r}; give a whole number, 1 or more")
    for name in COMPONENTS:
        if not isinstance(cfg[name], DictConfig) or not isinstance(cfg[name].get("_component_"), str):
            raise ValueError(f"{name} is {cfg[name]!r}; give a _component_ and its arguments")
    if type(cfg.seed) is not int or cfg.seed < 0:
        raise ValueError(f"seed is {cfg.seed!r}; give a whole number, 0 or more")
    if str(cfg.device).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device is {cfg.device!r}; give cpu or cuda")
    for name in ("sharing", "add_bos"):
        if not isinstance(cfg[name], bool):
            raise ValueError(f"{name} is {cfg[name]!r}; give true or false")
    if type(cfg.clip_grad_norm) not in (int, float) or not cfg.clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm is {cfg.clip_grad_norm!r}; give a number above 0, .inf for no clipping")
    temperature = cfg.sampling.get("temperature")
    if type(temperature) not in (int, float) or not temperature > 0:
        raise ValueError(f"sampling.temperature is {temperature!r}; rollouts need a number above 0")
    one = torch.ones(1, 1)
    try:
        grpo_loss(one, one, one[0], one.bool(), ref_logprobs=one, normalizer=1.0, **cfg.loss)
        loss_normalizer(one.bool(), cfg.loss.loss_type, 1)
    except (TypeError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"loss: {error}") from None
    group_advantages(one[0], one[0].long(), cfg.scale_rewards)


def component(name: str, cfg: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """The component that the YAML describes under `name`; its own complaints are prefixed with that name."""
    try:
        return config.instantiate(cfg[name], *args, **kwargs)
    except KeyError as error:
        raise ValueError(f"{name}: {cfg[name]._component_} does not know {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def function(name: str, dotpath: str) -> Callable[[str, str], float]:
    """What a dotpath names: (completion text, answer) -> reward."""
    try:
        found = resolve_name(dotpath)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"{name} is {dotpath!r}, which cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"{name} is {dotpath!r}, a {type(found).__name__}; name a function")
    return found


def is_warning(record: logging.LogRecord) -> bool:
    """A filter of log records."""
    return record.levelno >= logging.WARNING


def unshared_logprobs(model: torch.nn.Module, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
    """What sharing is compared with: each prompt once per completion, in padded rows, and logits of every token."""
    rows = pad_sequence(rollouts.sequences, batch_first=True)  # [n, T], padded on the right: causal rows never see it
    scores = (model(rows) / temperature).log_softmax(-1)  # [n, T, V]
    at = rollouts.prompt_lens[:, None] + torch.arange(rollouts.trained.shape[1], device=rows.device)  # [n, C]
    at = at.clamp(max=rows.shape[1] - 1)
    scores = scores.gather(1, (at - 1)[..., None].expand(-1, -1, scores.shape[-1]))  # [n, C, V]
    logprobs = scores.gather(-1, rows.gather(1, at)[..., None])[..., 0]
    probabilities = scores.detach().exp()
    entropies = -torch.special.xlogy(probabilities, probabilities).sum(-1)
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
    recipe.summarize()
    recipe.draw()
    recipe.cleanup()


if __name__ == "__main__":
    recipe_main()
