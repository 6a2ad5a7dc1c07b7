"""One event loop in a thread, in which async reward functions run concurrently."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from functools import cache
from typing import Any


def run_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Await all, and return their results in order; if one raises, the others are cancelled.

    Works in a notebook too, whose own event loop is running.

    >>> run_all([asyncio.sleep(0.01, result="a"), asyncio.sleep(0.001, result="b")])
    ['a', 'b']
    """

    async def gather() -> list[Any]:
        tasks = [asyncio.ensure_future(each) for each in awaitables]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise

    return asyncio.run_coroutine_threadsafe(gather(), _event_loop()).result() if awaitables else []


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of the whole run: clients that a reward keeps belong to the loop of their first use."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="flexpg event loop", daemon=True).start()
    return loop
