"""Fixtures that several files use."""

from __future__ import annotations

import gc
import os

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pytest_configure():
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that wants to download is wrong
    # The tensors are small: handing them out to threads costs more than it saves, and ten times so on a busy machine.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start
    gc.disable()  # what is imported and collected stays, so looking for garbage in it is a waste


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(params=[pytest.param("cuda", marks=needs_cuda)])
def cuda(request):
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    return request.param
