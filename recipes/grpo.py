"""GRPO with every group's prompt encoded once.

    tune run --nproc_per_node 1 recipes/grpo.py --config recipes/configs/tiny_cpu.yaml

A torchtune recipe for models of torchtune or transformers, one process or many (FSDP2), all parameters or LoRA. Options
and their defaults are in flexpg/training/config.py; this file is yours to copy and change. One step is

    generate    sample group_size completions for each of prompts_per_step problems
    score       compute their rewards
    advantages  compare each reward with its group
    update      num_iterations x minibatches optimizer steps on the GRPO loss
    log, evaluate, save

All randomness is a function of the seed and the step, so a run that is resumed takes the same steps.
"""

import logging
import math
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

import flexpg
from flexpg import MicroBatch, Rollouts, group_advantages, grpo_loss, pack, packed_logprobs, self_check
from flexpg.analysis.plots import plot_mask, plot_reward, plot_savings
from flexpg.sampling import Samples
from flexpg.training.checkpoints import CheckpointError, checkpoints, load_checkpoint, read_progress, save_checkpoint
from flexpg.training.config import (
    SETUP_ERRORS,
    GRPOConfig,
    component,
    device_and_dtypes,
    parse_config,
    sampling_params,
)
from flexpg.training.distributed import World
from flexpg.training.errors import one_line, out_of_memory_hint
from flexpg.training.metrics import (
    MIN_SPEEDUP,
    cost_metrics,
    flop_ratio,
    format_eval,
    format_summary,
    peak_memory_gib,
    rates,
    rollout_metrics,
    synchronized_time,
)
from flexpg.training.models import build_model, library_of, replace_weights
from flexpg.training.prompts import completion_group, tokenize_problems
from flexpg.training.reward_calls import Run, TrainerState
from flexpg.training.rewards import build_rewards, reward_metrics, score
from flexpg.tree import PrefixTree
from flexpg.verify import baseline_logprobs, gradient_norms

# Options that must not change between a checkpoint and the run that resumes from it.
SAME_ON_RESUME = ("seed", "prompts_per_step", "group_size", "minibatches", "num_iterations", "train_problems")
SAME_ON_RESUME += ("test_problems", "prompt_format", "model", "optimizer", "lr_scheduler")


@dataclass
class PackedStep:
    """A step's rollouts as micro-batches.

    Attributes:
        minibatches: For each mini-batch, the micro-batches of this rank.
        is_shared: Whether shared prefixes are encoded once.
        cost: Metrics of all ranks.
    """

    minibatches: list[list[MicroBatch]]
    is_shared: bool
    cost: dict[str, float]


class GRPORecipe(FTRecipeInterface):
    """Sample, score, update."""

    def __init__(self, cfg: GRPOConfig) -> None:
        self.cfg = cfg
        device, self.dtype, self.param_dtype = device_and_dtypes(cfg)
        self.autocast_dtype = None if self.dtype == self.param_dtype else self.dtype
        self.world = World.init(device)
        per_minibatch, remainder = divmod(cfg.prompts_per_step, cfg.minibatches)
        if remainder or per_minibatch < self.world.size:
            raise ValueError(
                f"prompts_per_step must be a multiple of minibatches, with at least one prompt per rank in each, got "
                f"{cfg.prompts_per_step} in {cfg.minibatches} on {self.world.size} ranks"
            )
        self.rollouts_per_minibatch = per_minibatch * cfg.group_size
        self.output_dir = Path(cfg.output_dir)
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.stop_signal = 0  # the number of a signal that asks to stop
        utils.get_logger().addFilter(lambda record: record.levelno >= logging.WARNING)  # torchtune's progress messages
        # torchtune's RMSNorm computes in float32; torch warns where its weight, frozen or not, is bf16.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")

    # ---- Setup -------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Create every component, and find mistakes before anything is trained or written."""
        cfg, world = self.cfg, self.world
        self.tokenizer = component(cfg, "tokenizer")
        self.sampling = sampling_params(cfg, self.tokenizer.stop_tokens)
        self.problems, self.test_problems = component(cfg, "train_problems"), component(cfg, "test_problems")
        self.rewards = build_rewards(cfg.rewards, self.problems)
        self.test_reward = build_rewards({"test_reward": cfg.test_reward}, self.test_problems)
        self.model = build_model(cfg, self.dtype, self.param_dtype)
        self.library = library_of(self.model)  # torchtune or transformers
        self.is_lora = self.library.has_adapters(self.model)
        self.shape = self.library.shape_of(self.model)
        self.prompts, self.test_prompts = (
            tokenize_problems(cfg, self.tokenizer, self.model, name, problems, at_least=at_least, device=world.device)
            for name, problems, at_least in (
                ("train_problems", self.problems, cfg.prompts_per_step),
                ("test_problems", self.test_problems, world.size),
            )
        )
        earlier = checkpoints(self.checkpoint_dir)
        if len(set(world.all_gather([str(earlier[-1:])]))) > 1:
            raise ValueError(f"output_dir must be a folder that all ranks share, got {self.output_dir}")
        if earlier and not cfg.resume:
            raise ValueError(f"output_dir holds {earlier[-1]} of an earlier run; set resume=true or another output_dir")
        saved = self.library.weights_folder(cfg) / "epoch_0"
        if world.is_first and saved.exists() and not earlier:
            print(f"the trained weights in {saved} will be replaced at the end of this run")

        self.source, weights = self.library.load_weights(cfg, self.model) if world.is_first else (None, {})
        self.model = self.library.materialize(
            self.model,
            weights,
            world,
            seed=cfg.seed,
            compile=cfg.compile,
            activation_checkpointing=cfg.activation_checkpointing,
        )
        flexpg.enable(self.model)
        self.reference = None  # with LoRA, the reference is the model without its adapters
        if cfg.loss.beta > 0 and not self.is_lora:
            reference = build_model(cfg, self.dtype, self.dtype).requires_grad_(False)
            reference = self.library.materialize(reference, weights, world, seed=cfg.seed, compile=cfg.compile)
            self.reference = flexpg.enable(reference)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = component(cfg, "optimizer", self.trained)
        self.lr_scheduler = component(cfg, "lr_scheduler", self.optimizer)

        self.steps_done, self.history, self.accuracies = 0, [], {}
        if earlier:
            self.resume(earlier[-1])
        if world.is_first:
            if cfg.resume and not earlier:
                print(f"no checkpoint in {self.checkpoint_dir}, starting from scratch")
            elif earlier:
                print(f"resuming after step {self.steps_done}")
            self.metric_logger = component(cfg, "metric_logger")
            self.metric_logger.log_config(cfg)

    def resume(self, checkpoint: Path) -> None:
        """Load a checkpoint of the same run."""
        progress, options = read_progress(checkpoint), OmegaConf.to_container(self.cfg)
        for name, value in progress["options"].items():
            if options[name] != value:
                raise ValueError(
                    f"{name} must be {value} to resume from {checkpoint}, got {options[name]}; use that, or start from "
                    "scratch with another output_dir"
                )
        if progress["steps_done"] > self.cfg.num_steps:
            raise ValueError(f"num_steps must be at least {progress['steps_done']} to resume from {checkpoint}")
        load_checkpoint(checkpoint, self.model, self.optimizer, self.world)
        self.steps_done, self.history = progress["steps_done"], progress["history"]
        self.accuracies = dict(progress["accuracies"])
        self.lr_scheduler.load_state_dict(progress["lr_scheduler"])

    # ---- Training ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train until `num_steps` or a signal, with evaluations at the start, every few steps and at the end."""
        cfg = self.cfg
        signal.signal(signal.SIGTERM, self.request_stop)
        if cfg.checkpoint_every_n_steps:  # without checkpoints, Ctrl-C ends the run at once
            signal.signal(signal.SIGINT, self.request_stop)
        if not self.steps_done:
            self.evaluate()
        is_checked = not cfg.self_check
        is_silent = None if self.world.is_first else True  # None: silent unless stderr is a terminal
        for step in tqdm(range(self.steps_done + 1, cfg.num_steps + 1), desc="GRPO", disable=is_silent):
            if self.should_stop():
                break
            started = synchronized_time(self.world.device)
            samples, chosen = self.generate(step)
            rollouts, metrics = self.score(samples, chosen)
            sampled = synchronized_time(self.world.device)
            packed = self.pack(rollouts)
            self_check_s = 0.0
            if packed.is_shared and not is_checked:
                self_check_s, is_checked = self.check_sharing(packed), True
            rollouts, packed = self.score_policies(rollouts, packed)  # old and reference log-probabilities
            scored = synchronized_time(self.world.device)
            if self.should_stop():
                break
            advantages = group_advantages(rollouts, cfg.scale_rewards)
            metrics |= packed.cost | self.update(step, rollouts, packed, advantages)
            metrics["lr"] = float(training.get_lr(self.optimizer))  # a tensor in torchao's optimizers
            self.lr_scheduler.step()
            finished = synchronized_time(self.world.device)
            seconds = {"sample_s": sampled - started, "logprobs_s": scored - sampled - self_check_s}
            seconds |= {"train_s": finished - scored, "self_check_s": self_check_s}

            self.steps_done = step
            self.log(metrics | seconds)
            if step % cfg.eval_every_n_steps == 0 or step == cfg.num_steps:
                self.evaluate()
            if cfg.checkpoint_every_n_steps and step % cfg.checkpoint_every_n_steps == 0:
                self.save_progress(self.checkpoint_dir)
            if step == 1 and self.world.is_first:
                self.plot(rollouts)
        if not self.is_finished():
            self.save_progress(self.checkpoint_dir)

    def generate(self, step: int) -> tuple[Samples, list[int]]:
        """Sample a group of completions for each problem of the step; every rank samples its share of the problems.

        Returns:
            This rank's samples, and the numbers of the step's problems.
        """
        chosen = self.choose_problems(step)
        own = self.world.shard(range(len(chosen)))
        seeds = [self.seed(f"samples {n} of step {step}") for n in own]
        return self.sample([self.prompts[chosen[n]] for n in own], self.cfg.group_size, seeds), chosen

    def score(self, samples: Samples, chosen: list[int]) -> tuple[Rollouts, dict[str, float]]:
        """Compute the rewards of this rank's samples and gather the rollouts of all ranks, with their metrics."""
        size = self.cfg.group_size
        own = self.world.shard(range(len(chosen)))
        completions = [samples.completions[i * size : (i + 1) * size] for i in range(len(own))]
        groups = [
            completion_group(self.tokenizer, self.problems[chosen[n]], tokens, first=n * size)
            for n, tokens in zip(own, completions, strict=True)
        ]
        scores = score(self.rewards, groups, self.reward_context())
        finished = samples.is_finished.cpu().split(size)
        cpu = [[tokens.cpu() for tokens in group] for group in completions]
        # Of all ranks, in the order of the problems.
        gathered = self.world.all_gather(list(zip(cpu, finished, scores, strict=True)))
        rollouts = Rollouts.from_groups(
            prompts=[self.prompts[problem] for problem in chosen],
            completions=[[tokens.to(self.world.device) for tokens in group] for group, _, _ in gathered],
            rewards=torch.stack([scores.total for _, _, scores in gathered]),
        )
        metrics = rollout_metrics(rollouts, torch.cat([is_finished for _, is_finished, _ in gathered]))
        return rollouts, metrics | reward_metrics([scores for _, _, scores in gathered])

    def pack(self, rollouts: Rollouts) -> PackedStep:
        """Cut the step into mini-batches, and these into micro-batches for every rank."""
        cfg, world = self.cfg, self.world
        rows = torch.arange(len(rollouts), device=world.device).split(self.rollouts_per_minibatch)
        packed = [pack(rollouts, cfg.max_tokens, world_size=world.size, indices=own) for own in rows]
        is_shared = bool(cfg.sharing)
        if cfg.sharing == "auto":
            is_shared = flop_ratio(packed, self.shape) >= MIN_SPEEDUP
        if not is_shared:
            packed = [pack(rollouts, cfg.max_tokens, world_size=world.size, sharing=False, indices=own) for own in rows]
        keep_padding = cfg.compile or world.device.type != "cpu"
        cost = cost_metrics(packed, is_shared, self.shape, keep_padding)
        own = [[batch for batch in minibatch if batch.rank == world.rank] for minibatch in packed]
        return PackedStep(own, is_shared, cost)

    def check_sharing(self, packed: PackedStep) -> float:
        """Verify that sharing is exact on these rollouts, and return the seconds that this took."""
        with self.memory_hint("max_tokens"):
            result = self_check(
                self.model,
                packed.minibatches[0],
                temperature=self.sampling.temperature,
                autocast_dtype=self.autocast_dtype,
            )
        if self.world.is_first:
            tqdm.write(str(result))
        return result.seconds

    @torch.no_grad()
    def score_policies(self, rollouts: Rollouts, packed: PackedStep) -> tuple[Rollouts, PackedStep]:
        """Add the old and the reference log-probabilities of this rank's rollouts, where the loss needs them."""
        cfg, tables = self.cfg, {}
        if cfg.num_iterations * cfg.minibatches > 1:  # otherwise the old policy is the current one
            tables["old_logprobs"] = self.logprob_table(self.model, rollouts, packed)
        if cfg.loss.beta > 0 and self.is_lora:
            with self.library.without_adapters(self.model):
                tables["ref_logprobs"] = self.logprob_table(self.model, rollouts, packed)
        elif cfg.loss.beta > 0:
            tables["ref_logprobs"] = self.logprob_table(self.reference, rollouts, packed)
        if not tables:
            return rollouts, packed
        rollouts = replace(rollouts, **tables)
        return rollouts, self.pack(rollouts)

    def update(self, step: int, rollouts: Rollouts, packed: PackedStep, advantages: Tensor) -> dict[str, float]:
        """Train on the step's rollouts, and return metrics averaged over the optimizer steps."""
        updates = []
        for _ in range(self.cfg.num_iterations):
            for n, batches in enumerate(packed.minibatches):
                rows = slice(n * self.rollouts_per_minibatch, (n + 1) * self.rollouts_per_minibatch)
                total_tokens = int(rollouts.loss_mask[rows].sum())
                updates.append(self.optimizer_step(step, batches, packed.is_shared, advantages, total_tokens))
        return {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}

    def optimizer_step(
        self, step: int, batches: list[MicroBatch], is_shared: bool, advantages: Tensor, total_tokens: int
    ) -> dict[str, float]:
        """Take one optimizer step; the losses of all micro-batches on all ranks sum to the mini-batch's loss."""
        cfg, sums, seen = self.cfg, {"loss": 0.0}, []
        self.optimizer.zero_grad()
        with self.memory_hint("max_tokens", "or set activation_checkpointing=true"):
            for batch, logprobs, entropies in self.logprobs(self.model, batches, is_shared):
                metrics: dict[str, Tensor] = {}
                loss = grpo_loss(
                    logprobs,
                    advantages[batch.indices],
                    batch.loss_mask,
                    total_tokens=total_tokens,
                    total_rollouts=self.rollouts_per_minibatch,
                    old_logprobs=batch.old_logprobs,
                    ref_logprobs=batch.ref_logprobs,
                    beta=cfg.loss.beta,
                    epsilon=cfg.loss.epsilon,
                    epsilon_high=cfg.loss.epsilon_high,
                    delta=cfg.loss.delta,
                    loss_type=cfg.loss.loss_type,
                    importance_sampling_level=cfg.loss.importance_sampling_level,
                    sapo_temperature_pos=cfg.loss.sapo_temperature_pos,
                    sapo_temperature_neg=cfg.loss.sapo_temperature_neg,
                    max_completion_length=cfg.sampling.max_new_tokens,
                    metrics=metrics,
                )
                (loss * self.world.size).backward()  # FSDP averages gradients over ranks
                seen.append((batch, logprobs.detach(), loss.item()))
                weight = batch.rollouts.num_loss_tokens / total_tokens  # metrics are means over loss tokens
                metrics["entropy"] = entropies.sum() / max(batch.rollouts.num_loss_tokens, 1)
                sums["loss"] += loss.item()
                for name, mean in metrics.items():
                    sums[name] = sums.get(name, 0.0) + mean.item() * weight
        sums = self.world.all_reduce_sum(sums)
        grad_norm = get_total_norm([parameter.grad for parameter in self.trained if parameter.grad is not None])
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        if not (math.isfinite(sums["loss"]) and math.isfinite(grad_norm)):
            self.abort_nonfinite(f"step {step}: loss {sums['loss']}, gradient norm {grad_norm}", seen, advantages)
        clip_grads_with_norm_(self.trained, cfg.clip_grad_norm, grad_norm)
        self.optimizer.step()
        return sums | {"grad_norm": grad_norm.item()}

    def logprobs(
        self, model: nn.Module, batches: list[MicroBatch], is_shared: bool
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """Iterate over micro-batches with log-probabilities and entropies [n, C]; call backward inside the loop."""
        options = {"temperature": self.sampling.temperature, "autocast_dtype": self.autocast_dtype}
        if is_shared:
            yield from packed_logprobs(model, batches, return_entropy=True, **options)
        else:  # every sequence in full, for comparison
            for batch in batches:
                yield batch, *baseline_logprobs(model, batch.rollouts, return_entropy=True, **options)

    def logprob_table(self, model: nn.Module, rollouts: Rollouts, packed: PackedStep) -> Tensor:
        """Return log-probabilities [N, C] of this rank's rollouts, 0 for those of other ranks."""
        table = torch.zeros(rollouts.loss_mask.shape, device=self.world.device)
        with self.memory_hint("max_tokens"):
            for batches in packed.minibatches:
                for batch, logprobs, _ in self.logprobs(model, batches, packed.is_shared):
                    if not batch.is_idle:
                        table[batch.indices, : logprobs.shape[1]] = logprobs.float()
        return table

    def sample(self, prompts: list[Tensor], group_size: int, seeds: list[int] | None) -> Samples:
        """Sample completions; with `seeds=None` the most likely ones."""
        # FSDP interrupts graphs, so the decoding step is compiled on one GPU only.
        compiled = self.cfg.compile and self.world.size == 1 and self.world.device.type == "cuda"
        with self.memory_hint("max_cache_tokens"):
            return flexpg.sample(
                self.model,
                prompts,
                group_size,
                self.sampling if seeds else replace(self.sampling, temperature=0.0),
                seed=seeds,
                max_cache_tokens=self.cfg.max_cache_tokens,
                compiled=compiled,
                autocast_dtype=self.autocast_dtype,
            )

    # ---- Logs, evaluation, checkpoints -------------------------------------------------------------------------------

    def log(self, metrics: dict[str, float]) -> None:
        """Write a step's metrics to the log."""
        metrics["peak_memory_gib"] = self.world.all_reduce_max(peak_memory_gib(self.world.device))
        self.history.append(metrics | rates(metrics))
        if self.world.is_first:
            self.metric_logger.log_dict(self.history[-1], step=self.steps_done)

    def evaluate(self) -> None:
        """Compute the mean `test_reward` of the most likely completion of every test problem."""
        own = self.world.shard(range(len(self.test_prompts)))
        samples = self.sample([self.test_prompts[n] for n in own], 1, None)
        groups = [
            completion_group(self.tokenizer, self.test_problems[n], [tokens], first=n)
            for n, tokens in zip(own, samples.completions, strict=True)
        ]
        scores = score(self.test_reward, groups, self.reward_context())
        rewards = self.world.all_gather([own.total.item() for own in scores])
        self.accuracies[self.steps_done] = sum(rewards) / len(rewards)
        if self.world.is_first:
            self.metric_logger.log("held_out_accuracy", self.accuracies[self.steps_done], step=self.steps_done)
            tqdm.write(format_eval(self.history, self.accuracies))

    def save_progress(self, folder: Path) -> None:
        """Save what `resume` needs, atomically."""
        progress = {
            "steps_done": self.steps_done,
            "history": self.history,
            "accuracies": list(self.accuracies.items()),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "options": {name: OmegaConf.to_container(self.cfg)[name] for name in SAME_ON_RESUME},
        }
        save_checkpoint(
            folder,
            self.steps_done,
            self.model,
            self.optimizer,
            progress,
            self.cfg.keep_last_n_checkpoints,
            self.world,
            self.save_weights if self.cfg.save_weights == "every_checkpoint" else None,
        )

    def save_checkpoint(self) -> None:
        """Save the trained weights in the format that they were loaded from, over those of an earlier run."""
        replace_weights(self.library.weights_folder(self.cfg), self.save_weights, self.world)

    def save_weights(self, folder: Path) -> None:
        """Write the trained weights in the format that they were loaded from."""
        self.library.save_weights(self.model, self.cfg, self.source, self.world, folder)

    def plot(self, rollouts: Rollouts) -> None:
        """Plot the mask of the first groups, and what sharing saves."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        plot_mask(first_groups(rollouts, 2)).savefig(self.output_dir / "mask.png", dpi=200)
        plot_savings(rollouts).savefig(self.output_dir / "savings.png", dpi=200)

    def report(self) -> None:
        """Print what was learned and what sharing saved, and plot the reward."""
        if self.world.is_first:
            print(format_summary(self.history, self.accuracies))
            rewards = [metrics["reward"] for metrics in self.history]
            plot_reward(rewards, self.accuracies).savefig(self.output_dir / "reward.png", dpi=200)
            print(f"{'plots':<20}{self.output_dir}/{{reward,mask,savings}}.png")
            print(f"{'weights':<20}{self.library.weights_folder(self.cfg)}/epoch_0")

    def cleanup(self) -> None:
        """Close the log and leave the process group."""
        if self.world.is_first:
            self.metric_logger.close()
        self.world.shutdown()

    # ---- Details -----------------------------------------------------------------------------------------------------

    def choose_problems(self, step: int) -> list[int]:
        """Return the numbers of the step's problems: all of them in random order, then again in another order."""
        size, count = self.cfg.prompts_per_step, len(self.problems)
        rounds = [divmod(i, count) for i in range((step - 1) * size, step * size)]
        orders = {
            n: torch.randperm(count, generator=torch.Generator().manual_seed(self.seed(f"order {n}"))).tolist()
            for n, _ in rounds
        }
        return [orders[n][i] for n, i in rounds]

    def reward_context(self) -> Run:
        """Return what reward functions can ask for besides completions and problems."""
        state = TrainerState(global_step=self.steps_done, max_steps=self.cfg.num_steps)
        return Run(self.tokenizer, is_chat=self.cfg.prompt_format == "chat", trainer_state=state)

    def seed(self, purpose: str) -> int:
        """Return a seed that is a function of the run's seed and a purpose."""
        return random.Random(f"{self.cfg.seed} {purpose}").getrandbits(63)

    def is_finished(self) -> bool:
        """Return whether all steps and the last evaluation are done."""
        return self.steps_done == self.cfg.num_steps and self.steps_done in self.accuracies

    def request_stop(self, number: int, frame: object) -> None:
        """Remember a signal; the run stops before the next step or update."""
        self.stop_signal = number

    def should_stop(self) -> bool:
        """Return whether any rank was asked to stop."""
        self.stop_signal = int(self.world.all_reduce_max(self.stop_signal))
        return self.stop_signal > 0

    def memory_hint(self, budget: str, otherwise: str = "") -> AbstractContextManager[None]:
        """Print which option to lower above the traceback of an out-of-memory error."""
        return out_of_memory_hint(f"lower {budget} (now {self.cfg[budget]}) {otherwise}".rstrip())

    def abort_nonfinite(self, what: str, seen: list, advantages: Tensor) -> None:
        """Save the weights and this rank's micro-batches, and raise before the optimizer step."""
        folder = self.output_dir / "nonfinite"
        norms = gradient_norms(self.model)
        culprits = [
            f"{name} of rollout {int(batch.indices[(~values.isfinite()).nonzero()[0, 0]])}"
            for batch, logprobs, _ in seen
            for name, values in (("the log-probabilities", logprobs), ("the advantage", advantages[batch.indices]))
            if not values.isfinite().all()
        ]
        culprits += [f"the gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
        dump = [
            {
                "indices": batch.indices.tolist(),
                "prompts": batch.rollouts.prompts,
                "completions": batch.rollouts.completions,
                "advantages": advantages[batch.indices],
                "logprobs": logprobs,
                "old_logprobs": batch.old_logprobs,
                "ref_logprobs": batch.ref_logprobs,
                "loss": loss,
            }
            for batch, logprobs, loss in seen
        ]
        if self.world.is_first:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        self.world.barrier()
        try:
            self.save_progress(folder)
            torch.save({"micro_batches": dump, "gradient_norms": norms}, folder / f"rank_{self.world.rank}.pt")
            saved = f"its weights and the micro-batches of each rank are in {folder}"
        except (CheckpointError, OSError, RuntimeError) as error:  # RuntimeError is torch.save's for a full disk
            saved = f"its weights and micro-batches could not be saved: {one_line(error)}"
        raise FloatingPointError(
            f"{what}, first in {(culprits or ['the loss'])[0]}. The model was not updated; {saved}"
        )


def first_groups(rollouts: Rollouts, count: int) -> PrefixTree:
    """Return the tree of the first groups with completions not merged, so that a plot of its mask shows them all."""
    completions: list[list[Tensor]] = [[] for _ in rollouts.prompts]
    for completion, group in zip(rollouts.completions, rollouts.group_ids.tolist(), strict=True):
        completions[group].append(completion)
    return PrefixTree.from_groups(rollouts.prompts[:count], completions[:count])


@parse_config
def recipe_main(cfg: GRPOConfig) -> None:
    """GRPO with every group's prompt encoded once. Options: flexpg/training/config.py."""
    try:
        recipe = GRPORecipe(cfg)
        recipe.setup()
    except SETUP_ERRORS as error:
        sys.exit(f"error: {one_line(error)}")
    try:
        recipe.train()
        if recipe.is_finished():
            recipe.save_checkpoint()
    except CheckpointError as error:
        sys.exit(f"error: {one_line(error)}")
    if recipe.is_finished():
        recipe.report()
    elif recipe.world.is_first:
        print(f"stopped after step {recipe.steps_done} of {cfg.num_steps}; resume=true continues from there")
    recipe.cleanup()
    if not recipe.is_finished():
        sys.exit(128 + recipe.stop_signal)


if __name__ == "__main__":
    recipe_main()
