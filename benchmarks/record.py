"""A benchmark's numbers on disk and on the screen, with what they were measured on."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
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
    args = parser.parse_args(argv)
    if not args.tiny and args.device not in cases:
        parser.error(f"{name} has no cases for {args.device}")
    rows = []
    for case in cases["tiny" if args.tiny else args.device]:
        rows.append(asdict(case) | measured(case, torch.device(args.device), args.turns))
        print(json.dumps(rows[-1]), flush=True)
    numbers = {"turns": args.turns, "cases": rows}
    save(f"{name}_{args.device}", torch.device(args.device), numbers, TRIALS if args.tiny else RESULTS)


def save(name: str, device: torch.device, numbers: dict[str, Any], folder: Path = RESULTS) -> None:
    """Prints the numbers and writes FOLDER/NAME.json, with command, machine, versions and commit."""
    packages = {name: version(name) for name in PACKAGES}
    result = {
        "command": " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
        **numbers,
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **packages},
        "commit": commit(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    for key, value in result.items():
        if key != "cases":
            print(f"{key:<30} {value}")


def commit() -> str:
    """What was measured; results that were written before do not count as a change."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
