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
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
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
from flexpg.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from flexpg.training.components import component
from flexpg.training.config import (
    SETUP_ERRORS,
    GRPOConfig,
    build_loss,
    device_and_dtypes,
    parse_config,
    sampling_params,
)
from flexpg.training.dialogues import sample_dialogues
from flexpg.training.distributed import World
from flexpg.training.engines import check_engine, limit_length, load_into_engine
from flexpg.training.environments import build_environment, longest_episode
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
from flexpg.training.lr_schedule import build_lr_scheduler, lr_scheduler_errors
from flexpg.training.metrics import (
    UpdateMetrics,
    best_step,
    episode_metrics,
    format_eval,
    format_summary,
    has_spread,
    mean_metrics,
    peak_memory_gib,
    rates,
)
from flexpg.training.models import build_model, library_of, replace_weights
from flexpg.training.nonfinite import abort_nonfinite
from flexpg.training.offloading import offload_activations
from flexpg.training.packed_step import PackedStep, batches_to_check, check_minibatches, pack_step
from flexpg.training.problem_order import ProblemOrder, derive_seed
from flexpg.training.prompts import build_problems, completion_groups, shown_prompt, tokenize_problems
from flexpg.training.resume import lock_output_dir, newest_checkpoint, read_own_progress, same_options
from flexpg.training.reward_calls import Run, TrainerState
from flexpg.training.rewards import Scores, add_environment, build_rewards, reward_metrics, score, unused_rewards
from flexpg.training.run_report import write_report
from flexpg.training.samples_log import SamplesLog, format_samples, samples_of_step
from flexpg.training.step_clock import StepClock
from flexpg.training.stop_request import StopRequest
from flexpg.training.tasks import Problem
from flexpg.verify import baseline_logprobs

NO_SAMPLES = Samples([], torch.zeros(0, 0), torch.zeros(0, dtype=torch.bool))


class GRPORecipe(FTRecipeInterface):
    """Sample, score, update."""

    def __init__(self, cfg: GRPOConfig) -> None:
        self.cfg = cfg
        device, self.dtype, self.param_dtype = device_and_dtypes(cfg)
        self.autocast_dtype = None if self.dtype == self.param_dtype else self.dtype
        self.world = World.init(device, cfg.context_parallel)
        check_minibatches(cfg, self.world)
        self.output_dir = Path(cfg.output_dir)
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.clock = StepClock(device)  # of the current step
        self.stop = StopRequest(self.world)
        utils.get_logger().addFilter(lambda record: record.levelno >= logging.WARNING)  # torchtune's progress messages
        # torchtune's RMSNorm computes in float32; torch warns where its weight, frozen or not, is bf16.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")

    # ---- Setup -------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Create every component, and find mistakes before anything is trained or written."""
        cfg, world = self.cfg, self.world
        self.tokenizer = component(cfg, "tokenizer")
        self.sampling = sampling_params(cfg, self.tokenizer.stop_tokens)
        self.problems, self.test_problems = build_problems(cfg, "train_problems"), build_problems(cfg, "test_problems")
        self.environment = build_environment(cfg.environment) if cfg.environment else None
        self.rewards = build_rewards(cfg.rewards, self.problems) if cfg.rewards else []
        self.test_reward = []  # the environment's reward
        if cfg.test_reward:
            self.test_reward = build_rewards({"test_reward": cfg.test_reward}, self.test_problems)
        self.model = build_model(cfg, self.dtype, self.param_dtype)
        self.library = library_of(self.model)  # torchtune or transformers
        self.is_lora = self.library.has_adapters(self.model)
        self.shape = self.library.shape_of(self.model)
        tokenize = partial(tokenize_problems, cfg, self.tokenizer, self.model, device=world.device)
        self.prompts = tokenize("train_problems", self.problems, at_least=cfg.prompts_per_step)
        self.test_prompts = tokenize("test_problems", self.test_problems, at_least=world.size)
        self.order = ProblemOrder(cfg.seed, len(self.problems))
        first_turn = max(map(len, self.prompts + self.test_prompts)) + self.sampling.max_new_tokens
        self.max_length = first_turn  # of an episode
        if self.environment:
            budget = min(cfg.max_tokens, cfg.max_cache_tokens)
            of_model = self.library.max_length(self.model)
            self.max_length = longest_episode(self.environment, first_turn, budget, of_model)
        earlier = newest_checkpoint(cfg, self.checkpoint_dir, self.library.weights_folder(cfg) / "epoch_0", world)

        self.source, weights = self.library.load_weights(cfg, self.model) if world.is_first else (None, {})
        load = partial(self.library.materialize, weights=weights, world=world, seed=cfg.seed, compile=cfg.compile)
        self.model = flexpg.enable(load(self.model, activation_checkpointing=cfg.activation_checkpointing))
        self.loss = build_loss(cfg)
        self.needs_reference = cfg.loss.get("beta", 0.0) > 0 or cfg.kl_in_reward > 0
        self.entropy_grad = cfg.loss.get("entropy_coef", 0.0) != 0 or "_component_" in cfg.loss
        self.reference = None  # with LoRA, the reference is the model without its adapters
        if self.needs_reference and not (self.is_lora or cfg.eval_only):
            self.reference = flexpg.enable(load(build_model(cfg, self.dtype, self.dtype).requires_grad_(False)))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = component(cfg, "optimizer", self.trained)
        self.lr_scheduler = build_lr_scheduler(cfg, self.optimizer)

        self.lock = lock_output_dir(cfg, self.checkpoint_dir, earlier, world)  # of this run, until it ends
        self.same = same_options(cfg, train_problems=self.problems, test_problems=self.test_problems)
        self.steps_done, self.history, self.accuracies = 0, [], {}
        if cfg.resume and earlier:
            self.resume(earlier)
        self.engine = component(cfg, "sampler") if cfg.sampler else None  # None: flexpg.sample, from the model itself
        if cfg.async_steps and not (self.engine and self.engine.is_shared):
            raise ValueError("async_steps needs a sampler that is a server: the model itself is training meanwhile")
        if self.engine:
            needed = (self.environment and self.environment.max_length) or first_turn
            self.max_length = limit_length(self.engine, needed, self.max_length)
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
                counts = (sum(map(Tensor.numel, parameters)) for parameters in (self.trained, self.model.parameters()))
                print("training {:,} of {:,} parameters".format(*counts))
                if cfg.prompt_format == "chat":
                    print(f"first prompt: {shown_prompt(self.tokenizer, self.prompts[0].tolist())!r}")
                self.metric_logger.log_config(cfg)
                self.samples_log = SamplesLog(self.output_dir / "samples.jsonl", self.steps_done)

    def resume(self, checkpoint: Path) -> None:
        """Load a checkpoint of the same run."""
        progress = read_own_progress(checkpoint, self.cfg, self.same)
        load_checkpoint(checkpoint, self.model, self.optimizer, self.world)
        self.steps_done, self.history = progress["steps_done"], progress["history"]
        self.accuracies = dict(progress["accuracies"])
        self.lr_scheduler.load_state_dict(progress["lr_scheduler"])

    # ---- Training ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train until `num_steps` or a signal, with evaluations at the start, every few steps and at the end."""
        cfg = self.cfg
        self.stop.listen(signal.SIGTERM)
        if cfg.checkpoint_every_n_steps:  # without checkpoints, Ctrl-C ends the run at once
            self.stop.listen(signal.SIGINT)
        self.evaluate_if_due()
        is_checked = not cfg.self_check
        pending: Future[list[list[Episode]]] | None = None
        is_silent = None if self.world.is_first else True  # None: silent unless stderr is a terminal
        self.profiler.start()
        for step in tqdm(range(self.steps_done + 1, cfg.num_steps + 1), desc="GRPO", disable=is_silent):
            if self.stop.is_made():
                break
            self.clock = StepClock(self.world.device)
            problems = self.order.of_step(step, cfg.prompts_per_step)
            with self.saved_on_error():
                with self.sampling_errors():
                    groups = pending.result() if pending else self.generate(problems, f"step {step}")
                data, metrics = self.score(step, problems, groups)
            self.clock.lap("sample_s")
            packed = pack_step(data, cfg, self.world, self.shape)
            self.clock.lap("logprobs_s")
            if packed.is_shared and not is_checked:
                self.check_sharing(packed)
                is_checked = True
                self.clock.lap("self_check_s")
            data, packed = self.score_policies(data, packed)  # old and reference log-probabilities
            self.clock.lap("logprobs_s")
            if self.stop.is_made():
                break
            if cfg.async_steps and step < cfg.num_steps:  # sample the next step while this one trains
                following = self.order.of_step(step + 1, cfg.prompts_per_step)
                pending = in_daemon_thread(partial(self.generate, following, f"step {step + 1}"))
            if cfg.kl_in_reward:
                data, metrics["reward_kl"] = subtract_kl(data, cfg.kl_in_reward, self.world)
            advantages = episode_advantages(data, cfg.scale_rewards)
            self.log_samples(step, data, advantages)
            metrics |= packed.cost | self.update(step, data.rollouts, packed, advantages)
            metrics["lr"] = float(training.get_lr(self.optimizer))  # a tensor in torchao's optimizers
            self.clock.lap("train_s")
            self.steps_done = step
            with self.saved_on_error(metrics | self.clock.seconds), lr_scheduler_errors(self.world):
                self.lr_scheduler.step()
            if self.engine:
                wait([pending] if pending else [])  # its episodes are of one version of the weights
                self.clock.lap("sample_s")
                with self.saved_on_error(metrics | self.clock.seconds):
                    self.sync()
                self.clock.lap("sync_s")
            self.log(metrics | self.clock.seconds)
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
        mine = self.world.shard(range(len(problems)))
        seeds = [derive_seed(self.cfg.seed, f"samples {n} of {purpose}") for n in mine]
        chosen = [problems[n] for n in mine]
        prompts = [self.prompts[n] for n in chosen]
        return self.episodes([self.problems[n] for n in chosen], prompts, self.cfg.group_size, seeds)

    def score(
        self, step: int, problems: list[int], episodes: list[list[Episode]]
    ) -> tuple[StepRollouts, dict[str, float]]:
        """Compute rewards, replace groups without spread if asked to, and build the step's rollouts, with metrics."""
        groups, scores = self.rewarded(problems, episodes)
        resampled = 0
        for attempt in range(1, self.cfg.max_resamplings + 1):  # DAPO's dynamic sampling
            spread = [bool(has_spread(group.total[None])) for group in scores]
            purpose = f"resampling {attempt} of step {step}"
            replacements = self.order.replacements(problems, spread.count(False), purpose)
            if not replacements:
                break
            resampled += len(replacements)
            with self.sampling_errors():
                sampled = self.generate(replacements, purpose)
            flat = [n for n, has_some in enumerate(spread) if not has_some]
            new = zip(replacements, *self.rewarded(replacements, sampled), strict=True)
            for n, (number, group, own_scores) in zip(flat, new, strict=False):
                if has_spread(own_scores.total[None]):
                    problems[n], groups[n], scores[n] = number, group, own_scores
        self.scored = list(zip([self.problems[n] for n in problems], groups, scores, strict=True))  # for log_samples
        rewards = torch.stack([group.total for group in scores])  # [problems, G] float64
        data = build_rollouts(groups, rewards, self.world.device, with_logprobs=self.engine is not None)
        if self.cfg.mask_truncated_completions:
            is_finished = [episode.is_finished for group in groups for episode in group]
            counts = torch.tensor(is_finished, device=self.world.device)[data.episode]
            data = replace(data, rollouts=data.rollouts.keep_in_loss(counts))
        if step == 1 and self.world.is_first:
            for name in unused_rewards(scores):  # often a function without `return`
                tqdm.write(f"warning: reward {name!r} returned None for every rollout of step 1, so it does not count")
        metrics = episode_metrics(groups, rewards) | reward_metrics(scores)
        return data, metrics | ({"groups_resampled": resampled} if self.cfg.max_resamplings else {})

    def rewarded(self, problems: list[int], episodes: list[list[Episode]]) -> tuple[list[list[Episode]], list[Scores]]:
        """Return the episodes of all ranks, in the order of the problems, and their rewards."""
        self.clock.lap("sample_s")
        with self.world.raise_together():
            shard = self.world.shard(range(len(problems)))
            own_problems, first = [self.problems[problems[n]] for n in shard], [n * self.cfg.group_size for n in shard]
            completions = completion_groups(self.tokenizer, own_problems, episodes, first)
            scores = score(self.rewards, completions, self.reward_context()) if self.rewards else [None] * len(episodes)
            self.clock.lap("reward_s")
        if self.environment:
            by_environment = [[episode.reward for episode in group] for group in episodes]
            scores = [add_environment(*both) for both in zip(scores, by_environment, strict=True)]
        cpu = [[episode.cpu() for episode in group] for group in episodes]
        gathered = self.world.all_gather(list(zip(cpu, scores, strict=True)))
        return [group for group, _ in gathered], [scored for _, scored in gathered]

    def check_sharing(self, packed: PackedStep) -> None:
        """Verify that sharing is exact on these rollouts."""
        with self.memory_hint("max_tokens"):
            result = self_check(
                self.model,
                batches_to_check(packed.minibatches[0], self.cfg.max_tokens, self.world.context_size),
                temperature=self.sampling.temperature,
                autocast_dtype=self.autocast_dtype,
            )
        if self.world.is_first:
            tqdm.write(str(result))

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
        return data, pack_step(data, cfg, self.world, self.shape)

    def update(self, step: int, rollouts: Rollouts, packed: PackedStep, advantages: Tensor) -> dict[str, float]:
        """Train on the step's rollouts, and return metrics averaged over the optimizer steps."""
        updates = []
        for _ in range(self.cfg.num_iterations):
            for rows, batches in zip(packed.rows, packed.minibatches, strict=True):
                totals = int(rollouts.loss_mask[rows].sum()), len(rows)
                updates.append(self.optimizer_step(step, batches, packed.is_shared, advantages, totals))
        return mean_metrics(updates)

    def optimizer_step(
        self, step: int, batches: list[MicroBatch], is_shared: bool, advantages: Tensor, totals: tuple[int, int]
    ) -> dict[str, float]:
        """Take one optimizer step; the losses of all micro-batches on all ranks sum to the mini-batch's loss."""
        total_tokens, total_rollouts = totals
        if total_tokens == 0:
            if self.world.is_first:
                tqdm.write(f"step {step}: a mini-batch is skipped, because all of its completions were truncated")
            return {"loss": 0.0, "grad_norm": 0.0}
        summed, seen = UpdateMetrics(total_tokens), []
        self.optimizer.zero_grad()
        offload = offload_activations(self.world.device) if self.cfg.activation_offloading else nullcontext()
        with offload, self.memory_hint("max_tokens", "or set activation_checkpointing=true"):
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
                (loss * self.world.data_size).backward()  # FSDP averages gradients over data ranks
                seen.append((batch, logprobs.detach(), loss.item()))
                summed.add(batch, loss, entropies, metrics)
        sums = summed.of_all_ranks(self.world)
        grad_norm = get_total_norm([parameter.grad for parameter in self.trained if parameter.grad is not None])
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        if not (math.isfinite(sums["loss"]) and math.isfinite(grad_norm)):
            what, folder = f"step {step}: loss {sums['loss']}, gradient norm {grad_norm}", self.output_dir / "nonfinite"
            abort_nonfinite(what, self.model, seen, advantages, folder, self.save_progress, self.world)
        clip_grads_with_norm_(self.trained, self.cfg.clip_grad_norm, grad_norm)
        self.optimizer.step()
        return sums | {"grad_norm": grad_norm.item()}

    def logprobs(
        self, model: nn.Module, batches: list[MicroBatch], is_shared: bool
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """Iterate over micro-batches with log-probabilities and entropies [n, C]; call backward inside the loop."""
        options = {"temperature": self.sampling.temperature, "autocast_dtype": self.autocast_dtype}
        options |= {"return_entropy": True, "entropy_grad": self.entropy_grad}
        if is_shared:
            yield from packed_logprobs(model, batches, context_parallel=self.world.context, **options)
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

        def sample(prompts: list[Tensor], group_size: int, mine: list[int]) -> Samples:
            return self.sample(prompts, group_size, mine if seeds else None)

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
        every = self.cfg.log_samples_every_n_steps
        if self.world.is_first and every and (step == 1 or step % every == 0):
            by_problem = advantages[data.first_turns].view(-1, self.cfg.group_size)
            samples = samples_of_step(step, self.scored, by_problem, self.tokenizer)
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
        mine = self.world.shard(range(len(self.test_prompts)))
        problems = [self.test_problems[n] for n in mine]
        with self.sampling_errors():
            groups = self.episodes(problems, [self.test_prompts[n] for n in mine], 1, None)
        rewards = [episode.reward for (episode,) in groups]
        if self.test_reward:
            with self.world.raise_together():
                completions = completion_groups(self.tokenizer, problems, groups, first=mine)
                scores = score(self.test_reward, completions, self.reward_context())
                rewards = [scored.total.item() for scored in scores]
        rewards = self.world.all_gather(rewards)
        self.accuracies[self.steps_done] = sum(rewards) / len(rewards)
        if self.world.is_first:
            self.metric_logger.log("held_out_accuracy", self.accuracies[self.steps_done], step=self.steps_done)
            tqdm.write(format_eval([] if self.cfg.eval_only else self.history, self.accuracies))

    def sync(self) -> None:
        """Load the current weights into the engine, and compare its log-probabilities with the trainer's."""
        folder = self.output_dir / "engine"
        self.save_weights(folder)
        load_into_engine(self.engine, folder / "epoch_0", self.steps_done, self.world)
        self.check_engine()

    @torch.no_grad()
    def check_engine(self) -> None:
        """Raise if the engine does not sample from the weights that are trained."""

        def logprobs_of(rollouts: Rollouts) -> Tensor:
            packed = pack(rollouts, self.cfg.max_tokens)
            options = {"autocast_dtype": self.autocast_dtype, "temperature": self.sampling.temperature}
            return next(logprobs for _, logprobs in packed_logprobs(self.model, packed, **options))

        check_engine(self.engine, self.prompts[0], self.sampling, logprobs_of, self.world, self.dtype)

    def sampling_errors(self) -> AbstractContextManager[None]:
        """Return a context in which an error of sampling is raised on all ranks, if an engine samples.

        The model itself gathers its weights under FSDP, so that a rank that fails leaves the others in a collective.
        Then `sample_dialogues` raises the errors of environments, which are outside collectives, on all ranks.
        """
        return self.world.raise_together() if self.engine else nullcontext()

    def saved_on_error(self, metrics: dict[str, float] | None = None) -> AbstractContextManager[None]:
        """Return a context that saves progress if a reward, an environment or an engine fails on any rank.

        Args:
            metrics: The metrics of the step that is done, if they are not yet logged.
        """

        def save() -> None:
            if not self.steps_done:
                return  # the run may start again as it is
            if metrics:
                self.log(metrics)
            self.save_progress(self.checkpoint_dir)
            if self.world.is_first:
                print(f"the run is saved after step {self.steps_done}; resume=true continues from there")

        return self.world.save_on_error(save)

    def save_progress(self, folder: Path) -> None:
        """Save what `resume` needs, atomically."""
        progress = {
            "steps_done": self.steps_done,
            "history": self.history,
            "accuracies": list(self.accuracies.items()),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "options": self.same,
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
        save_progress = partial(self.save_progress, self.checkpoint_dir)
        replace_weights(self.library.weights_folder(self.cfg), self.save_weights, save_progress, self.world)

    def save_weights(self, folder: Path) -> None:
        """Write the trained weights in the format that they were loaded from."""
        self.library.save_weights(self.model, self.cfg, self.source, self.world, folder)

    def plot(self, data: StepRollouts) -> None:
        """Plot the mask of the first problems, and what sharing saves."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        plot_mask(first_problems(data, 2)).savefig(self.output_dir / "mask.png", dpi=200)
        plot_savings(data.rollouts).savefig(self.output_dir / "savings.png", dpi=200)

    def report(self) -> None:
        """Write report.html and plot the reward; of a finished run, print what was learned and what sharing saved."""
        if not self.world.is_first:
            return
        if self.is_finished():
            print(format_summary(self.history, self.accuracies))
            print(f"{'weights':<20}{self.library.weights_folder(self.cfg)}/epoch_0")
        if self.history:
            rewards = [metrics["reward"] for metrics in self.history]
            plot_reward(rewards, self.accuracies).savefig(self.output_dir / "reward.png", dpi=200)
            print(f"{'plots':<20}{self.output_dir}/{{reward,mask,savings}}.png")
        print(f"{'report':<20}{write_report(self.output_dir, self.cfg, self.history, self.accuracies)}")

    def cleanup(self) -> None:
        """Close the log and leave the process group."""
        if self.world.is_first:
            self.metric_logger.close()
        if self.engine:
            self.engine.close()
        self.world.shutdown()

    # ---- Details -----------------------------------------------------------------------------------------------------

    def reward_context(self) -> Run:
        """Return what reward functions can ask for besides completions and problems."""
        state = TrainerState(global_step=self.steps_done, max_steps=self.cfg.num_steps)
        return Run(self.tokenizer, is_chat=self.cfg.prompt_format == "chat", trainer_state=state)

    def is_finished(self) -> bool:
        """Return whether all steps and the last evaluation are done."""
        return self.steps_done == self.cfg.num_steps and self.steps_done in self.accuracies

    def memory_hint(self, budget: str, otherwise: str = "") -> AbstractContextManager[None]:
        """Print which option to lower above the traceback of an out-of-memory error."""
        return out_of_memory_hint(f"lower {budget} (now {self.cfg[budget]}) {otherwise}".rstrip())


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
    if recipe.world.is_first and not recipe.is_finished():
        print(f"stopped after step {recipe.steps_done} of {cfg.num_steps}; resume=true continues from there")
    recipe.report()
    recipe.cleanup()
    if not recipe.is_finished():
        sys.exit(128 + recipe.stop.number)


if __name__ == "__main__":
    recipe_main()
