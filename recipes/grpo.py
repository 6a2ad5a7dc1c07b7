"""GRPO with every group's prompt encoded once.

    tune run --nproc_per_node 1 recipes/grpo.py --config recipes/configs/tiny_cpu.yaml

A torchtune recipe for models of torchtune or transformers, one process or many (FSDP2), all parameters or LoRA. Options
and their defaults are in flexpg/training/config.py; this file is yours to copy and change. One step is

    generate    sample group_size completions for each of prompts_per_step problems
    score       compute their rewards
    advantages  compare each reward with its group
    update      num_iterations x minibatches optimizer steps on the GRPO loss
    log, evaluate, save

All randomness is a function of the seed and the step, so a run that is resumed takes the same steps; with async_steps=1
its first step is sampled from the resumed weights, where an uninterrupted run would have used those of a step before.
"""

import logging
import math
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
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
from flexpg import MicroBatch, Rollouts, pack, packed_logprobs, self_check
from flexpg.analysis.plots import plot_mask, plot_reward, plot_savings
from flexpg.sampling import Samples
from flexpg.training.checkpoints import CheckpointError, checkpoints, load_checkpoint, read_progress, save_checkpoint
from flexpg.training.config import (
    SETUP_ERRORS,
    GRPOConfig,
    build_loss,
    component,
    device_and_dtypes,
    parse_config,
    sampling_params,
)
from flexpg.training.dialogues import sample_dialogues
from flexpg.training.distributed import RankError, World
from flexpg.training.engines import check_engine
from flexpg.training.environments import build_environment
from flexpg.training.episodes import (
    Episode,
    StepRollouts,
    build_rollouts,
    episode_advantages,
    first_problems,
    single_turn_episodes,
    subtract_kl,
)
from flexpg.training.errors import one_line, out_of_memory_hint
from flexpg.training.event_loop import in_daemon_thread
from flexpg.training.metrics import (
    MIN_SPEEDUP,
    best_step,
    cost_metrics,
    episode_metrics,
    flop_ratio,
    format_eval,
    format_summary,
    has_spread,
    peak_memory_gib,
    rates,
    synchronized_time,
)
from flexpg.training.models import build_model, library_of, replace_weights
from flexpg.training.prompts import completion_group, tokenize_problems
from flexpg.training.reward_calls import Run, TrainerState
from flexpg.training.rewards import Scores, add_environment, build_rewards, reward_metrics, score
from flexpg.training.run_report import write_report
from flexpg.training.samples_log import SamplesLog, best_and_worst, format_samples
from flexpg.training.tasks import Problem
from flexpg.verify import baseline_logprobs, gradient_norms

# Options that must not change between a checkpoint and the run that resumes from it.
SAME_ON_RESUME = ("seed", "prompts_per_step", "group_size", "minibatches", "num_iterations", "train_problems")
SAME_ON_RESUME += ("test_problems", "prompt_format", "model", "optimizer", "lr_scheduler")
SAME_ON_EVAL = ("model", "optimizer", "lr_scheduler")  # what a checkpoint is loaded into
NO_SAMPLES = Samples([], torch.zeros(0, 0), torch.zeros(0, dtype=torch.bool))


@dataclass
class PackedStep:
    """A step's rollouts as micro-batches.

    Attributes:
        minibatches: For each mini-batch, the micro-batches of this rank.
        rows: For each mini-batch, the numbers of its rollouts.
        is_shared: Whether shared prefixes are encoded once.
        cost: Metrics of all ranks.
    """

    minibatches: list[list[MicroBatch]]
    rows: list[Tensor]
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
        self.prompts_per_minibatch = per_minibatch
        self.output_dir = Path(cfg.output_dir)
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.reward_s = 0.0  # of the current step
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
        self.environment = build_environment(cfg.environment) if cfg.environment else None
        self.rewards = build_rewards(cfg.rewards, self.problems) if cfg.rewards else []
        self.test_reward = []  # the environment's reward
        if cfg.test_reward:
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
        if self.environment:
            budget = min(cfg.max_tokens, cfg.max_cache_tokens)
            self.max_length = self.environment.max_length or budget
            if self.max_length > budget:
                raise ValueError(f"environment.max_length must be at most {budget}, got {self.max_length}")
            longest = max(map(len, self.prompts + self.test_prompts)) + self.sampling.max_new_tokens
            if longest > self.max_length:
                raise ValueError(f"environment.max_length must be at least {longest}, got {self.max_length}")
            try:
                self.library.check_fits(self.model, 0, self.max_length)
            except ValueError as error:
                raise ValueError(f"environment.max_length: {error}") from None
        earlier = checkpoints(self.checkpoint_dir)
        if len(set(world.all_gather([str(earlier[-1:])]))) > 1:
            raise ValueError(f"output_dir must be a folder that all ranks share, got {self.output_dir}")
        if cfg.eval_only and cfg.resume and not earlier:
            raise ValueError(
                f"resume must be false with eval_only, got true without a checkpoint in {self.checkpoint_dir}"
            )
        if earlier and not (cfg.resume or cfg.eval_only):
            raise ValueError(f"output_dir holds {earlier[-1]} of an earlier run; set resume=true or another output_dir")
        saved = self.library.weights_folder(cfg) / "epoch_0"
        if world.is_first and saved.exists() and not (earlier or cfg.eval_only):
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
        self.loss = build_loss(cfg)
        self.needs_reference = cfg.loss.get("beta", 0.0) > 0 or cfg.kl_in_reward > 0
        self.entropy_grad = cfg.loss.get("entropy_coef", 0.0) != 0 or "_component_" in cfg.loss
        self.reference = None  # with LoRA, the reference is the model without its adapters
        if self.needs_reference and not (self.is_lora or cfg.eval_only):
            reference = build_model(cfg, self.dtype, self.dtype).requires_grad_(False)
            reference = self.library.materialize(reference, weights, world, seed=cfg.seed, compile=cfg.compile)
            self.reference = flexpg.enable(reference)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = component(cfg, "optimizer", self.trained)
        self.lr_scheduler = component(cfg, "lr_scheduler", self.optimizer)

        self.steps_done, self.history, self.accuracies = 0, [], {}
        if cfg.resume and earlier:
            self.resume(earlier[-1])
        self.engine = component(cfg, "sampler") if cfg.sampler else None  # None: flexpg.sample, from the model itself
        if cfg.async_steps and not (self.engine and self.engine.is_shared):
            raise ValueError("async_steps needs a sampler that is a server: the model itself is training meanwhile")
        if self.engine:
            self.sync() if self.steps_done else self.check_engine()
        is_profiled = cfg.profiler.get("enabled", False) and not cfg.eval_only
        self.profiler = component(cfg, "profiler")[0] if is_profiled else training.DummyProfiler()
        if world.is_first:
            if cfg.resume and not earlier:
                print(f"no checkpoint in {self.checkpoint_dir}, starting from scratch")
            elif cfg.resume:
                print(f"resuming after step {self.steps_done}")
            self.metric_logger = component(cfg, "metric_logger")
            if not cfg.eval_only:
                self.metric_logger.log_config(cfg)
                self.samples_log = SamplesLog(self.output_dir / "samples.jsonl", self.steps_done)

    def resume(self, checkpoint: Path) -> None:
        """Load a checkpoint of the same run."""
        progress, options = read_progress(checkpoint), OmegaConf.to_container(self.cfg)
        for name, value in progress["options"].items():
            if options[name] != value and (name in SAME_ON_EVAL or not self.cfg.eval_only):
                raise ValueError(
                    f"{name} must be {value} to resume from {checkpoint}, got {options[name]}; use that, or start from "
                    "scratch with another output_dir"
                )
        if progress["steps_done"] > self.cfg.num_steps and not self.cfg.eval_only:
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
        self.evaluate_if_due()
        is_checked = not cfg.self_check
        pending: Future[list[list[Episode]]] | None = None
        is_silent = None if self.world.is_first else True  # None: silent unless stderr is a terminal
        self.profiler.start()
        for step in tqdm(range(self.steps_done + 1, cfg.num_steps + 1), desc="GRPO", disable=is_silent):
            if self.should_stop():
                break
            started = synchronized_time(self.world.device)
            problems = self.choose_problems(step)
            self.reward_s = 0.0
            with self.saved_on_error():
                with self.engine_errors():
                    groups = pending.result() if pending else self.generate(problems, f"step {step}")
                data, metrics = self.score(step, problems, groups)
            sampled = synchronized_time(self.world.device)
            packed = self.pack(data)
            self_check_s = 0.0
            if packed.is_shared and not is_checked:
                self_check_s, is_checked = self.check_sharing(packed), True
            data, packed = self.score_policies(data, packed)  # old and reference log-probabilities
            scored = synchronized_time(self.world.device)
            if self.should_stop():
                break
            if cfg.async_steps and step < cfg.num_steps:  # sample the next step while this one trains
                pending = in_daemon_thread(partial(self.generate, self.choose_problems(step + 1), f"step {step + 1}"))
            if cfg.kl_in_reward:
                data, metrics["reward_kl"] = subtract_kl(data, cfg.kl_in_reward, self.world)
            advantages = episode_advantages(data, cfg.scale_rewards)
            self.log_samples(step, data, advantages)
            metrics |= packed.cost | self.update(step, data.rollouts, packed, advantages)
            metrics["lr"] = float(training.get_lr(self.optimizer))  # a tensor in torchao's optimizers
            self.lr_scheduler.step()
            finished = synchronized_time(self.world.device)
            seconds = {"sample_s": sampled - started - self.reward_s, "reward_s": self.reward_s}
            seconds |= {"logprobs_s": scored - sampled - self_check_s, "self_check_s": self_check_s}
            seconds |= {"train_s": finished - scored}

            self.steps_done = step
            if self.engine:
                wait([pending] if pending else [])  # its episodes are of one version of the weights
                waited = synchronized_time(self.world.device)
                seconds["sample_s"] += waited - finished
                with self.saved_on_error(metrics | seconds):
                    self.sync()
                seconds["sync_s"] = synchronized_time(self.world.device) - waited
            self.log(metrics | seconds)
            self.evaluate_if_due()
            is_best = cfg.keep_best_checkpoint and best_step(self.accuracies) == step
            if is_best or (cfg.checkpoint_every_n_steps and step % cfg.checkpoint_every_n_steps == 0):
                self.save_progress(self.checkpoint_dir)
            if step == 1 and self.world.is_first:
                self.plot(data)
            self.profiler.step()
        self.profiler.stop()
        if not self.is_finished():
            self.save_progress(self.checkpoint_dir)

    def generate(self, problems: list[int], purpose: str) -> list[list[Episode]]:
        """Sample a group of episodes for this rank's share of some problems; the purpose determines the seeds."""
        own = self.world.shard(range(len(problems)))
        seeds = [self.seed(f"samples {n} of {purpose}") for n in own]
        chosen = [problems[n] for n in own]
        prompts = [self.prompts[n] for n in chosen]
        return self.episodes([self.problems[n] for n in chosen], prompts, self.cfg.group_size, seeds)

    def score(self, step: int, problems: list[int], own: list[list[Episode]]) -> tuple[StepRollouts, dict[str, float]]:
        """Compute rewards, replace groups without spread if asked to, and build the step's rollouts, with metrics."""
        groups, scores = self.rewarded(problems, own)
        resampled = 0
        for attempt in range(1, self.cfg.max_resamplings + 1):  # DAPO's dynamic sampling
            spread = [bool(has_spread(own.total[None])) for own in scores]
            replacements = self.replacements(problems, spread.count(False), f"resampling {attempt} of step {step}")
            if not replacements:
                break
            resampled += len(replacements)
            with self.engine_errors():
                sampled = self.generate(replacements, f"resampling {attempt} of step {step}")
            flat = [n for n, has_some in enumerate(spread) if not has_some]
            new = zip(replacements, *self.rewarded(replacements, sampled), strict=True)
            for n, (number, group, own_scores) in zip(flat, new, strict=False):
                if has_spread(own_scores.total[None]):
                    problems[n], groups[n], scores[n] = number, group, own_scores
        self.scored = list(zip(problems, groups, scores, strict=True))  # for log_samples
        rewards = torch.stack([own.total for own in scores])  # [problems, G]
        data = build_rollouts(groups, rewards, self.world.device, with_logprobs=self.engine is not None)
        if self.cfg.mask_truncated_completions:
            is_finished = [episode.is_finished for group in groups for episode in group]
            counts = torch.tensor(is_finished, device=self.world.device)[data.episode]
            data = replace(data, rollouts=data.rollouts.keep_in_loss(counts))
        metrics = episode_metrics(groups, rewards) | reward_metrics(scores)
        return data, metrics | ({"groups_resampled": resampled} if self.cfg.max_resamplings else {})

    def rewarded(self, problems: list[int], own: list[list[Episode]]) -> tuple[list[list[Episode]], list[Scores]]:
        """Return the episodes of all ranks, in the order of the problems, and their rewards."""
        shard, size = self.world.shard(range(len(problems))), self.cfg.group_size
        with self.world.raise_together():
            completions = [
                completion_group(
                    self.tokenizer,
                    self.problems[problems[n]],
                    [episode.turns[-1].completion for episode in group],
                    first=n * size,
                )
                for n, group in zip(shard, own, strict=True)
            ]
            started = synchronized_time(self.world.device)
            scores = score(self.rewards, completions, self.reward_context()) if self.rewards else [None] * len(own)
            self.reward_s += synchronized_time(self.world.device) - started
        if self.environment:
            by_environment = [[episode.reward for episode in group] for group in own]
            scores = [add_environment(*both) for both in zip(scores, by_environment, strict=True)]
        cpu = [[episode.cpu() for episode in group] for group in own]
        gathered = self.world.all_gather(list(zip(cpu, scores, strict=True)))
        return [group for group, _ in gathered], [scored for _, scored in gathered]

    def pack(self, data: StepRollouts) -> PackedStep:
        """Cut the step into mini-batches, and these into micro-batches for every rank."""
        cfg, world, rollouts = self.cfg, self.world, data.rollouts
        minibatch = data.problem // self.prompts_per_minibatch  # [N]
        rows = [(minibatch == n).nonzero()[:, 0] for n in range(cfg.minibatches)]
        packed = [pack(rollouts, cfg.max_tokens, world_size=world.size, indices=own) for own in rows]
        is_shared = bool(cfg.sharing)
        if cfg.sharing == "auto":
            is_shared = flop_ratio(packed, self.shape) >= MIN_SPEEDUP
        if not is_shared:
            packed = [pack(rollouts, cfg.max_tokens, world_size=world.size, sharing=False, indices=own) for own in rows]
        keep_padding = cfg.compile or world.device.type != "cpu"
        cost = cost_metrics(packed, is_shared, self.shape, keep_padding)
        own = [[batch for batch in minibatch if batch.rank == world.rank] for minibatch in packed]
        return PackedStep(own, rows, is_shared, cost)

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
    def score_policies(self, data: StepRollouts, packed: PackedStep) -> tuple[StepRollouts, PackedStep]:
        """Add the old and the reference log-probabilities of this rank's rollouts, where the loss needs them."""
        cfg, tables = self.cfg, {}
        if cfg.num_iterations * cfg.minibatches > 1 or cfg.kl_in_reward:  # otherwise the old policy is the current one
            tables["old_logprobs"] = self.logprob_table(self.model, data.rollouts, packed)
        if self.needs_reference and self.is_lora:
            with self.library.without_adapters(self.model):
                tables["ref_logprobs"] = self.logprob_table(self.model, data.rollouts, packed)
        elif self.needs_reference:
            tables["ref_logprobs"] = self.logprob_table(self.reference, data.rollouts, packed)
        if not tables:
            return data, packed
        data = replace(data, rollouts=replace(data.rollouts, **tables))
        return data, self.pack(data)

    def update(self, step: int, rollouts: Rollouts, packed: PackedStep, advantages: Tensor) -> dict[str, float]:
        """Train on the step's rollouts, and return metrics averaged over the optimizer steps."""
        updates = []
        for _ in range(self.cfg.num_iterations):
            for rows, batches in zip(packed.rows, packed.minibatches, strict=True):
                totals = int(rollouts.loss_mask[rows].sum()), len(rows)
                updates.append(self.optimizer_step(step, batches, packed.is_shared, advantages, totals))
        names = dict.fromkeys(name for update in updates for name in update)
        columns = {name: [update[name] for update in updates if name in update] for name in names}
        return {name: sum(values) / len(values) for name, values in columns.items()}

    def optimizer_step(
        self, step: int, batches: list[MicroBatch], is_shared: bool, advantages: Tensor, totals: tuple[int, int]
    ) -> dict[str, float]:
        """Take one optimizer step; the losses of all micro-batches on all ranks sum to the mini-batch's loss."""
        cfg, sums, seen, largest = self.cfg, {"loss": 0.0}, [], {}
        total_tokens, total_rollouts = totals
        if total_tokens == 0:
            if self.world.is_first:
                tqdm.write(f"step {step}: a mini-batch is skipped, because all of its completions were truncated")
            return {"loss": 0.0, "grad_norm": 0.0}
        self.optimizer.zero_grad()
        with self.memory_hint("max_tokens", "or set activation_checkpointing=true"):
            for batch, logprobs, entropies in self.logprobs(self.model, batches, is_shared):
                metrics: dict[str, Tensor] = {}
                loss = self.loss(
                    logprobs,
                    advantages[batch.indices],
                    batch.loss_mask,
                    total_tokens=total_tokens,
                    total_rollouts=total_rollouts,
                    old_logprobs=batch.old_logprobs,
                    ref_logprobs=batch.ref_logprobs,
                    sampler_logprobs=batch.sampler_logprobs,
                    entropies=entropies,
                    metrics=metrics,
                )
                (loss * self.world.size).backward()  # FSDP averages gradients over ranks
                seen.append((batch, logprobs.detach(), loss.item()))
                weight = batch.rollouts.num_loss_tokens / total_tokens  # metrics are means over loss tokens
                metrics["entropy"] = entropies.detach().sum() / max(batch.rollouts.num_loss_tokens, 1)
                sums["loss"] += loss.item()
                if "sampler_ratio_max" in metrics:  # a maximum, unlike the others
                    ratio = metrics.pop("sampler_ratio_max").item()
                    largest["sampler_ratio_max"] = max(ratio, largest.get("sampler_ratio_max", 0.0))
                for name, mean in metrics.items():
                    sums[name] = sums.get(name, 0.0) + mean.item() * weight
        sums = self.world.all_reduce_sum(sums)
        sums |= {name: self.world.all_reduce_max(value) for name, value in largest.items()}
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
        options |= {"return_entropy": True, "entropy_grad": self.entropy_grad}
        if is_shared:
            yield from packed_logprobs(model, batches, **options)
        else:  # every sequence in full, for comparison
            for batch in batches:
                yield batch, *baseline_logprobs(model, batch.rollouts, **options)

    def logprob_table(self, model: nn.Module, rollouts: Rollouts, packed: PackedStep) -> Tensor:
        """Return log-probabilities [N, C] of this rank's rollouts, 0 for those of other ranks."""
        table = torch.zeros(rollouts.loss_mask.shape, device=self.world.device)
        with self.memory_hint("max_tokens"):
            for batches in packed.minibatches:
                for batch, logprobs, _ in self.logprobs(model, batches, packed.is_shared):
                    if not batch.is_idle:
                        table[batch.indices, : logprobs.shape[1]] = logprobs.float()
        return table

    def episodes(
        self, problems: list[Problem], prompts: list[Tensor], group_size: int, seeds: list[int] | None
    ) -> list[list[Episode]]:
        """Sample episodes of some problems; with `seeds=None` the most likely ones."""
        if self.environment is None:
            return single_turn_episodes(prompts, self.sample(prompts, group_size, seeds))

        def sample(prompts: list[Tensor], group_size: int, own: list[int]) -> Samples:
            return self.sample(prompts, group_size, own if seeds else None)

        return sample_dialogues(
            self.environment,
            sample,
            self.tokenizer,
            problems,
            prompts,
            group_size,
            seeds or [0] * len(prompts),
            prompt_format=self.cfg.prompt_format,
            max_prompt=self.max_length - self.sampling.max_new_tokens,
            # Under FSDP the ranks gather the weights together whenever one of them samples.
            world=None if self.engine else self.world,
        )

    def sample(self, prompts: list[Tensor], group_size: int, seeds: list[int] | None) -> Samples:
        """Sample completions; with `seeds=None` the most likely ones."""
        sampling = self.sampling if seeds else replace(self.sampling, temperature=0.0)
        if self.engine:
            return self.engine.sample(prompts, group_size, sampling, seeds) if prompts else NO_SAMPLES
        if not prompts:  # of this rank; the others may need its part of the weights
            self.sample([self.prompts[0][:1]], 1, None)
            return NO_SAMPLES
        # FSDP interrupts graphs, so the decoding step is compiled on one GPU only.
        compiled = self.cfg.compile and self.world.size == 1 and self.world.device.type == "cuda"
        with self.memory_hint("max_cache_tokens"):
            return flexpg.sample(
                self.model,
                prompts,
                group_size,
                sampling,
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

    def log_samples(self, step: int, data: StepRollouts, advantages: Tensor) -> None:
        """Show the best and the worst episode of two problems at step 1 and every `log_samples_every_n_steps` steps."""
        every, size = self.cfg.log_samples_every_n_steps, self.cfg.group_size
        if not (self.world.is_first and every and (step == 1 or step % every == 0)):
            return
        by_problem = advantages[data.first_turns].view(-1, size).tolist()
        samples = [
            sample
            for (number, episodes, scores), own in zip(self.scored[:2], by_problem, strict=False)
            for sample in best_and_worst(step, self.problems[number], episodes, scores, own, self.tokenizer)
        ]
        self.samples_log.write(samples, self.metric_logger)
        tqdm.write(format_samples(samples))

    def evaluate_if_due(self) -> None:
        """Evaluate before training, every `eval_every_n_steps` steps and at the end, unless that is done already."""
        is_due = self.steps_done % self.cfg.eval_every_n_steps == 0 or self.steps_done == self.cfg.num_steps
        if is_due and self.steps_done not in self.accuracies:
            with self.saved_on_error():
                self.evaluate()

    def evaluate(self) -> None:
        """Compute the mean `test_reward` of the most likely completion of every test problem."""
        own = self.world.shard(range(len(self.test_prompts)))
        problems = [self.test_problems[n] for n in own]
        with self.engine_errors():
            groups = self.episodes(problems, [self.test_prompts[n] for n in own], 1, None)
        rewards = [episode.reward for (episode,) in groups]
        if self.test_reward:
            with self.world.raise_together():
                completions = [
                    completion_group(self.tokenizer, problem, [episode.turns[-1].completion], first=n)
                    for n, problem, (episode,) in zip(own, problems, groups, strict=True)
                ]
                scores = score(self.test_reward, completions, self.reward_context())
                rewards = [scored.total.item() for scored in scores]
        rewards = self.world.all_gather(rewards)
        self.accuracies[self.steps_done] = sum(rewards) / len(rewards)
        if self.world.is_first:
            self.metric_logger.log("held_out_accuracy", self.accuracies[self.steps_done], step=self.steps_done)
            tqdm.write(format_eval(self.history, self.accuracies))

    def sync(self) -> None:
        """Load the current weights into the engine, and compare its log-probabilities with the trainer's."""
        folder = self.output_dir / "engine"
        self.save_weights(folder)
        self.world.barrier()
        with self.world.raise_on_all_ranks(OSError, RuntimeError, ValueError):
            if self.world.is_first or not self.engine.is_shared:
                self.engine.load_weights(folder / "epoch_0", self.steps_done)
                if self.engine.version != self.steps_done:
                    raise RuntimeError(f"the sampler must have version {self.steps_done}, got {self.engine.version}")
        self.check_engine()

    @torch.no_grad()
    def check_engine(self) -> None:
        """Raise if the engine does not sample from the weights that are trained."""

        def logprobs_of(rollouts: Rollouts) -> Tensor:
            packed = pack(rollouts, self.cfg.max_tokens)
            return next(logprobs for _, logprobs, _ in self.logprobs(self.model, packed, is_shared=True))

        check_engine(self.engine, self.prompts[0], self.sampling, logprobs_of, self.world, self.dtype)

    def engine_errors(self) -> AbstractContextManager[None]:
        """Return a context that raises errors of sampling on all ranks together, as far as these can meet.

        An engine samples outside collectives. The model itself gathers its weights under FSDP, where other ranks would
        wait for one that has failed: then only its environments' errors are raised together (see `sample_dialogues`).
        """
        return self.world.raise_together() if self.engine else nullcontext()

    @contextmanager
    def saved_on_error(self, metrics: dict[str, float] | None = None) -> Iterator[None]:
        """Save progress if a reward, an environment or an engine fails on any rank, and raise the rank's own error.

        An error that only its own rank knows of ends the run without saving, because the others are in a collective.

        Args:
            metrics: Of the step that is done, if they are not yet logged.
        """
        own: BaseException | None = None
        try:
            yield
        except Exception as error:
            own = error
            if isinstance(error, RankError) or self.world.size == 1:
                if metrics:
                    self.log(metrics)
                self.save_progress(self.checkpoint_dir)
                if self.world.is_first:
                    print(f"the run is saved after step {self.steps_done}; resume=true continues from there")
        if own is not None:  # not in the handler, where it would get another context
            raise (own.__cause__ or own) if isinstance(own, RankError) else own

    def save_progress(self, folder: Path) -> None:
        """Save what `resume` needs, atomically."""
        progress = {
            "steps_done": self.steps_done,
            "history": self.history,
            "accuracies": list(self.accuracies.items()),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "options": {name: OmegaConf.to_container(self.cfg)[name] for name in SAME_ON_RESUME},
        }
        best = best_step(self.accuracies) if self.cfg.keep_best_checkpoint else None
        save_checkpoint(
            folder,
            self.steps_done,
            self.model,
            self.optimizer,
            progress,
            self.cfg.keep_last_n_checkpoints,
            self.world,
            best_step=best,
            save_weights=self.save_weights if self.cfg.save_weights == "every_checkpoint" else None,
        )

    def save_checkpoint(self) -> None:
        """Save the trained weights in the format that they were loaded from, over those of an earlier run."""
        replace_weights(self.library.weights_folder(self.cfg), self.save_weights, self.world)

    def save_weights(self, folder: Path) -> None:
        """Write the trained weights in the format that they were loaded from."""
        self.library.save_weights(self.model, self.cfg, self.source, self.world, folder)

    def plot(self, data: StepRollouts) -> None:
        """Plot the mask of the first problems, and what sharing saves."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        plot_mask(first_problems(data, 2)).savefig(self.output_dir / "mask.png", dpi=200)
        plot_savings(data.rollouts).savefig(self.output_dir / "savings.png", dpi=200)

    def report(self) -> None:
        """Print what was learned and what sharing saved, and plot the reward."""
        if self.world.is_first:
            print(format_summary(self.history, self.accuracies))
            rewards = [metrics["reward"] for metrics in self.history]
            plot_reward(rewards, self.accuracies).savefig(self.output_dir / "reward.png", dpi=200)
            print(f"{'plots':<20}{self.output_dir}/{{reward,mask,savings}}.png")
            print(f"{'weights':<20}{self.library.weights_folder(self.cfg)}/epoch_0")

    def write_report(self) -> None:
        """Write report.html, of a finished or of a stopped run."""
        if self.world.is_first:
            print(f"{'report':<20}{write_report(self.output_dir, self.cfg, self.history, self.accuracies)}")

    def cleanup(self) -> None:
        """Close the log and leave the process group."""
        if self.world.is_first:
            self.metric_logger.close()
        if self.engine:
            self.engine.close()
        self.world.shutdown()

    # ---- Details -----------------------------------------------------------------------------------------------------

    def replacements(self, problems: list[int], count: int, purpose: str) -> list[int]:
        """Return the numbers of at most `count` other problems."""
        generator = torch.Generator().manual_seed(self.seed(purpose))
        order = torch.randperm(len(self.problems), generator=generator).tolist()
        return [number for number in order if number not in problems][:count]

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


@parse_config
def recipe_main(cfg: GRPOConfig) -> None:
    """GRPO with every group's prompt encoded once. Options: flexpg/training/config.py."""
    try:
        recipe = GRPORecipe(cfg)
        recipe.setup()
    except SETUP_ERRORS as error:
        sys.exit(f"error: {one_line(error)}")
    if cfg.eval_only:
        recipe.evaluate()
        return recipe.cleanup()
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
    recipe.write_report()
    recipe.cleanup()
    if not recipe.is_finished():
        sys.exit(128 + recipe.stop_signal)


if __name__ == "__main__":
    recipe_main()
