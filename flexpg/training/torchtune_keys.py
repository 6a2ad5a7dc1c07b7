"""The keys of torchtune's GRPO recipes: where each is, why some have no counterpart, and what they were translated to.

torchtune has two such recipes in its repository, none in its wheel: `grpo_full_finetune_distributed` (sync), and
`async_grpo_full_finetune_distributed`, whose keys are grouped by worker. Facts are those of torchtune's commit bd2a0fc
(2026-04-23).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

GROUPS = ("orchestration", "inference", "postprocessing", "training")  # of the async recipe
ASYNC_NAMES = {  # path in the async recipe's file: name in the sync recipe's
    "inference.group_size": "grpo_samples",
    "postprocessing.ref_checkpointer": "ref_checkpointer",
    **{f"orchestration.{name}": name for name in ("num_steps", "num_training_workers")},
    **{f"inference.{name}": name for name in ("max_generated_tokens", "temperature", "top_k")},
    **{f"training.{name}": name for name in ("checkpointer", "optimizer", "loss", "batch_size", "ppo_epochs")},
    **{f"training.{name}": name for name in ("clip_grad_norm", "compile", "seed", "custom_sharded_layers")},
    **{f"training.enable_activation_{name}": f"enable_activation_{name}" for name in ("checkpointing", "offloading")},
    **{f"training.{name}": name for name in ("save_every_n_steps", "fsdp_cpu_offload")},
}
ONE_PROGRAM = "one program samples, scores and trains; start it by `tune run --nproc_per_node N`"
ON_POLICY = "a step samples from the weights that the last step has left, or with async_steps=1 from those before"
SAMPLER = "the model that is trained is sampled from; the option `sampler` is for an inference engine"
CACHE = "max_cache_tokens limits what is sampled at a time"
LOGGED = "metrics of every step are logged, with the peak memory"
CHUNKS = "logits are computed in chunks, and only of completions"
DROPPED = {  # keys without a counterpart: why none is needed
    "epochs": "num_steps ends the run; problems come in random order, and in another one when all were asked",
    "shuffle": "the order of the problems is always random, and a function of the seed",
    "collate_fn": "prompts are packed, not padded",
    "forward_batch_size": f"{CACHE}, and max_tokens what is trained",
    "save_every_n_epochs": "trained weights are saved at the end; checkpoint_every_n_steps is for resume=true",
    "custom_sharded_layers": "FSDP2 shards every layer",
    **dict.fromkeys(("log_every_n_steps", "log_peak_memory_stats", "log_level"), LOGGED),
    **dict.fromkeys(("debug_logging_enabled", "debug_num_samples_per_step"), LOGGED),
    "enable_expandable_segments": "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment",
    **dict.fromkeys(("orchestration.num_inference_workers", "orchestration.num_postprocessing_workers"), ONE_PROGRAM),
    **dict.fromkeys(("inference.engine", "inference.model"), SAMPLER),
    **dict.fromkeys(("inference.tensor_parallel_dim", "inference.engine_args"), ONE_PROGRAM),
    **dict.fromkeys(("inference.batch_size", "inference.total_batch_size"), CACHE),
    **dict.fromkeys(("orchestration.replay_buffer_size", "inference.queue_maxsize"), ON_POLICY),
    **dict.fromkeys(("inference.steps_before_weight_sync", "training.steps_before_weight_sync"), ON_POLICY),
    **dict.fromkeys(("loss.num_output_chunks", "loss.ignore_index", "loss.mask_pre_projection"), CHUNKS),
}
IF_SET = {  # keys that are dropped unless they are set: what to do then
    "resume_from_checkpoint": "resume=true continues runs of recipes/grpo.py only; to start from weights that "
    "torchtune has saved, set checkpointer.checkpoint_dir and checkpoint_files to them",
    "fsdp_cpu_offload": "weights and optimizer stay on their devices; if memory runs out, lower max_tokens and "
    "max_cache_tokens, or set activation_offloading=true",
    "stop_token_ids": "completions end at the tokenizer's stop_tokens; use a tokenizer that has these",
}


@dataclass
class Translation:
    """A configuration for recipes/grpo.py, and what became of every key of torchtune's.

    Attributes:
        options: The options.
        sources: The options of torchtune that each option was made from.
        dropped: Keys without a counterpart: why none is needed.
        notes: Keys or options to look at: what to do.
    """

    options: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, source: str) -> None:
        """Set an option."""
        self.options[name], self.sources[name] = value, source

    def yaml(self, title: str) -> str:
        """Return the text of the YAML; sources, notes and what was dropped are comments."""
        lines = [f"# {title}"]
        for heading, items in (("To look at", self.notes), ("Not needed", self.dropped)):
            lines += ["#", f"# {heading}:", *(f"# - {name}: {text}" for name, text in items.items())] if items else []
        lines.append("")
        for name, value in self.options.items():
            first, *rest = yaml.safe_dump({name: value}, sort_keys=False, width=110, allow_unicode=True).splitlines()
            lines += [first if self.sources[name] == name else f"{first}  # {self.sources[name]}", *rest]
        return "\n".join(lines) + "\n"


class TorchtuneKeys:
    """The keys of a file under the names of the sync recipe."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        groups = [group for group in GROUPS if OmegaConf.is_dict(cfg.get(group))]
        self.is_async = bool(groups)
        grouped = [f"{group}.{key}" for group in groups for key in cfg[group]]
        names = {str(key): str(key) for key in cfg if key not in groups}
        if self.is_async:
            names = {path: name for path, name in names.items() if name not in ASYNC_NAMES.values()}
        self.left = [*(str(key) for key in cfg if key not in groups), *grouped]  # paths that were not read yet
        names |= {path: ASYNC_NAMES.get(path, path) for path in grouped}
        self.paths = {name: path for path, name in names.items()}

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value with its interpolations resolved, or the default if the file does not have it."""
        if name not in self.paths:
            return default
        path = self.paths[name]
        self.left = [other for other in self.left if other != path]
        try:
            value = OmegaConf.select(self.cfg, path, throw_on_missing=True)
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error

    def component(self, name: str) -> dict[str, Any]:
        """Return a component that the file must have."""
        value = self.get(name)
        if not isinstance(value, dict) or not isinstance(value.get("_component_"), str):
            raise ValueError(f"{name} must be a mapping with a _component_, got {value}")
        return value

    def path(self, name: str) -> str:
        """Return where a key is in the file."""
        return self.paths.get(name, f"torchtune's default of {name}")

    def variables(self) -> set[str]:
        """Return the paths that values of the file refer to."""
        return set(re.findall(r"\$\{([\w.]+)\}", OmegaConf.to_yaml(self.cfg)))
