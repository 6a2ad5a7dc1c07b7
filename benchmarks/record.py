"""A benchmark's numbers on disk and on the screen, with what they were measured on."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
TRIALS = Path("runs/benchmarks")  # of --tiny, whose numbers say nothing
PACKAGES = ("flexpg", "torch", "transformers", "torchtune", "trl", "prefix-grouper")
Case = TypeVar("Case")  # a dataclass


def run(
    name: str,
    about: str,
    cases: Mapping[str, Sequence[Case]],
    measured: Callable[[Case, torch.device, int], dict[str, Any]],
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of a benchmark: measures its cases one by one and saves them as NAME_cpu or NAME_cuda.

    Args:
        name: of the benchmark.
        about: text of its --help.
        cases: for "cpu", "cuda" and "tiny"; a device that is missing is refused.
        measured: case, device and number of turns -> its numbers.
        argv: in place of the command line.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", type=int, default=7, help="timings of each; at least 7 for numbers that are shown")
    parser.add_argument("--tiny", action="store_true", help=f"small cases, to see that it works; saved in {TRIALS}/")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if not args.tiny and args.device not in cases:
        parser.error(f"{name} has no cases for {args.device}")
    if args.turns < 2:
        parser.error(f"--turns is {args.turns}; a median with quartiles needs 2 or more")
    device, folder = torch.device(args.device), TRIALS if args.tiny else RESULTS
    numbers: dict[str, Any] = {"command": " ".join([f"python -m benchmarks.{name}", *argv]), "turns": args.turns}
    numbers |= {"cases": [], "failed": []}
    for case in cases["tiny" if args.tiny else args.device]:
        try:
            numbers["cases"].append(asdict(case) | measured(case, device, args.turns))
            print(json.dumps(numbers["cases"][-1]), flush=True)
        except RuntimeError as error:  # torch's: the other cases are worth their time all the same
            numbers["failed"].append(asdict(case) | {"error": f"{type(error).__name__}: {error}"})
            print(traceback.format_exc(), file=sys.stderr, flush=True)
        write(f"{name}_{args.device}", device, numbers, folder)  # what is measured is kept, whatever comes
    if numbers["failed"]:
        sys.exit(f"{name}: {len(numbers['failed'])} of its cases failed")


def save(name: str, device: torch.device, numbers: dict[str, Any]) -> None:
    """Prints the numbers and writes them to benchmarks/results/NAME.json, as `write` does."""
    command = " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]])
    for key, value in write(name, device, {"command": command, **numbers}, RESULTS).items():
        print(f"{key:<30} {value}")


def write(name: str, device: torch.device, numbers: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes FOLDER/NAME.json: the numbers, with machine, versions and commit; gives it all back."""
    result = {
        **numbers,
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": COMMIT,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def commit() -> str:
    """Of this checkout; what benchmarks write (results, tables, pictures) does not count as a change."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    written = [f":(top,exclude){path}" for path in ("benchmarks/results", "docs", "README.md")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return git("describe", "--always") + ("-dirty" if changed else "")


COMMIT = commit()  # now, when the code that is measured is loaded, and not when it has run


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        return f"{torch.cuda.get_device_name(device)}, {libraries}"
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
