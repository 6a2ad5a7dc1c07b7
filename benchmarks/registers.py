"""Registers, spills and shared memory of FlexAttention's kernels, built for GPUs without having one.

    python -m benchmarks.registers            # compute capabilities 8.0, 9.0 and 10.0, some minutes
    python -m benchmarks.registers --one 9.0  # print the kernels of one

torch's compiler generates the kernels of `flexpg.backends.flex` for fake tensors on a GPU, Triton and ptxas build them.
Nothing is run: spills say how much a kernel writes to memory because it lacks registers, not how long it takes. With
"checks", the kernels check boundaries, as they would without our kernel option.

The module changes private parts of torch and triton in its own process. `PRIVATE` lists all of them; an error names
what a version lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import io
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

CAPABILITIES = ("8.0", "9.0", "10.0")


@dataclass(frozen=True)
class Variant:
    """What kernels are built for.

    Attributes:
        dtype: Of q, k and v.
        dim: D.
        heads: Query and key/value heads.
        window: Sliding window, or None.
        softcap: Softcap, or None.
        first: The first query, after a cached prompt.
        precision: torch's matmul precision of float32.
        has_checks: Whether boundaries are checked.
    """

    dtype: str = "bfloat16"
    dim: int = 64
    heads: tuple[int, int] = (2, 1)
    window: int | None = None
    softcap: float | None = None
    first: int = 0
    precision: str = "high"
    has_checks: bool = False


ALL = {"window": 50, "softcap": 2.0, "first": 128, "heads": (4, 1)}
VARIANTS = {
    "bf16 D 64": Variant(),
    "bf16 D 64, checks": Variant(has_checks=True),
    "bf16 D 64, GQA, window, softcap, first_query": Variant(**ALL),
    "bf16 D 80": Variant(dim=80),
    "bf16 D 128": Variant(dim=128),
    "bf16 D 128, checks": Variant(dim=128, has_checks=True),
    "bf16 D 128, GQA, window, softcap, first_query": Variant(dim=128, **ALL),
    "bf16 D 256": Variant(dim=256),
    "bf16 D 256, checks": Variant(dim=256, has_checks=True),
    "fp16 D 128": Variant(dtype="float16", dim=128),
    'fp32 D 64, precision "high"': Variant(dtype="float32"),
    'fp32 D 64, precision "highest"': Variant(dtype="float32", precision="highest"),
}
# Name, multiprocessors, shared memory of a block and of a multiprocessor.
GPUS = {
    "8.0": ("NVIDIA A100", 108, 166_912, 167_936),
    "9.0": ("NVIDIA H200", 132, 232_448, 233_472),
    "10.0": ("NVIDIA B200", 148, 232_448, 233_472),
}


# Every private name of torch and triton that is replaced or called below, by module.
PRIVATE = {
    "torch._dynamo": ("mark_static", "reset"),
    "torch._functorch.config": ("force_non_lazy_backward_lowering",),
    "torch._inductor.codecache": ("PyCodeCache.load",),
    "torch._inductor.compile_fx": ("compile_fx", "compile_fx_inner"),
    "torch._inductor.config": ("compile_threads",),
    "torch._inductor.graph": ("GraphLowering._compile_to_module", "GraphLowering.codegen"),
    "torch._inductor.runtime.triton_compat": ("ASTSource",),
    "torch._inductor.runtime.triton_helpers": ("set_driver_to_gpu",),
    "torch._inductor.runtime.triton_heuristics": (
        "CachingAutotuner._create_compile_meta",
        "CachingAutotuner._create_compile_options",
    ),
    "torch._inductor.scheduler": ("has_triton",),
    "torch._subclasses.fake_tensor": ("FakeTensor",),
    "torch.nn.attention.flex_attention": ("_apply_kernel_options", "_validate_device"),
    "torch.utils._pytree": ("tree_map",),
    "triton": ("knobs.nvidia.dump_ptxas_log", "knobs.compilation.always_compile"),
    "triton.backends.compiler": ("GPUTarget",),
    "triton.runtime": ("driver.set_active",),
}


def check_private() -> None:
    """Check that this torch and triton have every private name that the module uses.

    Raises:
        ImportError: If some are missing, with their names.
    """
    missing = []
    for module, names in PRIVATE.items():
        try:
            imported = importlib.import_module(module)
        except ImportError:
            imported = None
        for name in names:
            try:
                operator.attrgetter(name)(imported)
            except AttributeError:
                missing.append(f"{module}.{name}")
    if missing:
        raise ImportError(
            f"torch {version('torch')} and triton {version('triton')} lack {', '.join(missing)}, which this benchmark "
            "uses; run it with the versions of constraints.txt"
        )


class GeneratedError(Exception):
    """Raised in place of the first launch of a kernel."""


def properties(capability: str) -> SimpleNamespace:
    """Return the properties of a GPU that inductor asks for."""
    name, processors, per_block, per_processor = GPUS[capability]
    major, minor = map(int, capability.split("."))
    return SimpleNamespace(
        name=name,
        major=major,
        minor=minor,
        multi_processor_count=processors,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=per_block,
        shared_memory_per_multiprocessor=per_processor,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )


def add_device_guard(folder: str) -> None:
    """Give a CPU build of torch a device guard of CUDA that does nothing, which fake tensors on CUDA need."""
    import torch

    root = os.path.dirname(torch.__file__)
    source, library = f"{folder}/guard.cpp", f"{folder}/guard.so"
    with open(source, "w") as file:
        file.write("#include <c10/core/impl/DeviceGuardImplInterface.h>\n")
        file.write("C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)\n")
    compiler = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", source, "-o", library, f"-L{root}/lib"]
    subprocess.run([*compiler, "-lc10"], check=True)
    ctypes.CDLL(library)


def pretend(capability: str) -> list[str]:
    """Let torch and triton compile for a GPU that does not exist; return the list that generated code is added to."""
    import torch

    device = properties(capability)
    torch.cuda.get_device_properties = lambda device_index=None: device
    torch.cuda.get_device_capability = lambda device_index=None: (device.major, device.minor)
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.version.cuda = torch.version.cuda or "13.0"

    # After these functions were replaced, because inductor keeps references to them.
    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.runtime.triton_helpers
    import torch._inductor.scheduler
    import torch.nn.attention.flex_attention as frontend
    import triton
    from torch._inductor.graph import GraphLowering

    torch._inductor.scheduler.has_triton = lambda: True
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.config.compile_threads = 1
    torch._functorch.config.force_non_lazy_backward_lowering = True
    driver = SimpleNamespace(get_current_target=lambda: target(capability), get_current_device=lambda: 0)
    driver.get_current_stream, driver.get_active_torch_device = (lambda device: 0), (lambda: torch.device("cuda:0"))
    triton.runtime.driver.set_active(driver)
    frontend._validate_device = lambda query, key, value: None
    options_of = frontend._apply_kernel_options

    def with_logsumexp(*args: Any, **kwargs: Any) -> Any:
        options = options_of(*args, **kwargs)
        options["OUTPUT_LOGSUMEXP"] = options["OUTPUT_LOGSUMEXP"] or torch.is_grad_enabled()
        return options

    frontend._apply_kernel_options = with_logsumexp
    generated: list[str] = []

    def keep_code(graph: Any) -> Any:
        code, _ = graph.codegen()
        generated.append(code.value)

        def call(args: Any) -> None:
            raise GeneratedError

        return SimpleNamespace(call=call, __file__="generated.py", runners=[])

    GraphLowering._compile_to_module = keep_code
    return generated


def target(capability: str) -> Any:
    """Return triton's target of a compute capability."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(capability.replace(".", "")), 32)


def compile_on_gpu(graph: Any, example_inputs: Any) -> Any:
    """Compile a graph after its fake tensors were moved to the GPU; autograd, around it, needs a real device."""
    import torch
    from torch._inductor import compile_fx
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._pytree import tree_map

    def moved(x: Any) -> Any:
        if not isinstance(x, FakeTensor):
            return x
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(x.fake_mode, meta, torch.device("cuda:0"), requires_grad=x.requires_grad)

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        for module in graph.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                for key in {"val", "example_value"} & set(node.meta):
                    node.meta[key] = tree_map(moved, node.meta[key])
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        return compile_fx.compile_fx_inner(graph, [moved(x) for x in inputs], **options)

    return compile_fx.compile_fx(graph, example_inputs, inner_compile=inner)


def generate(variant: Variant, generated: list[str]) -> dict[str, str]:
    """Return the source of each kernel by name."""
    import torch

    from flexpg.backends import flex
    from flexpg.masks import block_mask
    from flexpg.tree import PrefixTree

    tree = PrefixTree.from_lengths([150, 70], [[60, 40, 130], [20, 90]])
    mask, dtype = block_mask(tree, variant.window, first_query=variant.first), getattr(torch, variant.dtype)
    lengths = [tree.padded_length - variant.first, tree.padded_length, tree.padded_length]
    heads = [variant.heads[0], variant.heads[1], variant.heads[1]]
    inputs = [
        torch.zeros(1, head, length, variant.dim, dtype=dtype, requires_grad=True)
        for head, length in zip(heads, lengths, strict=True)
    ]
    for x in inputs:
        for dim in (0, 1, 3):
            torch._dynamo.mark_static(x, dim)
    cap = None if variant.softcap is None else torch.full((), variant.softcap)
    options = {} if variant.has_checks else flex.kernel_options(torch.cuda.get_device_capability())
    torch.set_float32_matmul_precision(variant.precision)
    torch._dynamo.reset()
    generated.clear()
    compiled = torch.compile(flex._flex, dynamic=True, fullgraph=True, backend=compile_on_gpu)
    with contextlib.suppress(GeneratedError):
        compiled(*inputs, mask, variant.dim**-0.5, cap, None, options)
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str=", "\n".join(generated), re.DOTALL)
    return {name: source for name, source in found if name.startswith("triton_tem")}  # of templates


def build(name: str, source: str, capability: str) -> dict[str, int]:
    """Compile a kernel as inductor would, and return what ptxas reports."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_compat import ASTSource

    tuner = getattr(PyCodeCache.load(source), name)
    config = tuner.configs[0]
    meta = tuner._create_compile_meta(config)
    options = tuner._create_compile_options(config, meta)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(
            ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]),
            target=target(capability),
            options=options,
        )
    used = re.search(r"Used (\d+) registers", log.getvalue())
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if used is None or spilled is None:
        raise RuntimeError(f"ptxas printed no registers: {log.getvalue()[:500]}")
    return {
        "registers": int(used[1]),
        "spilled_bytes": int(spilled[1]) + int(spilled[2]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def kernels(capability: str) -> Iterator[dict[str, Any]]:
    """Yield the kernels of every variant for one compute capability."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    check_private()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        generated = pretend(capability)
        add_device_guard(folder)
        import triton

        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        for title, variant in VARIANTS.items():
            for name, source in generate(variant, generated).items():
                direction = "backward" if "backward" in name else "forward"
                numbers = build(name, source, capability)
                yield {"capability": capability, "variant": title, "direction": direction, **numbers}


def main() -> None:
    """Build the kernels for each capability in a process of its own, and save what ptxas reported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=CAPABILITIES, help="print the kernels of one compute capability")
    capability = parser.parse_args().one
    if capability:
        for kernel in kernels(capability):
            print(json.dumps(kernel), flush=True)
        return
    import torch

    from benchmarks.record import commit, save

    commit()
    found = []
    for capability in CAPABILITIES:
        command = [sys.executable, "-m", "benchmarks.registers", "--one", capability]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found += [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    save("registers", torch.device("cpu"), {"kernels": found})


if __name__ == "__main__":
    main()
