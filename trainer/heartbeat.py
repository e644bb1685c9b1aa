"""Who is still there? Each rank beats into the run's store, so that the others can name the ones they lost.

A collective that fails says "connection reset" or "timed out", and only to those who happened to wait for the
lost rank. Here every rank counts upwards in the store that the ranks met at; a counter that stands still
belongs to a rank that is gone, or that nobody can reach. Counters, not times: clocks of hosts differ.
"""

import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 2.5  # two beats, and some
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
        """Return "rank R on HOST" of every rank whose counter stands still; takes some seconds."""
        try:
            own = self._connect()  # the beat keeps its own connection
            before = self._counters(own)
            time.sleep(_PATIENCE_SECONDS)
            after = self._counters(own)
            return [
                f"rank {rank} on {own.get(f'host/{rank}').decode()}"
                for rank in range(self._size)
                if before[rank] == after[rank] < _LEFT and rank != self._rank
            ]
        except RuntimeError:  # torch's DistError
            return ["rank 0, where all ranks meet"]

    def leave(self) -> None:
        """End the beat and let the others know that this rank goes by itself, done or not."""
        self._stopped.set()
        self._thread.join()
        with suppress(RuntimeError):  # the store may be gone
            self._store.add(f"beat/{self._rank}", _LEFT)

    def _connect(self) -> Any:
        store = self._origin.clone()
        store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
        return store

    def _counters(self, store: Any) -> list[int]:
        return [store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _beat(self) -> None:
        while not self._stopped.wait(EVERY_SECONDS):
            try:
                self._store.add(f"beat/{self._rank}", 1)
            except RuntimeError:  # the store is gone, or the network was for a while
                with suppress(RuntimeError):
                    self._store = self._connect()
