"""Run FlexAttention's GPU kernels on CPU tensors: inductor's Triton kernels in Triton's interpreter.

    from tests.kernels import interpreter  # before torch and triton are imported

From then on, compiled flex_attention of CPU tensors takes the path of a GPU of compute capability 9.0: the forward and
backward templates with mask_mod and score_mod inlined, and the wrapper that launches them. Every address that a kernel
reads or writes must lie in one of its tensors, and what a masked read leaves out is NaN or a large number, so a kernel
that uses it gives wrong results.

What is not run: warps, pipelining, tensor cores, races, and the compilation to machine code.

This module changes private parts of torch and triton, in this process only. `PRIVATE` lists all of them; importing the
module raises an error that names a part that is missing.
"""

from __future__ import annotations

import os
import sys

if "torch" in sys.modules or "triton" in sys.modules:
    raise ImportError("import tests.kernels.interpreter before torch and triton, in a process of its own")
os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # or a kernel for the CPU may come from the cache

import importlib
import inspect
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CAPABILITY = (9, 0)

# Every private name of torch and triton that is replaced or called below.
PRIVATE = {
    "torch._inductor.kernel.flex.flex_attention": ["flex_attention"],
    "torch.nn.attention.flex_attention": ["_apply_kernel_options", "_validate_device"],
    "torch._inductor.choices": ["InductorChoices.get_config_heuristics"],
    "torch._inductor.graph": ["GraphLowering.is_unspec_arg", "GraphLowering.save_output_code"],
    "torch._inductor.runtime.triton_heuristics": ["CachingAutotuner.run"],
    "torch._inductor.config": ["cpu_backend", "compile_threads"],
    "triton.backends.compiler": ["GPUTarget"],
    "triton.runtime.driver": ["set_active"],
    "triton.runtime.interpreter": [
        *(
            "GridExecutor._init_args_hst",
            "GridExecutor.__call__",
            "InterpreterBuilder.cast_impl",
            "InterpreterBuilder.create_dot",
        ),
        *("InterpreterBuilder.create_masked_load", "InterpreterBuilder.create_masked_store", "TensorHandle"),
        *("_get_np_dtype", "interpreter_semantic"),
    ],
    "triton.runtime.errors": ["InterpreterError"],
    "triton.language.extra.libdevice": ["tanh", "exp", "log", "sqrt", "exp2", "log2"],
}

graphs: list[str] = []  # the code of each graph that inductor compiled


def private(module: str) -> ModuleType:
    """Import a module of PRIVATE, and check its names."""
    found = importlib.import_module(module) if module != "triton.runtime.driver" else triton.runtime.driver
    for name in PRIVATE[module]:
        part: Any = found
        for attribute in name.split("."):
            if not hasattr(part, attribute):
                raise ImportError(
                    f"{module}.{name} is missing in torch {torch.__version__} with triton {triton.__version__}; "
                    "tests/kernels/interpreter.py must be adapted to this version"
                )
            part = getattr(part, attribute)
    return found


# torch: CPU tensors are compiled as if they were on a GPU.


def replace_source(module: ModuleType, name: str, old: str, new: str) -> None:
    """Define a function of a module again, with one part of its source replaced."""
    source = inspect.getsource(getattr(module, name))
    if source.count(old) != 1:
        raise ImportError(
            f"{module.__name__}.{name} of torch {torch.__version__} must contain {old!r} once; "
            "tests/kernels/interpreter.py must be adapted to this version"
        )
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), vars(module))


class Driver:
    """A driver of a GPU that does not exist: the interpreter launches kernels itself."""

    def get_current_target(self) -> Any:
        return private("triton.backends.compiler").GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_for_gpu() -> None:
    """Make inductor generate the kernels of a GPU for CPU tensors."""
    config = private("torch._inductor.config")
    config.cpu_backend, config.compile_threads = "triton", 1
    private("triton.runtime.driver").set_active(Driver())
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY

    # The lowering is registered again by its decorator.
    lowering = private("torch._inductor.kernel.flex.flex_attention")
    replace_source(lowering, "flex_attention", 'query.get_device().type == "cpu"', "False")
    frontend = private("torch.nn.attention.flex_attention")
    options_of = frontend._apply_kernel_options

    def with_logsumexp(*args: Any, **kwargs: Any) -> Any:
        options = options_of(*args, **kwargs)
        options["OUTPUT_LOGSUMEXP"] = options["OUTPUT_LOGSUMEXP"] or torch.is_grad_enabled()
        return options

    frontend._apply_kernel_options = with_logsumexp  # on a CPU there would be no backward
    frontend._validate_device = lambda query, key, value: None

    choices = private("torch._inductor.choices").InductorChoices
    heuristics = choices.get_config_heuristics
    choices.get_config_heuristics = lambda self, device_type="cuda": heuristics(self, "cuda")
    graph = private("torch._inductor.graph").GraphLowering
    graph.is_unspec_arg = lambda self, name: False  # a 0-d tensor of a GPU is passed as a pointer, not as a number
    graph.save_output_code = staticmethod(graphs.append)

    tuner = private("torch._inductor.runtime.triton_heuristics").CachingAutotuner
    run = tuner.run

    def run_largest(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Instead of timing configurations, take that with the fewest programs."""

        def elements(config: Any) -> int:
            return math.prod(size for name, size in config.kwargs.items() if name.endswith("BLOCK"))

        self.configs = [max(self.configs, key=elements)]
        return run(self, *args, **kwargs)

    tuner.run = run_largest


# triton's interpreter: bfloat16 as on a GPU, mathematical functions, and checked addresses.

interpreter = private("triton.runtime.interpreter")
KernelError: type[Exception] = private("triton.runtime.errors").InterpreterError  # around any error in a kernel
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Return the values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits of float32 values, rounded to nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def fix_bfloat16() -> None:
    """Convert and multiply bfloat16 by value; the interpreter of triton 3.7 truncates, and multiplies the bits."""
    cast, dot = Builder.cast_impl, Builder.create_dot

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        types = source.dtype.scalar, dtype.scalar
        if types == (tl.bfloat16, tl.float32):
            return Handle(to_float32(source.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return Handle(to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, dtype)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [Handle(to_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    Builder.cast_impl, Builder.create_dot = cast_impl, create_dot


def define_functions() -> None:
    """Define the mathematical functions of libdevice, which return None in the interpreter."""
    libdevice = private("triton.language.extra.libdevice")

    def elementwise(function: Any) -> Any:
        def call(x: Any) -> Any:
            x = interpreter.interpreter_semantic.to_tensor(x)
            return tl.core.tensor(Handle(function(x.handle.data), x.dtype.scalar), x.type)

        return call

    for name in PRIVATE["triton.language.extra.libdevice"]:
        setattr(libdevice, name, elementwise(getattr(np, name)))


class Addresses:
    """The memory of the tensors that the running kernel was given."""

    ranges = np.empty((0, 2), dtype=np.uint64)  # [n, 2] first address, and one past the last

    @classmethod
    def of(cls, tensors: list[Tensor]) -> None:
        ends = [sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 for x in tensors]
        ranges = [(x.data_ptr(), x.data_ptr() + end * x.element_size()) for x, end in zip(tensors, ends, strict=True)]
        cls.ranges = np.array(ranges, dtype=np.uint64).reshape(-1, 2)

    @classmethod
    def check(cls, pointers: Any, mask: Any) -> None:
        """Raise IndexError unless all accessed elements lie in one tensor."""
        data, used = np.broadcast_arrays(pointers.data, mask.data)
        data = data[used.astype(bool)]
        if not data.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first, end = data.min(), data.max() + np.uint64(size)
        if not ((cls.ranges[:, 0] <= first) & (end <= cls.ranges[:, 1])).any():
            raise IndexError(f"a kernel accesses {first} to {end}, outside of its tensors {cls.ranges.tolist()}")


def poison_of(dtype: Any) -> Any:
    """Return what a masked element is read as: NaN, or a number that is no index."""
    numpy_dtype = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:  # stored as bits
        return 0x7FC0
    return np.nan if numpy_dtype.kind == "f" else np.iinfo(numpy_dtype).max // 2 if numpy_dtype.kind in "iu" else 0


def check_memory() -> None:
    """Check every address, and poison what masked reads leave out."""
    init_args, load, store = (
        interpreter.GridExecutor._init_args_hst,
        Builder.create_masked_load,
        Builder.create_masked_store,
    )

    def init_args_host(self: Any, *args: Any, **kwargs: Any) -> Any:
        host, host_kwargs = init_args(self, *args, **kwargs)
        Addresses.of([x for x in (*host, *host_kwargs.values()) if isinstance(x, Tensor) and x.numel()])
        return host, host_kwargs

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        Addresses.check(pointers, mask)
        if other is None and not np.all(mask.data):
            dtype = pointers.get_element_ty()
            fill = np.full_like(pointers.data, poison_of(dtype), dtype=interpreter._get_np_dtype(dtype))
            other = Handle(fill, dtype)
        return load(self, pointers, mask, other, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        Addresses.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    interpreter.GridExecutor._init_args_hst = init_args_host
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store


def count_launches() -> None:
    """Let kernels be skipped, for checks of what is compiled."""
    call = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs) if runs_kernels else None

    interpreter.GridExecutor.__call__ = launch


runs_kernels = True  # False: kernels are compiled and launched, and do nothing
compile_for_gpu()
count_launches()
fix_bfloat16()
define_functions()
check_memory()
np.seterr(over="ignore", invalid="ignore", divide="ignore")
