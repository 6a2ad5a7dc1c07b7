"""Configs and tokenizers of a checkpoint's folder: nothing is downloaded, and no weight is read."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from flexpg.training.distributed import one_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
UNLIMITED = 10**30  # as transformers itself writes it


def local_config(path: Path) -> PretrainedConfig:
    """The config of a checkpoint.

    Args:
        path: its folder, or the config.json in it.

    Raises:
        OSError: there is none.
        ValueError: one that transformers does not know, or cannot read.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():  # transformers would take the path for a name on the hub
        raise FileNotFoundError(f"no file {file}; give a checkpoint's folder or its config.json")
    try:
        return AutoConfig.from_pretrained(str(file), local_files_only=True)
    except Exception as error:  # each family checks its own fields, in its own way
        raise ValueError(f"{file}: {one_line(error)}") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def local_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        OSError: there is no such folder.
        ValueError: it holds none that transformers can load.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give one that holds a tokenizer, or `bytes`")
    try:
        # Tokens are counted here, not run, so it need not warn of those beyond the model's context.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, model_max_length=UNLIMITED)
    except Exception as error:  # `tokenizers` raises nothing more precise
        raise ValueError(f"{folder} holds no tokenizer that transformers loads: {one_line(error)}") from error
