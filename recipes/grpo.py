"""GRPO with every group's prompt encoded once: sample, score, update.

    tune run --nproc_per_node 1 recipes/grpo.py --config recipes/configs/tiny_cpu.yaml

A recipe in torchtune's manner, for one process or many, all parameters or LoRA: every component comes from the YAML,
and this file is yours to change. What is random is a function of the seed and the step's number, and so is the order of
the problems: a run that is resumed, or has other processes, takes the same steps.
"""

import logging
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchtune import training, utils
from torchtune.config._errors import InstantiationError
from torchtune.modules.peft import disable_adapter, get_adapter_params
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from flexpg import (
    MicroBatch,
    Rollouts,
    Samples,
    SamplingParams,
    group_advantages,
    grpo_loss,
    loss_normalizer,
    pack,
    sample,
)
from flexpg.analysis.plots import plot_run
from flexpg.analysis.torchtune_shape import shape_of
from flexpg.integrations import torchtune as shared
from flexpg.layer_hooks import uncompiled
from flexpg.packing import runs
from flexpg.training import models
from flexpg.training import setup as tune
from flexpg.training.checkpoints import CheckpointError, checkpoints, load_checkpoint, read_progress, save_checkpoint
from flexpg.training.distributed import World
from flexpg.training.failures import OutOfMemory, not_finite, within_memory
from flexpg.training.metrics import (
    cost_metrics,
    evaluated,
    peak_memory_gib,
    rates,
    rollout_metrics,
    seconds,
    sharing_pays,
    summary,
)
from flexpg.training.rewards import RewardError, named_rewards, score
from flexpg.verify import SelfCheckError, check_run

# What a mistake in the configuration, the data or the checkpoint raises: here, or in a component that is misspelt.
SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, InstantiationError, OmegaConfBaseException)
RUN_ERRORS = (RewardError, SelfCheckError, FloatingPointError, OutOfMemory, CheckpointError)  # in training
COMPONENTS = (
    *("tokenizer", "model", "checkpointer", "train_problems", "test_problems", "sampling"),
    *("optimizer", "lr_scheduler", "metric_logger"),
)
AT_LEAST = {  # whole numbers
    **dict.fromkeys(("num_steps", "prompts_per_step", "group_size", "num_iterations", "minibatches", "max_tokens"), 1),
    **dict.fromkeys(("max_cache_tokens", "eval_every_n_steps", "keep_last_n_checkpoints"), 1),
    **dict.fromkeys(("checkpoint_every_n_steps", "seed"), 0),
}
CHOICES = {
    **dict.fromkeys(("compile", "activation_checkpointing", "resume", "self_check"), (True, False)),
    "sharing": ("auto", True, False),
    **dict.fromkeys(("dtype", "param_dtype"), ("fp32", "bf16")),
    **{"prompt_format": ("plain", "bos", "chat"), "scale_rewards": ("group", "batch", "none")},
}
OTHERS = ("output_dir", "device", "rewards", "test_reward", "loss", "clip_grad_norm")
SAME_ON_RESUME = (
    *("seed", "prompts_per_step", "group_size", "minibatches", "num_iterations", "train_problems", "test_problems"),
    *("prompt_format", "model", "optimizer", "lr_scheduler"),
)
Scores = list[Tensor | None]  # [n, C] of each micro-batch


class GRPORecipe(FTRecipeInterface):
    """The policy, its old and its reference log-probabilities share prompts alike."""

    def __init__(self, cfg: DictConfig) -> None:
        tune.check_keys(cfg, COMPONENTS, AT_LEAST, CHOICES, OTHERS)
        tune.check_values(cfg)
        OmegaConf.resolve(cfg)
        self.cfg = cfg
        device, self.dtype, self.param_dtype = tune.device_and_dtypes(cfg)
        self.world = World.join(device)
        if cfg.prompts_per_step % cfg.minibatches or cfg.prompts_per_step // cfg.minibatches < self.world.size:
            raise ValueError(
                f"prompts_per_step={cfg.prompts_per_step} in minibatches={cfg.minibatches} on a world of "
                f"{self.world.size}: give a multiple of minibatches, with a prompt or more for each process in each"
            )
        self.autocast = partial(torch.autocast, device.type, self.dtype, enabled=self.dtype != self.param_dtype)
        self.train_autocast = partial(self.autocast, cache_enabled=self.world.size == 1)  # FSDP frees what it caches
        self.output_dir = Path(cfg.output_dir)
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.is_told_to_stop = False
        self.checkpointer = None  # the first process alone has one
        self.first_rollouts = self.is_sharing = None  # for the picture of the mask; whether the last step shared
        self.is_checked = not cfg.self_check
        utils.get_logger().addFilter(lambda record: record.levelno >= logging.WARNING)  # torchtune's own chatter

    def setup(self) -> None:
        """Makes every component, and finds what is wrong before anything is trained or written."""
        cfg = self.cfg
        self.loss = partial(grpo_loss, **cfg.loss)
        self.rewards = named_rewards(cfg.rewards)
        self.test_reward = named_rewards({"test_reward": cfg.test_reward})
        self.tokenizer = tune.component("tokenizer", cfg)
        self.sampling = tune.component("sampling", cfg, stop_tokens=self.tokenizer.stop_tokens)
        self.problems, self.test_problems = tune.component("train_problems", cfg), tune.component("test_problems", cfg)
        self.model = models.model_shape(cfg, self.dtype, self.param_dtype)
        self.is_lora = bool(get_adapter_params(self.model))
        self.shape = shape_of(self.model, with_adapters=True)
        tokenized = partial(tune.tokenized, cfg, self.tokenizer, self.sampling, self.model, device=self.world.device)
        self.prompts = tokenized("train", self.problems, at_least=cfg.prompts_per_step)
        self.test_prompts = tokenized("test", self.test_problems, at_least=self.world.size)  # one for each process
        earlier = checkpoints(self.checkpoint_dir)
        if len(set(self.world.gather([str(earlier[-1:])]))) > 1:
            raise ValueError(f"the processes see different files in {self.output_dir}; give a folder that all share")
        if earlier and not cfg.resume:
            raise ValueError(f"output_dir holds {earlier[-1]} of an earlier run; set resume=true or another output_dir")
        weights = self.load_checkpoint() if self.world.is_first else {}
        options = {"compiled": cfg.compile, "activation_checkpointing": cfg.activation_checkpointing}
        self.model = models.load(self.model, weights, self.world, seed=cfg.seed, **options)
        self.reference = None
        if cfg.loss.get("beta", 0.0) > 0 and not self.is_lora:  # with LoRA it is the model without its adapters
            frozen = models.model_shape(cfg, self.dtype, self.dtype).requires_grad_(False)
            self.reference = models.load(frozen, weights, self.world, seed=cfg.seed, compiled=cfg.compile)
        self.decoder = shared.decoder(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = tune.component("optimizer", cfg, self.trained)
        self.lr_scheduler = tune.component("lr_scheduler", cfg, self.optimizer)
        self.steps_done, self.history, self.accuracies = 0, [], {}
        if earlier:
            self.resume(earlier[-1])
        if self.world.is_first:
            if cfg.resume:
                why = "" if earlier else f", as {self.checkpoint_dir} is empty"
                print(f"going on after step {self.steps_done}{why}")
            self.metric_logger = tune.component("metric_logger", cfg)
            self.metric_logger.log_config(cfg)

    def load_checkpoint(self) -> dict[str, Tensor]:
        """The checkpoint's weights, in torchtune's names."""
        self.checkpointer, weights = models.checkpoint(self.cfg, self.model)
        return weights

    def train(self) -> None:
        """Steps until `num_steps` or a signal, with held-out accuracy at the start, every so often, and at the end."""
        cfg = self.cfg
        for number in (signal.SIGTERM, signal.SIGINT) if cfg.checkpoint_every_n_steps else (signal.SIGTERM,):
            signal.signal(number, lambda *_: setattr(self, "is_told_to_stop", True))
        disable = None if self.world.is_first else True  # None: unless it is a terminal
        with tqdm(total=cfg.num_steps, initial=self.steps_done, desc="GRPO", disable=disable) as bar:
            while not self.is_stopping():
                is_last = self.steps_done == cfg.num_steps
                is_due = is_last or self.steps_done % cfg.eval_every_n_steps == 0
                if is_due and self.steps_done not in self.accuracies:
                    self.evaluate(bar)
                if is_last or (metrics := self.step(self.steps_done + 1)) is None:
                    break
                self.steps_done += 1
                self.history.append(metrics)
                if self.world.is_first:
                    self.metric_logger.log_dict(metrics, step=self.steps_done)
                bar.update()
                bar.set_postfix_str(f"reward {metrics['reward']:.2f}, {metrics['token_ratio']:.1f} x fewer tokens")
                if cfg.checkpoint_every_n_steps and self.steps_done % cfg.checkpoint_every_n_steps == 0:
                    self.save_progress(self.checkpoint_dir)
        if not self.is_finished():
            self.save_progress(self.checkpoint_dir)

    def is_finished(self) -> bool:
        """Whether all steps are done, and the last evaluation."""
        return self.steps_done == self.cfg.num_steps and self.steps_done in self.accuracies

    def step(self, number: int) -> dict[str, float] | None:
        """Samples a group for each problem of the step, scores the rollouts, and updates the model on them.

        Returns the metrics, means over the updates where there are several; None when told to stop before the first.
        """
        started = seconds(self.world.device)
        rollouts, metrics = self.sample(number)
        sampled = seconds(self.world.device)
        minibatches, costs = self.packed(rollouts)
        if not self.is_checked:
            self.self_check(minibatches[0])
        scored_minibatches = [(batches, *self.old_and_ref(batches)) for batches in minibatches]
        scored = seconds(self.world.device)
        if self.is_stopping():
            return None
        advantages = group_advantages(rollouts.rewards, rollouts.group_ids, self.cfg.scale_rewards)
        updates = []
        for _ in range(self.cfg.num_iterations):
            for n, minibatch in enumerate(scored_minibatches):
                trained = rollouts.trained[self._rows(n)]
                normalizer = loss_normalizer(trained, self.loss.keywords["loss_type"], self.sampling.max_new_tokens)
                updates.append(self.update(*minibatch, normalizer, advantages))
        metrics |= {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        metrics["lr"] = training.get_lr(self.optimizer)
        self.lr_scheduler.step()
        finished = seconds(self.world.device)
        metrics |= costs | {"sample_s": sampled - started, "score_s": scored - sampled, "train_s": finished - scored}
        metrics["peak_memory_gib"] = self.world.largest(peak_memory_gib(self.world.device))
        return metrics | rates(metrics)

    def sample(self, number: int) -> tuple[Rollouts, dict[str, float]]:
        """A group of rewarded completions for each problem of the step, drawn by all processes, and their metrics."""
        size, chosen = self.cfg.group_size, self.chosen(number)
        shape = (len(chosen), size, self.sampling.max_new_tokens)
        uniforms = torch.rand(shape, dtype=torch.float64, generator=self._generator(f"samples of step {number}"))
        mine = self.world.share(range(len(chosen)))
        prompts = [self.prompts[chosen[n]] for n in mine]
        samples = self._drawn(prompts, size, self.sampling, uniforms[mine].flatten(0, 1))
        texts = [tune.completion_text(self.tokenizer, tokens.tolist()) for tokens in samples.completions]
        groups = []
        for i, n in enumerate(mine):
            rows, answers = slice(i * size, (i + 1) * size), [self.problems[chosen[n]].answer] * size
            rewards, each = score(self.rewards, texts[rows], answers, first=n * size, count=len(chosen) * size)
            tokens = [completion.cpu() for completion in samples.completions[rows]]
            groups.append((tokens, samples.is_finished[rows].cpu(), rewards, each))
        groups = self.world.gather(groups)
        device = self.world.device
        rollouts = Rollouts(
            [self.prompts[problem] for problem in chosen],
            [completion.to(device) for tokens, *_ in groups for completion in tokens],
            torch.arange(len(chosen), device=device).repeat_interleave(size),
            torch.cat([rewards for *_, rewards, _ in groups]).to(device),
        )
        metrics = rollout_metrics(rollouts, torch.cat([is_finished for _, is_finished, *_ in groups]))
        for name in (given.name for given in self.rewards):
            metrics[f"reward/{name}"] = torch.cat([each[name] for *_, each in groups]).mean().item()
        self.first_rollouts = self.first_rollouts or rollouts
        return rollouts, metrics

    def packed(self, rollouts: Rollouts) -> tuple[list[list[MicroBatch]], dict[str, float]]:
        """This process's micro-batches of each mini-batch, equally many on every process, and what all of them cost."""
        rows = [range(len(rollouts))[self._rows(n)] for n in range(self.cfg.minibatches)]
        pack_some = partial(pack, rollouts, self.cfg.max_tokens, self.world.size)
        is_first, self.is_sharing = self.is_sharing is None, self.cfg.sharing is not False
        packed = [pack_some(self.is_sharing, own) for own in rows]
        if self.cfg.sharing == "auto":
            self.is_sharing, why = sharing_pays(packed, self.shape)
            packed = packed if self.is_sharing else [pack_some(False, own) for own in rows]
            if is_first and self.world.is_first:
                print(f"sharing=auto: {why}")
        costs = cost_metrics(packed, self.is_sharing, self.shape, self.cfg.compile or self.world.device.type != "cpu")
        return [[batch for batch in batches if batch.rank == self.world.rank] for batches in packed], costs

    @within_memory("max_tokens", "set self_check=false")
    def self_check(self, batches: list[MicroBatch]) -> None:
        """Ends the run if the model does not share prefixes exactly, on the first rollouts that are shared."""
        if self.is_sharing:
            options = {"temperature": self.sampling.temperature, "autocast": self.train_autocast}
            options["any_failed"] = lambda failed: self.world.largest(failed) > 0
            found = check_run(self.model, runs(batches)[0], **options)
            self.is_checked = True
            if self.world.is_first:
                print(found)

    @within_memory("max_tokens")
    @torch.no_grad()
    def old_and_ref(self, batches: list[MicroBatch]) -> tuple[Scores, Scores]:
        """Old and reference log-probabilities [n, C] of each micro-batch, where they are needed."""
        old = ref = [None] * len(batches)
        if self.cfg.num_iterations * self.cfg.minibatches > 1:  # else the old policy is the one in training
            old = [logprobs for logprobs, _ in self.logprobs(self.model, batches)]
        if self.reference is not None:
            ref = [logprobs for logprobs, _ in self.logprobs(self.reference, batches)]
        elif self.cfg.loss.get("beta", 0.0) > 0:
            with disable_adapter(self.model):
                ref = [logprobs for logprobs, _ in self.logprobs(self.model, batches)]
        return old, ref

    @within_memory("max_tokens", "set activation_checkpointing=true")
    def update(
        self, batches: list[MicroBatch], olds: Scores, refs: Scores, normalizer: Tensor, advantages: Tensor
    ) -> dict[str, float]:
        """One optimizer step: the losses of all micro-batches, on all processes, add up to that of the mini-batch."""
        self.optimizer.zero_grad()
        sums, seen = {}, []
        scores = self.logprobs(self.model, batches)
        for (logprobs, entropies), batch, old, ref in zip(scores, batches, olds, refs, strict=True):
            loss, metrics = self.loss(
                logprobs,
                old,
                advantages[batch.indices],
                batch.rollouts.trained,
                ref_logprobs=ref,
                normalizer=normalizer,
                entropies=entropies,
            )
            (loss * self.world.size).backward()  # FSDP takes the mean over the processes
            seen.append((batch, logprobs.detach(), old, ref, loss.item()))
            tokens = metrics.pop("tokens")
            added = {"loss": loss, "tokens": tokens} | {name: mean * tokens for name, mean in metrics.items()}
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in added.items()}
        sums = self.world.total(sums)
        grad_norm = get_total_norm([parameter.grad for parameter in self.trained if parameter.grad is not None])
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        if not (isfinite(grad_norm) and isfinite(sums["loss"])):
            what = f"step {self.steps_done + 1}: the loss is {sums['loss']} and the gradient's norm {grad_norm}"
            folder, save = self.output_dir / "not_finite", self.save_progress
            raise not_finite(what, folder, self.world, save, seen, advantages, self.model)
        clip_grads_with_norm_(self.trained, self.cfg.clip_grad_norm, grad_norm)
        self.optimizer.step()
        loss, tokens = sums.pop("loss"), sums.pop("tokens")
        return {"loss": loss, "grad_norm": grad_norm.item()} | {name: value / tokens for name, value in sums.items()}

    def logprobs(self, model: nn.Module, batches: list[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities and entropies [n, C] of each micro-batch; its backward belongs before the next is taken.

        The prompt of a group over the budget is encoded once for its micro-batches, and its backward runs after theirs.
        """
        for run in runs(batches):
            with self.train_autocast():
                encoded = shared.encode_run(model, run)
            with encoded as prefix:
                for batch in run:
                    with self.train_autocast():
                        if self.is_sharing:
                            scores = shared.logprobs(model, batch, self.sampling.temperature, prefix)
                        else:
                            scores = shared.unshared_logprobs(model, batch.rollouts, self.sampling.temperature)
                    yield scores

    def evaluate(self, bar: tqdm) -> None:
        """Notes and prints the mean `test_reward` of the likeliest completion of every held-out problem."""
        mine = self.world.share(range(len(self.test_prompts)))
        samples = self._drawn([self.test_prompts[n] for n in mine], 1, replace(self.sampling, temperature=0), None)
        texts = [tune.completion_text(self.tokenizer, tokens.tolist()) for tokens in samples.completions]
        answers = [self.test_problems[n].answer for n in mine]
        rewards = self.world.gather(score(self.test_reward, texts, answers)[0].tolist())
        accuracy = self.accuracies[self.steps_done] = sum(rewards) / len(rewards)
        if self.world.is_first:
            self.metric_logger.log("held_out_accuracy", accuracy, step=self.steps_done)
            bar.clear()
            print(evaluated(self.history, self.accuracies))

    def save_progress(self, folder: Path) -> None:
        """What `resume` needs, on disk in one piece."""
        progress = {
            "steps_done": self.steps_done,
            "history": self.history,
            "accuracies": list(self.accuracies.items()),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "options": {name: OmegaConf.to_container(self.cfg)[name] for name in SAME_ON_RESUME},
        }
        keep = self.cfg.keep_last_n_checkpoints
        save_checkpoint(folder, self.steps_done, self.model, self.optimizer, progress, keep, self.world)

    def resume(self, checkpoint: Path) -> None:
        """Goes on after the step of a checkpoint."""
        progress, options = read_progress(checkpoint), OmegaConf.to_container(self.cfg)
        for name, value in progress["options"].items():
            if options[name] != value:
                raise ValueError(f"{checkpoint} was made with {name}={value}; resume with that, or start anew")
        if progress["steps_done"] > self.cfg.num_steps:
            raise ValueError(f"{checkpoint} is beyond num_steps={self.cfg.num_steps}; raise num_steps")
        load_checkpoint(checkpoint, self.model, self.optimizer, self.world)
        self.steps_done, self.history = progress["steps_done"], progress["history"]
        self.accuracies = dict(progress["accuracies"])
        self.lr_scheduler.load_state_dict(progress["lr_scheduler"])

    def save_checkpoint(self) -> None:
        """The trained weights, in the format that the checkpointer read."""
        models.save(self.model, self.cfg, self.checkpointer, self.world)

    def report(self) -> None:
        """Prints what a run was, and draws what it learned, the mask of two groups, and what sharing saves."""
        if self.world.is_first:
            print(summary(self.history, self.accuracies))
            print(f"{'pictures':<20}{self.output_dir}/{{reward,mask,savings}}.png")
            rewards = [metrics["reward"] for metrics in self.history]
            plot_run(self.output_dir, rewards, self.accuracies, self.first_rollouts)

    def cleanup(self) -> None:
        """Closes the log, and leaves the other processes."""
        if self.world.is_first:
            self.metric_logger.close()
        self.world.leave()

    def chosen(self, number: int) -> list[int]:
        """The problems of a step: all of them in a random order, then again in another."""
        size, count = self.cfg.prompts_per_step, len(self.problems)
        rounds = [divmod(i, count) for i in range((number - 1) * size, number * size)]
        orders = {n: torch.randperm(count, generator=self._generator(f"order {n}")).tolist() for n, _ in rounds}
        return [orders[n][i] for n, i in rounds]

    def is_stopping(self) -> bool:
        """Whether any process was told to stop, on which all must agree."""
        return self.world.largest(self.is_told_to_stop) > 0

    @within_memory("max_cache_tokens")
    def _drawn(
        self, prompts: list[Tensor], group_size: int, params: SamplingParams, uniforms: Tensor | None
    ) -> Samples:
        compiled = self.cfg.compile and self.world.size == 1 and self.world.device.type == "cuda"  # FSDP breaks graphs
        options = {"max_cache_tokens": self.cfg.max_cache_tokens, "compiled": compiled}
        with self.autocast(), shared.unsharded(self.model), uncompiled(self.model):
            return sample(self.decoder, shared.output(self.model), prompts, group_size, params, uniforms, **options)

    def _rows(self, minibatch: int) -> slice:
        """The rollouts of a mini-batch."""
        size = self.cfg.prompts_per_step // self.cfg.minibatches * self.cfg.group_size
        return slice(minibatch * size, (minibatch + 1) * size)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(random.Random(f"{self.cfg.seed} {purpose}").getrandbits(63))


@tune.parsed
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe; a mistake in the configuration or the data ends it with one line."""
    try:
        recipe = GRPORecipe(cfg)
        recipe.setup()
    except SETUP_ERRORS as error:
        sys.exit(f"error: {tune.one_line(error)}")
    try:
        recipe.train()
        if recipe.is_finished():
            recipe.save_checkpoint()
    except RUN_ERRORS as error:
        sys.exit(f"error: {tune.one_line(error)}")
    if recipe.is_finished():
        recipe.report()
    elif recipe.world.is_first:
        print(f"stopped after step {recipe.steps_done} of {cfg.num_steps}; resume=true goes on from there")
    recipe.cleanup()


if __name__ == "__main__":
    recipe_main()
