"""How a process ends that was a rank: with the code of what it did, not with that of what came after."""

import subprocess
import sys

from tests.launching import REPOSITORY
from trainer.distributed import open_meeting

# Whoever waits for the interpreter's lock gets it late: a thread of gloo that lets go of a tensor then finds
# the interpreter being taken apart, as it does once in a few hundred runs on a busy machine.
RANK = """
import sys, torch
from launch._main import run
from trainer.collectives import max_over
from trainer.distributed import joined_world

def main():
    sys.setswitchinterval(10.0)
    with joined_world(60.0) as world:
        for _ in range(20):
            max_over(torch.ones(3), world.group)
    print("done")

run(main)
"""


def test_ranks_that_are_done_end_with_0_while_threads_of_gloo_still_hold_tensors() -> None:
    _store, environments = open_meeting(3)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=REPOSITORY,
            env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    assert [(rank.communicate(timeout=60)[0], rank.returncode) for rank in ranks] == [("done\n", 0)] * 3
