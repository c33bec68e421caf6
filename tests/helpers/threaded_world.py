"""Ranks that are threads of one process: a World whose exchanges are a list and a barrier."""

import threading
from collections.abc import Callable
from typing import Any

from octad.dist import World


class Exchange:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size


class ThreadedWorld(World):
    def __init__(self, rank: int, exchange: Exchange) -> None:
        super().__init__(rank, len(exchange.slots))
        object.__setattr__(self, "exchange", exchange)

    def gather(self, value: Any) -> list[Any]:
        exchange = self.exchange  # type: ignore[attr-defined]
        exchange.slots[self.rank] = value
        exchange.barrier.wait()
        found = list(exchange.slots)
        exchange.barrier.wait()
        return found

    def by_leader(self, work: Callable[[], Any], group: Any = None) -> Any:
        told: Any = None
        if self.leads:
            try:
                told = work()
            except Exception as error:
                told = error
        told = self.gather(told)[0]
        if isinstance(told, Exception):
            raise told
        return told


def on_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What each rank gets, or raises."""
    exchange, found = Exchange(size), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadedWorld(rank, exchange))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
