"""transformers checkpoints in a recipe's configuration.

    model:
      _component_: flexpg.training.causal_lm.model
      path: /tmp/Qwen3-0.6B
      lora: {r: 32, lora_alpha: 64, target_modules: all-linear}  # without it, all parameters are trained
    tokenizer:
      _component_: flexpg.training.causal_lm.tokenizer
      path: ${model.path}

`transformers_models.py` loads, shards and saves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from omegaconf import DictConfig, OmegaConf
from torch import nn

from flexpg.training.dotpaths import load_dotpath, near_argument
from flexpg.training.quantization import quantize_layers

# Options of `peft.LoraConfig` with which the model without adapters is the base model, and adapters can be merged.
LORA_OPTIONS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "layers_to_transform", "layers_pattern", "target_parameters", "fan_in_fan_out", "init_lora_weights"),
)
INIT_LORA_WEIGHTS = (True, False, "gaussian", "orthogonal")


def model(path: str, lora: Mapping[str, Any] | None = None, quantization: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the model of a checkpoint, without its weights.

    Args:
        path: The folder of a transformers checkpoint, as `tune download` writes it. Of a model that takes images too,
            the language model is trained.
        lora: Options of `peft.LoraConfig`; None to train all parameters.
        quantization: Options of `transformers.BitsAndBytesConfig`, to store frozen layers in 4 bits.

    Raises:
        FileNotFoundError: If the folder has no config.json.
        ImportError: If PEFT is not installed, with `lora`, or bitsandbytes, with `quantization`.
        ValueError: If the recipe does not support one of the options.
    """
    from flexpg.analysis.transformers_files import auto_class, local_config

    config = local_config(Path(path))
    built: nn.Module = auto_class(config).from_config(config, dtype=torch.get_default_dtype())
    if quantization is not None:
        if lora is None or lora.get("use_dora"):
            raise ValueError(
                "quantization needs lora without use_dora: nothing else can be trained above 4-bit weights"
            )
        quantize_layers(built, quantization)
    return built if lora is None else with_adapters(built, lora)


def with_adapters(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    """Add LoRA adapters to a transformers model.

    Args:
        model: The model.
        lora: Options of `peft.LoraConfig`, those of LORA_OPTIONS.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the recipe does not support one of the options.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"{error}; model.lora needs PEFT, run: pip install 'peft<0.19'") from error
    if not isinstance(lora, Mapping):
        raise ValueError(f"lora must be a mapping of options of peft.LoraConfig, got {lora!r}")
    if lora.get("lora_dropout"):
        raise ValueError(
            f"lora.lora_dropout must be 0, got {lora['lora_dropout']}: it would differ between the copies of a prefix"
        )
    options: Any = OmegaConf.to_container(lora) if isinstance(lora, DictConfig) else lora  # PEFT tests for lists
    try:
        config, default = LoraConfig(task_type="CAUSAL_LM", **options), LoraConfig()
    except TypeError as error:
        raise ValueError(f"lora: {error}{near_argument(LoraConfig, error)}") from error
    for name in options:
        if name not in LORA_OPTIONS and (value := getattr(config, name)) != getattr(default, name):
            raise ValueError(
                f"lora.{name} must not be set, got {value}: adapters must be all that is trained, and be mergeable; "
                f"the options are {', '.join(LORA_OPTIONS)}"
            )
    if config.init_lora_weights not in INIT_LORA_WEIGHTS:
        raise ValueError(
            f"lora.init_lora_weights must be one of {INIT_LORA_WEIGHTS}, got {config.init_lora_weights!r}: others "
            "change the base model's weights"
        )
    if isinstance(targets := options.get("target_modules"), list):
        layers = [f".{name}" for name, _ in model.named_modules()]
        unknown = [name for name in targets if not any(layer.endswith(f".{name}") for layer in layers)]
        if unknown:  # PEFT ignores them if it finds one of the others
            raise ValueError(
                f"lora.target_modules must name layers of the model, got {', '.join(unknown)}, which "
                f"{type(model).__name__} does not have"
            )
    untyped: Any = model
    inputs, outputs = untyped.get_input_embeddings(), untyped.get_output_embeddings()
    is_tied = outputs is not None and outputs.weight is inputs.weight
    adapted: nn.Module = get_peft_model(untyped, config, autocast_adapter_dtype=False)
    if is_tied and (untyped.get_input_embeddings() is not inputs or untyped.get_output_embeddings() is not outputs):
        raise ValueError(
            "lora.target_modules must not name the embeddings or the output layer of a model in which they are tied, "
            f"got {config.target_modules}: merging adapters of one would change the other"
        )
    return adapted


def tokenizer(
    path: str,
    stop_tokens: Iterable[str] = (),
    template_options: Mapping[str, Any] | None = None,
    tools: Sequence[str] = (),
    system_prompt: str | None = None,
) -> CheckpointTokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        path: The folder of a transformers checkpoint.
        stop_tokens: Texts of one token that end a completion, such as "<|im_end|>", besides the end-of-sequence tokens
            of the tokenizer and of the checkpoint's generation config.
        template_options: Arguments of the chat template, such as {"enable_thinking": False}.
        tools: Dotpaths of functions that the chat template tells the model about; see tools.py.
        system_prompt: The text of a system message before every conversation; by default, none but the template's own.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If one of `stop_tokens` is not one token, `system_prompt` is no text, or the tokenizer's
            `response_template` is invalid, or is missing with `tools`.
    """
    from transformers import GenerationConfig
    from transformers.utils import get_json_schema

    from flexpg.analysis.transformers_files import local_tokenizer

    loaded: Any = local_tokenizer(Path(path))
    if loaded.response_template is not None:
        loaded.get_response_parser(prefix="")  # raises ValueError; later, every answer would look malformed
    ids = {loaded.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the checkpoint has no generation config
        eos = None
    ids |= {eos} if isinstance(eos, int) else set(eos or ())
    if isinstance(stop_tokens, str) or not all(isinstance(text, str) for text in stop_tokens):
        raise ValueError(f'stop_tokens must be a list of texts, such as ["<|im_end|>"], got {stop_tokens!r}')
    for text in stop_tokens:
        encoded = loaded.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise ValueError(f"stop_tokens must be one token each, got {text!r}, which is {len(encoded)}")
        ids |= set(encoded)
    if not isinstance(system_prompt, str | None):
        raise ValueError(f"system_prompt must be a text, got {system_prompt!r}")
    # Templates write tools as JSON, which nodes of a configuration are not.
    options: Any = OmegaConf.to_container(OmegaConf.create(dict(template_options or {})), resolve=True)
    if tools:
        if loaded.response_template is None:
            raise ValueError(f"tools need a tokenizer with a response_template, which the one in {path} lacks")
        options["tools"] = [get_json_schema(function) for function in map(load_dotpath, tools)]
    return CheckpointTokenizer(loaded, sorted(ids - {None}), options, system_prompt)


class CheckpointTokenizer:
    """A transformers tokenizer with the methods that recipes call.

    Args:
        tokenizer: The tokenizer.
        stop_tokens: Ids that end a completion.
        template_options: Arguments of the chat template.
        system_prompt: The text of a system message before every conversation, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: list[int],
        template_options: dict[str, Any],
        system_prompt: str | None = None,
    ) -> None:
        self.tokenizer, self.stop_tokens, self.template_options = tokenizer, stop_tokens, template_options
        self.system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the ids of a text; special tokens are added on request only."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if add_bos and bos is None:
            raise ValueError("the tokenizer has no beginning-of-sequence token; set prompt_format=plain or chat")
        return [bos] * add_bos + ids + [eos] * add_eos

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of the ids, without special tokens."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def decode_all(self, token_ids: list[int]) -> str:
        """Return the text of the ids, special tokens included."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def chat_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of messages and of the beginning of the next answer, by the checkpoint's chat template."""
        text: str = self.tokenizer.apply_chat_template(
            [*self.system, *messages], add_generation_prompt=True, tokenize=False, **self.template_options
        )
        return text

    def parse(self, prompt: list[int], completion: list[int]) -> dict[str, Any] | None:
        """Return a completion as an assistant's message by the tokenizer's `response_template`, None if it has none.

        Args:
            prompt: What the completion follows; templates write the beginning of some answers.
            completion: Ids, with the stop token if one was sampled.

        Returns:
            "role", "content" and what else the completion has: reasoning, and "tool_calls", a list of
            {"type": "function", "function": {"name": str, "arguments": dict}}.

        Raises:
            KeyError, RecursionError, TypeError or ValueError: If it is malformed.
        """
        if self.tokenizer.response_template is None:
            return None
        tools = self.template_options.get("tools")  # the types of arguments, for formats without types
        parsed = self.tokenizer.parse_response(self.decode_all(completion), prefix=self.decode_all(prompt), tools=tools)
        content = parsed.get("content") or ""
        if completion[-1] in self.stop_tokens:  # one that the template does not know
            content = content.removesuffix(self.decode_all(completion[-1:])).rstrip()
        message = parsed | {"role": "assistant", "content": content}
        if "tool_calls" in parsed:
            message["tool_calls"] = [_function_call(call) for call in parsed["tool_calls"]]
        return message

    def chat_prompt(self, text: str) -> list[int]:
        """Return the ids of a user message and of the beginning of its answer, by the checkpoint's chat template.

        Raises:
            ValueError: If the tokenizer has no chat template, or it refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; set prompt_format=plain or bos")
        messages = [*self.system, {"role": "user", "content": text}]
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **self.template_options
            )
        except TemplateError as error:  # such as Gemma 2's, which has no system messages
            raise ValueError(f"the chat template refuses the prompt: {error}") from error
        return ids


def _function_call(call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), "arguments": dict() as arguments}}:
            return {"type": "function", "function": {"name": name, "arguments": arguments}}
        case {"function": {"name": str(name), **others}} if others.get("arguments") is None:
            return {"type": "function", "function": {"name": name, "arguments": {}}}
    raise ValueError(f"a tool call must have a name and arguments, got {call!r}")
