"""One line of context for errors: instead of a traceback before training, above the traceback during training."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # of CUDA and Triton, CPUs, and cuBLAS


def one_line(error: BaseException) -> str:
    """Return the whole message of an error in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def error_context(line: str) -> Iterator[None]:
    """Print one line above the traceback of an exception, with what the traceback does not say."""
    try:
        yield
    except Exception:
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise


@contextmanager
def out_of_memory_hint(hint: str) -> Iterator[None]:
    """Print one line above the traceback of an out-of-memory error, with what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        is_typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_typed or any(sign in text for sign in OUT_OF_MEMORY):  # torch has no type for a CPU's (torch 2.13)
            print(f"error: out of memory; {hint}", file=sys.stderr, flush=True)
        raise
