"""A GRPO update of one group by flexpg and by other implementations that share prefixes, next to the baseline.

    python -m benchmarks.peers                    # CPU, float32
    python -m benchmarks.peers --device cuda      # bfloat16: 0.5B shapes
    python -m benchmarks.peers --tiny             # seconds, as a test

The implementations, and what is timed, are those of `benchmarks.update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.record import run
from benchmarks.update import CASES as UPDATES
from benchmarks.update import even_and_uneven, measure

SKIPPED = ("baseline_unpadded", "torchtune")  # which share nothing, like the baseline
CASES = {
    "cpu": [
        case
        for sizes in ((512, 64, 8), (1024, 64, 16), (2048, 128, 8))
        for case in even_and_uneven(*sizes, skipped=SKIPPED)
    ],
    "cuda": [
        case
        for sizes in ((4096, 512, 8), (16_384, 1024, 8))
        for case in even_and_uneven(*sizes, model="0.5B", skipped=SKIPPED)
    ],
    "tiny": [replace(case, skipped=SKIPPED) for case in UPDATES["tiny"]],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("peers", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
