"""Run a function on real ranks: processes of their own, joined by gloo as in training.

The processes are forked from a server that has imported torch, DeepSpeed and the trainer and has never run a
kernel, hence has no threads a fork could lose. A rank then starts in about 0.1 s instead of about 10 s.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from torch.distributed import TCPStore

from trainer.distributed import joined_world

_server = multiprocessing.get_context("forkserver")
# DeepSpeed imports the last one, and with it torch's compiler (4 s), when it meets an optimizer under ZeRO.
_server.set_forkserver_preload(
    ["trainer.state", "trainer.joint", "trainer.evaluate", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


class RankError(AssertionError):
    """The first failure among the ranks, with its traceback."""


def run_on_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """Return ``function(world, *args)`` of every rank, in rank order.

    ``function`` is one of a module's top level; arguments and results are pickled. Raises RankError for the
    first rank that fails, and TimeoutError; no process outlives the call.
    """
    # The store takes a free port and keeps it, so no other process can step in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    task = pickle.dumps((function, args))
    ranks: dict[Connection, ForkServerProcess] = {}
    try:
        for rank in range(num_ranks):
            receiver, sender = _server.Pipe(duplex=False)
            process = _server.Process(target=_rank_main, args=(sender, rank, num_ranks, store.port, task))
            process.start()
            sender.close()
            ranks[receiver] = process
        return _collect(ranks, time.monotonic() + timeout_seconds)
    finally:
        for process in ranks.values():
            process.kill()
            process.join()


def _collect(ranks: dict[Connection, ForkServerProcess], deadline: float) -> list[Any]:
    """Return the results in rank order; raise what the first rank to fail says."""
    order, results = list(ranks), {}
    while len(results) < len(ranks):
        waiting = [receiver for receiver in order if receiver not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer in time from ranks {[order.index(r) for r in waiting]}")
        for receiver in ready:
            rank = order.index(receiver)
            try:
                succeeded, result = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[receiver].join()
                raise RankError(f"rank {rank} ended with exit code {ranks[receiver].exitcode}") from None
            if not succeeded:
                raise RankError(f"rank {rank} failed:\n{result}")
            results[receiver] = result
    return [results[receiver] for receiver in order]


def _rank_main(sender: Connection, rank: int, num_ranks: int, port: int, task: bytes) -> None:
    """Be one rank: join, run the task, answer (True, result) or (False, traceback)."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(num_ranks), LOCAL_SIZE=str(num_ranks))
    # "The store is there already": no rank tries to serve it.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(task)
        with joined_world(timeout_seconds=60.0) as world:
            result = function(world, *args)
        answer = pickle.dumps((True, result))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
