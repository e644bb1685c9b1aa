"""The pre-flight: what it finds on real ranks, and what it says when one of them is off."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import Started, options
from ranks import run_on_ranks

from trainer import preflight as pre
from trainer.collectives import wait_for_all
from trainer.distributed import World
from trainer.errors import UserError
from trainer.options import load
from trainer.preflight import Limits, Report, code_hash, find_problems, preflight, require_address, table

LOOSE = Limits(disk_gib=0, slowest=0.0, latency_seconds=60, clock_seconds=60)
LINK = {"latency_seconds": 0.001, "megabytes_per_second": 900.0}


def look(world: World, arguments: list[str], limits: Limits) -> Report:
    return preflight(load(None, arguments), world, limits)


def healthy(rank: int) -> dict[str, Any]:
    return {
        "rank": rank, "host": f"node{rank}", "code": "c0de", "config": "c0f", "versions": "torch 2",
        "data": "da7a", "environment": "", "device": "cpu", "clock_offset_seconds": 0.001,
        "disk_free_gib": 100.0, "shared_memory_gib": 8.0, "shared_memory_needed_gib": 0.1,
        "interface": "eth0", "address": f"10.0.0.{rank}", "wandb": "offline", "gemm_gflops": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_rank_gets_the_same_report_of_all(folder: Path, num_ranks: int) -> None:
    reports = run_on_ranks(look, num_ranks, options(folder, "pre"), LOOSE)
    assert all(report == reports[0] for report in reports)
    report = reports[0]
    assert report.problems == []
    assert [facts["rank"] for facts in report.ranks] == list(range(num_ranks))
    for facts in report.ranks:
        assert facts["code"] == code_hash(pre.ROOT)
        assert facts["gemm_gflops"] > 0
        assert abs(facts["clock_offset_seconds"]) < 5  # one machine, one clock; ranks may wake up late
    assert report.ranks[0]["clock_offset_seconds"] == 0
    assert bool(report.link) == (num_ranks > 1)
    assert table(report).endswith("all well")


def look_with_own_config(world: World, arguments: list[str]) -> Report:
    """Rank 1 lacks the data and has another learning rate; rank 2 a variable and a clock of its own."""
    if world.rank == 1:
        arguments = [*arguments, "data.train=/nowhere", "optim.lr=0.006"]
    if world.rank == 2:
        pre.os.environ["NCCL_IB_DISABLE"] = "1"
        right = pre.time.time
        pre.time.time = lambda: right() + 100.0  # type: ignore[method-assign]
    return preflight(load(None, arguments), world, LOOSE)


def test_what_differs_on_one_rank_is_told_by_all_with_host_and_reason(folder: Path) -> None:
    reports = run_on_ranks(look_with_own_config, 3, options(folder, "pre"))
    assert reports[0] == reports[1] == reports[2]
    found = reports[0].problems
    expected = {
        "(rank 1) has another configuration": 1,
        "(rank 1) has other training data": 1,
        "(rank 1): error: data.train: /nowhere": 1,
        "(rank 2) has other variables: environment is 'NCCL_IB_DISABLE=1', elsewhere ''": 1,
        "(rank 2): its clock is +100.0 s from rank 0's": 1,
    }
    assert {text: sum(text in line for line in found) for text in expected} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"code": "0ther"}, "node1 (rank 1) runs other code: code is '0ther', elsewhere 'c0de'"),
        ({"versions": "torch 1"}, "node1 (rank 1) has other versions: versions is 'torch 1'"),
        ({"device": "A10"}, "node1 (rank 1) has another device: device is 'A10', elsewhere 'cpu'"),
        ({"disk_free_gib": 2.5}, "node1 (rank 1): 2.5 GiB free for the run, 10 wanted"),
        ({"shared_memory_gib": 0.06}, "node1 (rank 1): /dev/shm has 0.06 GiB free, the data workers of"),
        ({"gemm_gflops": 50.0}, "node1 (rank 1) is slow: 50 GFLOP/s, the median is 100"),
        ({"clock_offset_seconds": -3.0}, "node1 (rank 1): its clock is -3.0 s from rank 0's"),
        ({"wandb": "error: out of reach"}, "node1 (rank 1): error: out of reach"),
    ],
)
def test_a_problem_names_host_and_reason(change: dict[str, Any], complaint: str) -> None:
    ranks = [healthy(0), healthy(1) | change, healthy(2)]
    assert find_problems([healthy(0), healthy(1), healthy(2)], LINK, Limits()) == []
    [problem] = find_problems(ranks, LINK, Limits())
    assert problem.startswith(complaint)
    assert problem in table(Report(ranks, LINK, [problem]))


def test_a_slow_link_is_a_problem() -> None:
    ranks = [healthy(0), healthy(1)]
    [slow] = find_problems(ranks, LINK, Limits(megabytes_per_second=1000))
    assert slow.startswith("all ranks: all-reduce moves 900 MB/s, 1000 wanted")
    [late] = find_problems(ranks, LINK | {"latency_seconds": 0.5}, Limits())
    assert late == "all ranks: an all-reduce of one number takes 500 ms"


def slow_reduce(world: World) -> tuple[dict[str, float], float]:
    """Replace the all-reduce by one that takes a known time: rank 1's is the longer."""
    pre.sum_over = lambda x, group: (wait_for_all(group), pre.time.sleep(0.01 * (1 + world.rank)))[1]  # type: ignore[assignment]
    return pre.measure_link(world), 2 * (world.size - 1) / world.size * 4 * (4 << 20)


def test_bandwidth_is_bytes_of_the_bus_over_the_seconds_of_the_slowest_rank() -> None:
    (link, num_bytes), (same, _) = run_on_ranks(slow_reduce, 2)
    assert link == same
    # 0.02 s at least, and on a busy machine not ten times as much
    assert num_bytes / 0.2e6 < link["megabytes_per_second"] <= num_bytes / 0.02e6
    assert 0.02 <= link["latency_seconds"] < 0.2


def test_code_hash_sees_contents_and_names(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    file = tmp_path / "trainer" / "a.py"
    file.write_text("x = 1\n")
    first = code_hash(tmp_path)
    assert first == code_hash(tmp_path)
    file.write_text("x = 2\n")
    second = code_hash(tmp_path)
    file.rename(tmp_path / "trainer" / "b.py")
    assert len({first, second, code_hash(tmp_path)}) == 3


def test_a_name_that_stands_for_loopback_is_refused_before_gloo_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses = {"node2": "127.0.1.1", "master": "10.0.0.1"}
    monkeypatch.setattr(pre.socket, "gethostname", lambda: "node2")
    monkeypatch.setattr(pre.socket, "gethostbyname", addresses.__getitem__)
    monkeypatch.setenv("MASTER_ADDR", "master")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(UserError, match=r"node2: its name stands for 127\.0\.1\.1"):
        require_address()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    require_address()


def test_the_command_ends_with_1_and_the_reason_when_something_is_off(folder: Path) -> None:
    command = (sys.executable, "launch/preflight.py", *options(folder, "pre"), "--json", "--disk-gib", "1e9")
    done = Started(*command).wait()
    assert done.code == 1, done.stderr
    [problem] = json.loads(done.stdout)["problems"]
    assert "GiB free for the run, 1e+09 wanted" in problem


def test_facts_travel_with_any_text() -> None:
    facts = {"rank": 0, "name": "\u00e9\n\u4e2d"}
    [[got]] = run_on_ranks(share_one, 1, facts)
    assert got == facts


def share_one(world: World, facts: dict[str, Any]) -> list[dict[str, Any]]:
    return pre.share(facts, world)
