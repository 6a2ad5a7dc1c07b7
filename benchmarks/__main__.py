"""Run all benchmarks, or those that are named, then write the tables and figures of README and docs.

    python -m benchmarks                        # CPU: an hour on two quiet cores
    python -m benchmarks --device cuda
    python -m benchmarks update mask            # only these
    python -m benchmarks --tiny                 # two minutes, as a test

Each runs in its own process and writes a file in benchmarks/results. One that fails does not stop the others.
`python -m benchmarks.conversations` is not among them, because it needs recorded conversations, and `async_steps` only
as a test, because it needs vLLM.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

CUDA = ["--device", "cuda"]
BENCHMARKS: dict[str, dict[str, list[str]]] = {  # name: arguments by kind of run
    "update": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "peers": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "attention": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "split_parts": {"cpu": [], "tiny": ["--tiny"]},
    "kernels": {"cuda": CUDA, "tiny": ["--tiny"]},
    "mask": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "shapes": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "memory": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "scaling": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "context_parallel": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "sharing": {"cpu": [], "cuda": ["device=cuda", "dtype=bf16"]},
    "sampling": {"cpu": ["--repeats", "3"], "cuda": CUDA, "tiny": ["--tiny"]},
    "step": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "async_steps": {"tiny": ["--tiny"]},
    "hybrid": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "vision": {"cpu": [], "cuda": CUDA, "tiny": ["--tiny"]},
    "trl_update": {"cpu": [], "cuda": CUDA},
    "paper_figure": {"cpu": []},
}


def main() -> None:
    """Run the benchmarks; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none for all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    kind = "tiny" if args.tiny else args.device
    commands = {name: kinds[kind] for name, kinds in BENCHMARKS.items() if kind in kinds}
    if unknown := [name for name in args.names if name not in commands]:
        parser.error(f"NAME must be one of {', '.join(commands)}, got {', '.join(unknown)}")
    failed = []
    for name in args.names or commands:
        command = [sys.executable, "-m", f"benchmarks.{name}", *commands[name]]
        print("==", *command[1:], flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)
    if kind == "cpu":
        subprocess.run([sys.executable, "-m", "benchmarks.tables"], check=True)
        subprocess.run([sys.executable, "-m", "docs.figures", "update", "paper_figure"], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
