"""How a process ends that was a rank: with the code of what it did, not with that of what came after."""

import os
import subprocess
import sys

import pytest

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


READER_GONE = """
import sys
from launch._main import run

def main():
    for line in range(int(sys.argv[1])):
        print(line)

run(main)
"""


@pytest.mark.parametrize(("lines", "code"), [(1, 0), (100_000, 141)])
def test_a_command_whose_reader_has_gone_ends_without_a_word(lines: int, code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", READER_GONE, str(lines)]
    environment = {**os.environ, "PYTHONPATH": ".", "PYTHONUNBUFFERED": ""}  # written when 8 KiB are full
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (code, b"")
