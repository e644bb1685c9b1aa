"""Joining: what a rank says when the others do not come, or when it has no device."""

from dataclasses import replace

import pytest
import torch
from launching import free_port

from trainer import distributed
from trainer.distributed import LostRankError, joined_world, require_host_memory
from trainer.errors import UserError


@pytest.mark.parametrize(("rank", "reason"), [(0, "1/3 clients joined"), (1, "")])
def test_a_rank_that_waits_alone_says_for_how_many_and_where(
    monkeypatch: pytest.MonkeyPatch, rank: int, reason: str
) -> None:
    port = str(free_port())
    launched = {
        "RANK": rank,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 3,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    complaint = f"not all of 3 ranks came to 127.0.0.1:{port} within 1 s.*{reason}"
    with pytest.raises(LostRankError, match=complaint), joined_world(1.0):
        pass


def test_more_slots_than_devices_are_refused_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: "node7")
    with pytest.raises(UserError, match="node7: rank 4 of this host has no device, there are 4; see slots="):
        distributed._device(4)


@pytest.mark.parametrize(("node", "expected"), [(0, "2"), (2, "2"), (3, "1")])
def test_srun_says_the_ranks_of_this_host_however_tasks_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, node: int, expected: str
) -> None:
    said = {"PROCID": "0", "NTASKS": "7", "LOCALID": "0", "NODEID": str(node), "TASKS_PER_NODE": "2(x3),1"}
    slurm = {f"SLURM_{name}": value for name, value in said.items()}
    monkeypatch.setattr(distributed.os, "environ", slurm | {"MASTER_ADDR": "a"})
    distributed._read_slurm()
    assert (distributed.os.environ["LOCAL_WORLD_SIZE"], distributed.os.environ["WORLD_SIZE"]) == (
        expected,
        "7",
    )


def test_memory_of_a_host_is_asked_for_by_all_its_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_available_bytes", lambda: 3000)
    with joined_world(10.0) as world:
        three = replace(world, local_size=3)
        require_host_memory(1000, three, "a copy")
        with pytest.raises(UserError, match=r"^a copy needs 3003 bytes on this host .*, 3000 are available"):
            require_host_memory(1001, three, "a copy")
