"""Work beside the main thread: an event loop for async functions, and threads that do not outlive the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import cache, partial
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


def in_daemon_thread(function: Callable[[], Any]) -> Future[Any]:
    """Call a function in a thread of its own; one that hangs does not keep the process from ending.

    >>> in_daemon_thread(lambda: 6 * 7).result()
    42
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            outcome = partial(future.set_exception, error)
        else:
            outcome = partial(future.set_result, result)
        if future.set_running_or_notify_cancel():  # False if nobody waits any longer
            outcome()

    threading.Thread(target=run, name="flexpg worker", daemon=True).start()
    return future


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of the whole run: clients that a reward keeps belong to the loop of their first use."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="flexpg event loop", daemon=True).start()
    return loop
