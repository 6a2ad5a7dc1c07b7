"""Configuration of the GRPO recipe: options with defaults, from a YAML and the command line, and their components.

A YAML holds what differs from the defaults below. A component is a mapping with a `_component_`, the dotpath of a class
or function, and its arguments, as in torchtune.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torchtune import config, training, utils
from torchtune.config._errors import InstantiationError
from yaml import YAMLError  # type: ignore[import-untyped]

from flexpg.advantages import ScaleRewards
from flexpg.losses import ImportanceSamplingLevel, ImportanceSamplingMode, LossType, grpo_loss
from flexpg.sampling import SamplingParams
from flexpg.training.dotpaths import load_dotpath
from flexpg.training.errors import one_line

Component = dict[str, Any]
# What a mistake in the configuration, the data or a checkpoint raises before training: reported in one line.
SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, InstantiationError, OmegaConfBaseException)


@dataclass
class SamplingConfig:
    """How completions are sampled; see `flexpg.SamplingParams`. Stop tokens are the tokenizer's."""

    max_new_tokens: int = MISSING
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


@dataclass
class LossConfig:
    """Options of `flexpg.grpo_loss`."""

    loss_type: LossType = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = 0.28  # for cispo the largest ratio itself, such as 5.0
    delta: float | None = None  # upper limit of the ratio where the advantage is negative
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    entropy_coef: float = 0.0  # above 0 rewards entropy
    beta: float = 0.0  # above 0 needs a reference: a frozen copy of the model, or with LoRA the model without adapters
    importance_sampling_level: ImportanceSamplingLevel = "token"
    importance_sampling_mode: ImportanceSamplingMode = "sequence_mask"  # these three correct for another sampler
    importance_sampling_clip_min: float | None = None
    importance_sampling_clip_max: float | None = 3.0


@dataclass
class GRPOConfig:
    """All options of recipes/grpo.py, with their defaults."""

    # Model and data
    tokenizer: Component = MISSING
    model: Component = MISSING  # flexpg.training.causal_lm.model, or a builder of a torchtune TransformerDecoder
    checkpointer: Component | None = None  # of a torchtune model: loads the weights, and saves in the same format
    train_problems: Component = MISSING  # returns a list of flexpg.training.tasks.Problem
    test_problems: Component = MISSING
    prompt_format: Literal["plain", "bos", "chat"] = "chat"
    rewards: dict[str, Component] = field(default_factory=dict)  # name: {_component_: ..., weight: 1.0, arguments}
    test_reward: Component | None = None  # its mean over test_problems is the held-out accuracy
    environment: Component | None = None  # answers between turns, and gives rewards of its own; see docs/agents.md

    # Devices and precision
    device: str = "cuda"
    dtype: Literal["fp32", "bf16"] = "bf16"  # of the computation
    param_dtype: Literal["fp32", "bf16"] = "fp32"  # of trained parameters and optimizer state; frozen ones have dtype
    compile: bool = False
    activation_checkpointing: bool = True  # less memory for a second forward
    activation_offloading: bool = False  # activations are in main memory until the backward
    seed: int = 0

    # A step: `group_size` completions per prompt, then `num_iterations` passes in `minibatches` optimizer steps each
    num_steps: int = 200
    prompts_per_step: int = 32
    group_size: int = 16
    num_iterations: int = 1
    minibatches: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampler: Component | None = None  # None: from the model itself; or an engine, flexpg.integrations.vllm.engine
    async_steps: int = 0  # 1: a server samples the next step while this one trains, from weights one update older
    max_resamplings: int = 0  # how often groups whose rewards are equal are replaced by other problems' (DAPO)
    max_cache_tokens: int = 65536  # tokens whose keys and values are stored at a time while sampling
    max_tokens: int = 16384  # of a micro-batch of one rank; micro-batches accumulate gradients exactly
    context_parallel: int = 1  # ranks that share a micro-batch, for prompts that one cannot hold; see docs/scaling.md
    sharing: Literal["auto", True, False] = "auto"  # encode prompts once; "auto": if the cost model says that it pays
    self_check: bool = True  # verify that shared equals baseline before the first update (a few seconds)

    # Update
    scale_rewards: ScaleRewards = "group"
    mask_truncated_completions: bool = False  # leave truncated completions out of the loss; their rewards count
    kl_in_reward: float = 0.0  # this times the KL divergence from the reference is subtracted from rewards
    loss: Any = field(default_factory=LossConfig)  # or {_component_: my.loss, ...}, called as grpo_loss is
    optimizer: Component = field(
        default_factory=lambda: {"_component_": "torch.optim.AdamW", "lr": 1e-6, "weight_decay": 0.0}
    )
    lr_scheduler: Component = field(  # one step per GRPO step
        default_factory=lambda: {"_component_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0}
    )
    clip_grad_norm: float = 1.0  # .inf for no clipping

    # Evaluation, checkpoints and logs
    output_dir: str = MISSING
    eval_every_n_steps: int = 20
    checkpoint_every_n_steps: int = 0  # 0 for no checkpoints
    keep_last_n_checkpoints: int = 2
    keep_best_checkpoint: bool = False  # also save at every evaluation that is the best so far, and keep the best one
    save_weights: Literal["end", "every_checkpoint"] = "end"  # when to save weights that from_pretrained loads
    resume: bool = False  # from the newest checkpoint in output_dir, or from scratch if there is none
    eval_only: bool = False  # evaluate the weights, or with `resume` the newest checkpoint, once, and end
    log_samples_every_n_steps: int = 10  # and at step 1: rollouts of two problems to read; 0 for never
    metric_logger: Component = field(
        default_factory=lambda: {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
        }
    )
    profiler: Component = field(
        default_factory=lambda: {
            "_component_": "torchtune.training.setup_torch_profiler",
            "enabled": False,
            "output_dir": "${output_dir}/profiler",
        }
    )


COMPONENTS = (
    *("tokenizer", "model", "checkpointer", "train_problems", "test_problems", "test_reward"),
    *("optimizer", "lr_scheduler", "metric_logger", "sampler", "environment", "profiler"),
)
OPTIONAL = ("test_reward", "sampler", "environment")  # components that may be null


def parse_config(recipe_main: Callable[[Any], None]) -> Callable[[], None]:
    """Call a recipe's main function with the configuration of the command line: a GRPOConfig.

    It is torchtune's `config.parse`, except that mistakes in the command line or in the file are reported in one line
    instead of a traceback.

    Args:
        recipe_main: Takes the configuration; its docstring is the help text.
    """

    @wraps(recipe_main)
    def main() -> None:
        parsed: list[DictConfig] = []

        @config.parse
        @wraps(recipe_main)
        def keep(cfg: DictConfig) -> None:
            parsed.append(cfg)

        try:
            keep()
        except SystemExit:  # torchtune exits after `keep`; before it, argparse has reported an error
            if not parsed:
                raise
        except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as error:
            text = one_line(error)
            hint = "; a component cannot be removed: of a reward, set weight=0" if "to remove" in text else ""
            sys.exit(f"error: {text}{hint}")
        except TypeError:  # torchtune passes the file's options on as keywords
            sys.exit("error: --config must be a YAML mapping")
        try:
            cfg = load_config(parsed[0])
        except ValueError as error:
            sys.exit(f"error: {one_line(error)}")
        recipe_main(cfg)

    return main


def load_config(given: DictConfig) -> Any:
    """Merge options into the defaults of GRPOConfig and validate them.

    A component that names its `_component_` replaces the default as a whole.

    Args:
        given: Options of the YAML and the command line.

    Returns:
        A resolved DictConfig with the fields of GRPOConfig, in which paths have no leading `~`.

    Raises:
        ValueError: If an option is unknown, missing, of the wrong type or out of range.
    """
    schema = OmegaConf.structured(GRPOConfig)
    options: Any = OmegaConf.to_container(given)
    for name, value in options.items():  # OmegaConf's errors would not name these options
        if name in (*COMPONENTS, "rewards", "sampling", "loss") and isinstance(value, list | int | float):
            raise ValueError(f"{name} must be a mapping, got {value}")
        if name == "loss" and value is None:
            raise ValueError("loss must be a mapping, got null; leave it out for the default")
        if name in ("rewards", "sampling") and isinstance(value, str):
            raise ValueError(f"{name} must be a mapping, got {value!r}; options of it are written {name}.NAME=VALUE")
    for name in (*COMPONENTS, "loss"):
        if isinstance(given.get(name), str):  # `optimizer=torch.optim.SGD` on the command line
            given[name] = {"_component_": given[name]}
        if OmegaConf.is_dict(given.get(name)) and "_component_" in given[name]:
            schema[name] = {}
            if given[name]._component_ is None and name in OPTIONAL:  # `test_reward=null` on the command line
                given[name] = None
    try:
        cfg = OmegaConf.merge(schema, given)
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise ValueError(f"missing option {', '.join(missing)}")
        OmegaConf.resolve(cfg)
        _expand_home(cfg)
    except OmegaConfBaseException as error:
        lines = str(error).splitlines()
        key = next((line.partition("full_key: ")[2] for line in lines if "full_key: " in line), "")
        raise ValueError(
            (f"{key}: {lines[0]}" if key else lines[0]) + _option_below(key, schema, given, lines[0])
        ) from error
    _check_values(cfg)
    return cfg


def _option_below(key: str, schema: Any, given: Any, message: str) -> str:
    """Return `; did you mean PATH?` for an unknown option whose name another mapping has, else ""."""
    mappings = [(name, source._get_node(name)) for source in (schema, given) for name in source]
    below = [f"{name}.{key}" for name, node in mappings if isinstance(node._value(), dict) and key in node]
    return f"; did you mean {below[0]}?" if "not in" in message and below else ""


def sampling_params(cfg: Any, stop_tokens: list[int]) -> SamplingParams:
    """Return the sampling parameters of a configuration."""
    return SamplingParams(**cfg.sampling, stop_tokens=stop_tokens)


def build_loss(cfg: Any) -> Callable[..., Tensor]:
    """Return the loss of a configuration, with its options.

    Raises:
        ValueError: If its component cannot be imported.
    """
    options = dict(cfg.loss)
    if "_component_" not in options:
        return partial(grpo_loss, **options, max_completion_length=cfg.sampling.max_new_tokens)
    try:
        return partial(load_dotpath(options.pop("_component_")), **options)
    except ValueError as error:
        raise ValueError(f"loss: {one_line(error)}") from error


def device_and_dtypes(cfg: Any) -> tuple[torch.device, torch.dtype, torch.dtype]:
    """Return this rank's device, the dtype of the computation and that of trained parameters.

    Raises:
        ValueError: If the device does not exist or does not support bf16, or parameters would be less precise than the
            computation.
    """
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must exist, got {cfg.device} on a machine without a GPU; set device=cpu")
    if (cfg.dtype, cfg.param_dtype) == ("fp32", "bf16"):
        raise ValueError("param_dtype must not be bf16 if dtype is fp32; set dtype=bf16, or both to fp32")
    try:
        device = utils.get_device(cfg.device)
        return device, training.get_dtype(cfg.dtype, device), training.get_dtype(cfg.param_dtype, device)
    except RuntimeError as error:
        raise ValueError(f"device={cfg.device}, dtype={cfg.dtype}: {error}") from None


def _expand_home(node: Any) -> None:
    """Replace a leading `~` in the options that are paths, at any depth."""
    for name, value in node.items():
        if OmegaConf.is_dict(value):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~") and name.endswith(("path", "dir", "file", "source")):
            node[name] = str(Path(value).expanduser())


def _check_values(cfg: Any) -> None:
    """Refuse values with which a run would not do what it says."""
    for name in COMPONENTS:
        if cfg[name] is not None and not isinstance(cfg[name].get("_component_"), str):
            raise ValueError(f"{name} must have a _component_, got {cfg[name]}")
    for name in ("num_steps", "prompts_per_step", "num_iterations", "minibatches", "eval_every_n_steps"):
        if cfg[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {cfg[name]}")
    if not 0 <= cfg.seed < 2**63:  # what torch.manual_seed takes
        raise ValueError(f"seed must be at least 0 and below 2**63, got {cfg.seed}")
    if cfg.context_parallel < 1:
        raise ValueError(f"context_parallel must be at least 1, got {cfg.context_parallel}")
    if Path(cfg.output_dir).is_file():
        raise ValueError(f"output_dir must be a folder, got the file {cfg.output_dir}")
    if cfg.group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {cfg.group_size}: a group of one has no advantage")
    if cfg.checkpoint_every_n_steps < 0 or cfg.keep_last_n_checkpoints < 1:
        raise ValueError(
            f"checkpoint_every_n_steps must be at least 0 and keep_last_n_checkpoints at least 1, got "
            f"{cfg.checkpoint_every_n_steps} and {cfg.keep_last_n_checkpoints}"
        )
    if cfg.log_samples_every_n_steps < 0:
        raise ValueError(
            f"log_samples_every_n_steps must be at least 0 (0 for never), got {cfg.log_samples_every_n_steps}"
        )
    if not cfg.clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm must be positive (.inf for no clipping), got {cfg.clip_grad_norm}")
    if not cfg.sampling.temperature > 0:
        raise ValueError(f"sampling.temperature must be positive for rollouts, got {cfg.sampling.temperature}")
    if not (cfg.rewards or cfg.environment) or not (cfg.test_reward or cfg.environment):
        raise ValueError("rewards and test_reward must be set, unless there is an environment")
    if cfg.environment and "environment" in cfg.rewards:
        raise ValueError("rewards must not have the name 'environment', which is that of the environment's reward")
    if cfg.async_steps not in (0, 1) or cfg.max_resamplings < 0:
        raise ValueError(
            f"async_steps must be 0 or 1 and max_resamplings at least 0, got {cfg.async_steps} and "
            f"{cfg.max_resamplings}"
        )
    if cfg.kl_in_reward < 0 or (cfg.kl_in_reward and cfg.mask_truncated_completions):
        raise ValueError(
            f"kl_in_reward must be at least 0, and 0 with mask_truncated_completions, which leaves tokens out of the "
            f"KL divergence too, got {cfg.kl_in_reward}"
        )
    if cfg.sampler and (cfg.sampling.top_k is not None or cfg.sampling.top_p < 1):
        raise ValueError(
            "sampling.top_k and sampling.top_p must not be set with a sampler: its log-probabilities would be those of "
            "another distribution than the trainer's"
        )
    sampling_params(cfg, [])
    one = torch.ones(1, 1)
    try:
        options = {"total_tokens": 1, "total_rollouts": 1, "entropies": one, "metrics": {}}
        if "_component_" not in cfg.loss or cfg.loss.get("beta") or cfg.kl_in_reward:
            options["ref_logprobs"] = one
        options |= {"sampler_logprobs": one} if cfg.sampler else {}
        build_loss(cfg)(one, one[0], one.bool(), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss: {error}") from None
