"""Who is still there, and where? Each rank beats into the run's store, so that the others can name the lost.

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
        self._where = self._told = ""
        self._store.set(f"host/{rank}", socket.gethostname())
        self._store.set(f"where/{rank}", "")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """Say that this rank is in ``step`` (from 1), and what it is about to do; costs nothing."""
        self._where = f"step {step}, {doing}"

    def missing(self) -> str:
        """Return which ranks are lost, or that ranks wait in different places; else "". Takes some seconds.

        The store of rank 0 may be what is out of reach, and a call to it then waits for as long as TCP does:
        hence a thread, and an end to waiting for it.
        """
        found: list[str] = []
        looking = threading.Thread(target=lambda: found.append(self._look()), daemon=True)
        looking.start()
        looking.join(timeout=4 * _PATIENCE_SECONDS)
        return found[0] if found else self._nobody_answers()

    def leave(self) -> None:
        """End the beat and let the others know that this rank goes by itself, done or not."""
        self._stopped.set()
        self._thread.join(timeout=_PATIENCE_SECONDS)

    def _look(self) -> str:
        try:
            store = self._connect()  # the beat keeps its own connection
            before = self._counters(store)
            time.sleep(_PATIENCE_SECONDS)
            after = self._counters(store)
            hosts, places = self._texts(store, "host"), self._texts(store, "where")
        except RuntimeError:  # torch's DistError
            return self._nobody_answers()
        places[self._rank] = self._where
        here = [rank for rank in range(self._size) if after[rank] < _LEFT]
        silent = [rank for rank in here if before[rank] == after[rank] and rank != self._rank]
        if silent:
            last = [f", last heard of at {place}" if place else "" for place in places]
            return "lost " + ", ".join(f"rank {rank} on {hosts[rank]}{last[rank]}" for rank in silent)
        if len({places[rank] for rank in here}) > 1:
            told = [f"rank {rank} on {hosts[rank]} at {places[rank] or 'its start'}" for rank in here]
            return f"ranks hang in different places: {'; '.join(told)}"
        return ""

    def _nobody_answers(self) -> str:
        return f"lost rank 0 at {os.environ.get('MASTER_ADDR', '?')}, where all ranks meet"

    def _connect(self) -> Any:
        store = self._origin.clone()
        store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
        return store

    def _counters(self, store: Any) -> list[int]:
        return [store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _texts(self, store: Any, key: str) -> list[str]:
        return [store.get(f"{key}/{rank}").decode() for rank in range(self._size)]

    def _beat(self) -> None:
        while not self._stopped.wait(EVERY_SECONDS):
            self._add(1)
        self._add(_LEFT)

    def _add(self, count: int) -> None:
        try:
            self._store.add(f"beat/{self._rank}", count)
            if self._told != self._where:
                self._told = self._where
                self._store.set(f"where/{self._rank}", self._told)
        except RuntimeError:  # the store is gone, or the network was for a while
            with suppress(RuntimeError):
                self._store = self._connect()
