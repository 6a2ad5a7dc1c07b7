"""recipes/grpo.py under torch's launcher, as `tune run` starts it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from processes import start_command, wait_until
from recipe_runs import SMALL, TINY
from torchtune._cli import tune


class Launched:
    """`tune run` on two ranks."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.printed, self.folder = folder / "printed.txt", folder
        options = [*SMALL, "prompts_per_step=8", "num_steps=1000", f"output_dir={folder / 'out'}", *overrides]
        command = ["run", "--nproc_per_node", "2", "recipes/grpo.py", "--config", TINY, *options]
        self.process = start_command(tune.main, command, self.printed)
        self.workers: dict[int, int] = {}  # process ids by rank
        self.wait_until(self.has_workers)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, self.process, self.printed)

    def has_workers(self) -> bool:
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for worker in map(int, children.read_text().split()):
                variables = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
                self.workers |= {int(each[5:]): worker for each in variables if each.startswith(b"RANK=")}
        return len(self.workers) == 2

    def has_trained(self) -> bool:
        return any("loss:" in log.read_text() for log in self.folder.glob("out/logs/*"))

    def wait_for_failure(self) -> str:
        """Return what was printed, once the launcher and all ranks have ended, within a minute."""
        started = time.monotonic()
        self.process.join(120)
        printed = self.printed.read_text()
        assert self.process.exitcode not in (None, 0) and time.monotonic() - started < 60, printed
        assert not [worker for worker in self.workers.values() if Path(f"/proc/{worker}").exists()]
        return printed
