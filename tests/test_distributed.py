"""Joining: what a rank says when the others do not come, or when it has no device."""

import platform
import resource
from dataclasses import replace

import pytest
import torch
from launching import free_port
from ranks import run_on_ranks

from trainer import distributed
from trainer.distributed import LostRankError, World, joined_world, require_host_memory
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


def test_memory_of_a_host_is_asked_for_by_all_its_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_available_bytes", lambda: 3000)
    with joined_world(10.0) as world:
        three = replace(world, local_size=3)
        require_host_memory(1000, three, "a copy")
        with pytest.raises(UserError, match=r"^a copy needs 3003 bytes on this host .*, 3000 are available"):
            require_host_memory(1001, three, "a copy")


def page_faults_of_a_step(world: World) -> int:
    """Return how many pages eight tensors of 4 MiB cost the second time, all freed before."""
    faults = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        activations = [torch.ones(2**20) for _ in range(8)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        del activations
    return faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    (faults,) = run_on_ranks(page_faults_of_a_step, 1)
    assert faults < 1000  # of 8192 pages, all of which glibc would give back
