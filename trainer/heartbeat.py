"""Who is still there? Each rank beats into the run's store, so that the others can name the ones they lost.

A collective that fails says "connection reset" or "timed out", and only to those who happened to wait for the
lost rank. Here every rank counts upwards in the store that the ranks met at; a counter that stands still
belongs to a rank that is gone, or that nobody can reach. Counters, not times: clocks of hosts differ.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 3.0  # some beats: a busy host may be late
_LEFT = 1 << 40  # what a rank that leaves by itself adds to its counter: it is not lost, and says why it goes


class Heartbeat:
    """The beat of this rank, from construction to ``leave``, in a thread of its own."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._origin, self._rank, self._size = store, rank, size
        # A clone has a connection of its own: a rank that waits at the store must not hold up its beat.
        self._store = self._connect()
        self._stopped = threading.Event()
        self._store.set(f"host/{rank}", socket.gethostname())
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def silent_ranks(self) -> list[str]:
        """Return "rank R on HOST" of every rank whose counter stands still; takes some seconds.

        The store of rank 0 may be what is out of reach, and a call to it then waits for as long as TCP does:
        hence a thread, and an end to waiting for it.
        """
        found: list[list[str]] = []
        looking = threading.Thread(target=lambda: found.append(self._standing_still()), daemon=True)
        looking.start()
        looking.join(timeout=4 * _PATIENCE_SECONDS)
        return found[0] if found else self._nobody_answers()

    def leave(self) -> None:
        """End the beat and let the others know that this rank goes by itself, done or not."""
        self._stopped.set()
        self._thread.join(timeout=_PATIENCE_SECONDS)

    def _standing_still(self) -> list[str]:
        try:
            store = self._connect()  # the beat keeps its own connection
            before = self._counters(store)
            time.sleep(_PATIENCE_SECONDS)
            after = self._counters(store)
            return [
                f"rank {rank} on {store.get(f'host/{rank}').decode()}"
                for rank in range(self._size)
                if before[rank] == after[rank] < _LEFT and rank != self._rank
            ]
        except RuntimeError:  # torch's DistError
            return self._nobody_answers()

    def _nobody_answers(self) -> list[str]:
        return [f"rank 0 at {os.environ.get('MASTER_ADDR', '?')}, where all ranks meet"]

    def _connect(self) -> Any:
        store = self._origin.clone()
        store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
        return store

    def _counters(self, store: Any) -> list[int]:
        return [store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _beat(self) -> None:
        while not self._stopped.wait(EVERY_SECONDS):
            self._add(1)
        self._add(_LEFT)

    def _add(self, count: int) -> None:
        try:
            self._store.add(f"beat/{self._rank}", count)
        except RuntimeError:  # the store is gone, or the network was for a while
            with suppress(RuntimeError):
                self._store = self._connect()
