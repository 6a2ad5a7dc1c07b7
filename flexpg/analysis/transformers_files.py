"""The model and the tokenizer of a local folder: nothing is downloaded, and no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
UNLIMITED = 10**30  # as transformers writes it


def local_model(path: Path) -> nn.Module:
    """Build the model of a checkpoint on the meta device, or a PEFT adapter on top of its base model.

    Args:
        path: A checkpoint's folder, its config.json, or an adapter's folder whose base model is a local folder.

    Raises:
        FileNotFoundError: If there is no config.
    """
    if (path / ADAPTER_CONFIG).is_file():
        return _local_adapter(path)
    return meta_model(local_config(path))


def local_config(path: Path) -> PretrainedConfig:
    """Read a checkpoint's config.

    Args:
        path: The checkpoint's folder, or its config.json.

    Raises:
        FileNotFoundError: If there is none.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():  # transformers would take the path for a name on the hub
        raise FileNotFoundError(f"no file {file}; pass a checkpoint's folder or its config.json")
    return AutoConfig.from_pretrained(str(path), local_files_only=True)


def meta_model(config: PretrainedConfig) -> nn.Module:
    """Build the model of a config on the meta device; of one that holds more than text, with its vision tower."""
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config)
        return model


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class that loads a config's model: for text, or for images and text."""
    is_text = config.get_text_config(decoder=True) is config
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


def _local_adapter(folder: Path) -> nn.Module:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"{error}; {folder} holds a PEFT adapter; run: pip install peft") from error
    adapter = PeftConfig.from_pretrained(str(folder))
    base = Path(adapter.base_model_name_or_path or "")
    if not base.is_dir():
        raise FileNotFoundError(
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG} must be a local folder, got {str(base)!r}; download "
            "the base model and write its folder there"
        )
    adapter.inference_mode = False  # a saved adapter is frozen
    with torch.device("meta"):
        model: Any = local_model(base)
        return get_peft_model(model, adapter)


def tokenizer_folder(path: Path) -> Path | None:
    """Return the folder of the tokenizer that belongs to a model: the checkpoint's, or an adapter's base model's."""
    folder = path if path.is_dir() else path.parent
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return folder
    if (folder / ADAPTER_CONFIG).is_file():
        return tokenizer_folder(Path(json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]))
    return None


def local_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Raises:
        FileNotFoundError: If the folder does not exist, or has no tokenizer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; pass one that holds a tokenizer")
    try:  # its tokens are only counted, so it need not warn about sequences beyond the model's context
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, model_max_length=UNLIMITED)
    except Exception as error:  # of many kinds
        if any((folder / name).is_file() for name in (*TOKENIZER_FILES, "config.json")):
            raise
        raise FileNotFoundError(
            f"no config.json and no tokenizer.json in {folder}; pass the folder of a checkpoint"
        ) from error
