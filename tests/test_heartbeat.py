"""A rank that is gone is named by those that are left."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from launching import REPOSITORY
from ranks import RankError, run_on_ranks

from trainer import heartbeat
from trainer.collectives import sum_over, wait_for_all
from trainer.distributed import World, bound_all_groups, open_meeting

RANK = """
import os, signal, sys, torch
from launch._main import run
from trainer.collectives import sum_over
from trainer.distributed import joined_world

def main():
    with joined_world(20.0) as world:
        sum_over(torch.ones(1), world.group)
        if world.rank == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        sum_over(torch.ones(1), world.group)

run(main)
"""


@pytest.mark.nightly  # three processes that import torch
@pytest.mark.parametrize("lost", [0, 2])
def test_survivors_name_the_rank_that_was_killed(lost: int) -> None:
    _store, environments = open_meeting(3)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(lost)],
            cwd=REPOSITORY,
            env=os.environ | environment | {"PYTHONPATH": "."},
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL if r == lost else 1 for r in range(3)]
    for rank in {0, 1, 2} - {lost}:
        assert f"LostRankError: lost rank {lost} on {os.uname().nodename} (" in errors[rank], errors[rank]


def fall_silent(world: World) -> None:
    """Rank 2 neither beats nor answers any more, as if its host were gone."""
    world.at(8, "training")
    if world.rank == 2:
        world.at(7, "waiting for data")
        heartbeat.time.sleep(2 * heartbeat.EVERY_SECONDS)
        heartbeat.EVERY_SECONDS = 1e6
        heartbeat.time.sleep(30)
    heartbeat.time.sleep(4 * heartbeat.EVERY_SECONDS)  # rank 2 has told where it is, and beats no more
    bound_all_groups(1.5)
    sum_over(torch.ones(1), world.group)


def test_a_rank_that_is_gone_is_named_where_a_collective_fails() -> None:
    last = "last heard of at step 7, waiting for data"
    with pytest.raises(RankError, match=rf"LostRankError: lost rank 2 on {os.uname().nodename}, {last} \("):
        run_on_ranks(fall_silent, 3)


def hang_elsewhere(world: World) -> None:
    bound_all_groups(1.5)
    world.at(3, "waiting for data" if world.rank else "training")
    if world.rank == 0:
        sum_over(torch.ones(1), world.group)
    heartbeat.time.sleep(30)


def test_ranks_that_live_but_wait_in_different_places_say_where() -> None:
    found = r"ranks hang in different places: rank 0 on \S+ at step 3, training; rank 1 on \S+ at step 3, wai"
    with pytest.raises(RankError, match=found):
        run_on_ranks(hang_elsewhere, 2)


def fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("a mistake of its own")
    sum_over(torch.ones(1), world.group)


def test_a_mistake_of_a_rank_is_not_taken_for_a_loss() -> None:
    with pytest.raises(RankError, match=r"rank 1 failed(?s:.*)RuntimeError: a mistake of its own\n$"):
        run_on_ranks(fail_on_one, 2)


def beats(world: World) -> list[str]:
    heart = heartbeat.Heartbeat(heartbeat_store(), world.rank, world.size)
    found = [heart.missing()]
    if world.rank == 1:
        heart._add = lambda count: None  # type: ignore[method-assign]
    heartbeat.time.sleep(2 * heartbeat.EVERY_SECONDS)
    found.append(heart.missing())
    wait_for_all(world.group)
    if world.rank == 1:
        del heart._add
        heart.leave()
    wait_for_all(world.group)
    return [*found, heart.missing()]


def heartbeat_store() -> object:
    from torch.distributed import PrefixStore, distributed_c10d

    return PrefixStore("another", distributed_c10d._get_default_store())


def test_a_rank_is_silent_once_its_beat_stops_unless_it_says_that_it_leaves() -> None:
    name = os.uname().nodename
    assert run_on_ranks(beats, 2) == [["", f"lost rank 1 on {name}", ""], ["", "", ""]]
