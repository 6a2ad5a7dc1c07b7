"""Every benchmark, or those that are named, one after the other; then the tables and the picture of README and docs.

    python -m benchmarks                        # CPU: an hour on two quiet cores
    python -m benchmarks --device cuda
    python -m benchmarks update mask            # these alone
    python -m benchmarks --tiny                 # two minutes, to see that all work

Each runs in a process of its own and writes its file in benchmarks/results. One that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

# In order; on CUDA with what each wants there.
CPU: dict[str, list[str]] = {
    "update": [],
    "attention": [],
    "pieces": [],
    "mask": [],
    "shapes": [],
    "memory": [],
    "scaling": [],
    "sharing": [],
    "trl_update": [],
    "paper_figure": [],
}
CUDA: dict[str, list[str]] = {
    "update": ["--device", "cuda"],
    "attention": ["--device", "cuda"],
    "kernels": ["--device", "cuda"],
    "mask": ["--device", "cuda"],
    "shapes": ["--device", "cuda"],
    "memory": ["--device", "cuda"],
    "scaling": ["--device", "cuda"],
    "sharing": ["device=cuda", "dtype=bf16"],
    "trl_update": ["--device", "cuda"],
}
TINY = {
    name: ["--tiny"] for name in ("update", "attention", "pieces", "kernels", "mask", "shapes", "memory", "scaling")
}


def main() -> None:
    """Runs them; the exit status is that of the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join({**CPU, **CUDA})}; all if none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    benchmarks = TINY if args.tiny else {"cpu": CPU, "cuda": CUDA}[args.device]
    if unknown := [name for name in args.names if name not in benchmarks]:
        parser.error(f"no benchmark {', '.join(unknown)} there; choose of {', '.join(benchmarks)}")
    failed = []
    for name in args.names or benchmarks:
        command = [sys.executable, "-m", f"benchmarks.{name}", *benchmarks[name]]
        print("==", *command[1:], flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)
    if not args.tiny:
        subprocess.run([sys.executable, "-m", "benchmarks.tables"], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
