"""Training on several hosts, for real: `deepspeed --hostfile` over pdsh and ssh, and what happens when one,
its cable or a rank is lost. `make test-cluster` runs this; about a minute a test on two cores.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import skip_without_rights
from hosts import Hosts, hosts_up
from launching import BIN, REPOSITORY, Finished, Started, free_port, read_metrics

# engine.timeout_seconds of the runs that lose something in silence. On two busy cores a rank can be 10 s late
# for its first step, which is not what these tests are about.
TIMEOUT = 25.0
STEPS = 24
# Starting torch three times, one after the other, has taken so long while the load was 15.
BUSY = 43.0
# What the launcher itself adds until it has ended: ssh's 2 x 5 s to see a dead host, its clean-up over ssh.
LAUNCHER = 35.0


def arguments(digits: Path, root: Path, name: str, *more: str) -> list[str]:
    """Return the demo's recipe, shortened."""
    return [
        "--config", "configs/demo.yaml", f"data.train={digits / 'train'}",
        f"eval.classification.test={digits / 'test'}", f"run.root={root}", f"run.name={name}",
        f"optim.steps={STEPS}", "optim.epochs=null", "log.every_steps=1", "data.workers=1",
        # At the recipe's rates rounding differences grow to more than 1e-4 in 24 steps.
        "optim.lr=0.0001", "head.lr_multiplier=1", *more,
    ]  # fmt: skip


def long_run(digits: Path, root: Path, name: str, timeout_seconds: float) -> list[str]:
    """Return a run that goes on for long enough to lose something, with checkpoints to go on from."""
    return arguments(
        digits, root, name, "optim.steps=3000", "optim.schedule=constant", "checkpoint.every_steps=10",
        f"engine.timeout_seconds={timeout_seconds}",
    )  # fmt: skip


def start(
    cluster: Hosts, slots: Mapping[str, int | str], script: str, *options: str, root: Path, on: str = "node1"
) -> Started:
    """Start ``deepspeed --hostfile`` on a host as docs/cluster.md says."""
    hostfile = root / "hostfile"
    hostfile.write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
    command = (BIN / "deepspeed", "--hostfile", hostfile, "--master_port", str(free_port()), script, *options)
    return Started(*cluster.command(on, *command), **variables(root))


def variables(root: Path) -> dict[str, str]:
    """Return the environment of the launcher; what is for all hosts it reads from a file."""
    file = root / "deepspeed_env"
    file.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    return {
        "DS_ENV_FILE": str(file),
        "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=2",
        "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin",
    }


def losses(run: Path) -> torch.Tensor:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return torch.tensor([line["train/loss"] for line in lines], dtype=torch.float64)


def wait_for_step(run: Path, step: int, started: Started, seconds: float = 240) -> None:
    def steps_done() -> int:
        metrics = run / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    wait_until(lambda: steps_done() >= step, started, seconds)


def wait_for_checkpoint(run: Path, started: Started, seconds: float = 240) -> None:
    wait_until(lambda: any((run / "checkpoints").glob("step-*")), started, seconds)


def wait_until(is_so: Callable[[], bool], started: Started, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if started.process.poll() is not None:
            raise AssertionError(started.wait().stderr[-3000:])
        if time.monotonic() > deadline:
            started.wait(0)  # raises with what it has said
        time.sleep(0.2)


def assert_nothing_is_left(cluster: Hosts, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while left := [(name, p) for name in cluster.names for p in cluster.python_processes(name)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@contextmanager
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Yield hosts that a test may break."""
    skip_without_rights()
    with hosts_up(tmp_path_factory.mktemp("hosts"), 2) as both:
        yield both


@pytest.fixture(scope="module")
def one_process(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are compared with: one process, one host."""
    root = tmp_path_factory.mktemp("one")
    done = Started(sys.executable, "launch/train.py", *arguments(digits, root, "one")).wait()
    assert done.code == 0, done.stderr
    return root / "one"


@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_the_loss_curve_on_two_hosts_is_that_of_one_process(
    cluster: Hosts, digits: Path, one_process: Path, tmp_path: Path, ranks_per_host: int
) -> None:
    slots = dict.fromkeys(cluster.names, ranks_per_host)
    done = start(
        cluster, slots, "launch/train.py", *arguments(digits, tmp_path, "many"), root=tmp_path
    ).wait()
    assert done.code == 0, done.stderr
    # float32 sums in another order, 24 steps
    torch.testing.assert_close(losses(tmp_path / "many"), losses(one_process), rtol=1e-4, atol=0)
    assert json.loads((tmp_path / "many" / "done.json").read_text())["step"] == STEPS
    assert f" {2 * ranks_per_host} on cpu, {ranks_per_host} on this host" in done.stderr
    assert len(list((tmp_path / "many" / "wandb").glob("offline-run-*"))) == 1  # rank 0's, of all hosts
    assert_nothing_is_left(cluster)


def test_a_rank_that_is_killed_ends_all_with_its_name(cluster: Hosts, digits: Path, tmp_path: Path) -> None:
    started = start(
        cluster, dict.fromkeys(cluster.names, 1), "launch/train.py", *long_run(digits, tmp_path, "kill", 600),
        root=tmp_path,
    )  # fmt: skip
    wait_for_step(tmp_path / "kill", 3, started)
    [victim] = cluster.rank_processes("node2")
    cluster.run("node2", "kill", "-9", str(victim))
    done = ends_in_time(started)
    assert done.code != 0
    assert "lost rank 1 on node2" in done.stderr, done.stderr[-4000:]
    assert "lost rank 1 on node2" in (tmp_path / "kill" / "log.txt").read_text()
    assert not (tmp_path / "kill" / "done.json").exists()
    assert_nothing_is_left(cluster)


@pytest.mark.parametrize("how", ["power", "cable"])
def test_a_host_or_cable_that_is_lost_ends_all_in_time_and_fewer_hosts_go_on(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, tmp_path: Path, how: str
) -> None:
    with two_hosts(tmp_path_factory) as cluster:
        run, training = tmp_path / how, long_run(digits, tmp_path, how, TIMEOUT)
        started = start(cluster, {"node1": 1, "node2": 1}, "launch/train.py", *training, root=tmp_path)
        wait_for_checkpoint(run, started)
        if how == "power":
            cluster.power_off("node2")
        else:
            cluster.cut("node2")
        done = ends_in_time(started)
        assert done.code != 0
        assert "lost rank 1 on node2" in done.stderr, done.stderr[-4000:]
        if how == "cable":  # the other side ended by itself too, though nobody could reach it
            assert_nothing_is_left(cluster, seconds=TIMEOUT + LAUNCHER)
        # Its newest complete checkpoint lies at 10 steps or later: the rest of the hosts go on from there.
        newest = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
        training[training.index("optim.steps=3000")] = f"optim.steps={newest + 5}"
        done = start(cluster, {"node1": 1}, "launch/train.py", *training, root=tmp_path).wait()
        assert done.code == 0, done.stderr
        assert f"resumed from {run / 'checkpoints'}" in done.stderr
        assert len(losses(run)) == newest + 5


def test_a_slow_link_changes_nothing_but_time(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, one_process: Path, tmp_path: Path
) -> None:
    """In mid-run node2 is left 20 Mbit/s, then 10 ms are added to a round trip and a frame in 200 is lost."""
    with two_hosts(tmp_path_factory) as cluster:
        training = arguments(digits, tmp_path, "slow")
        started = start(cluster, {"node1": 1, "node2": 1}, "launch/train.py", *training, root=tmp_path)
        wait_for_step(tmp_path / "slow", 1, started)
        cluster.limit("node2", "20mbit")
        wait_for_step(tmp_path / "slow", 4, started)
        cluster.disturb("node2", delay_ms=5, loss=0.005)
        done = started.wait()
        assert done.code == 0, done.stderr
        assert cluster.connecting_seconds("node1", "node2") >= 0.01
        torch.testing.assert_close(losses(tmp_path / "slow"), losses(one_process), rtol=1e-4, atol=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_reach_every_rank(
    cluster: Hosts, digits: Path, tmp_path: Path, number: signal.Signals
) -> None:
    started = start(
        cluster, dict.fromkeys(cluster.names, 1), "launch/train.py", *long_run(digits, tmp_path, "stop", 600),
        root=tmp_path,
    )  # fmt: skip
    wait_for_step(tmp_path / "stop", 3, started)
    [runner] = [pid for pid, args in cluster.python_processes("node1") if "--hostfile" in args]
    cluster.run("node1", "kill", f"-{number.name[3:]}", str(runner))
    assert ends_in_time(started).code != 0
    assert_nothing_is_left(cluster)


def test_preflight_finds_other_code_on_one_host(cluster: Hosts, digits: Path, tmp_path: Path) -> None:
    slots, options = dict.fromkeys(cluster.names, 1), arguments(digits, tmp_path, "pre")
    loose = ("--json", "--disk-gib", "0", "--slowest", "0", "--latency-seconds", "9", "--clock-seconds", "9")
    file = REPOSITORY / "trainer" / "scale.py"
    cluster.overlay("node2", file, file.read_text() + "# changed on one host\n")
    try:
        done = start(cluster, slots, "launch/preflight.py", *options, *loose, root=tmp_path).wait()
    finally:
        cluster.remove_overlay("node2", file)
    assert done.code == 1, done.stderr
    [line] = [line for line in done.stdout.splitlines() if '"problems"' in line]
    report = json.loads(line[line.index("{") :])  # pdsh writes the host before it
    assert [facts["host"] for facts in report["ranks"]] == cluster.names
    assert [facts["interface"] for facts in report["ranks"]] == ["eth0", "eth0"]
    [problem] = report["problems"]
    assert problem.startswith("node2 (rank 1) runs other code")


def test_elastic_goes_on_with_the_host_that_is_left(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, tmp_path: Path
) -> None:
    with two_hosts(tmp_path_factory) as cluster:
        run, training = tmp_path / "elastic", long_run(digits, tmp_path, "elastic", TIMEOUT)
        training[training.index("optim.steps=3000")] = "optim.steps=100"
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
        started = supervised(cluster, hostfile, "--max-restarts", "1", *training)
        wait_for_checkpoint(run, started)
        cluster.power_off("node2")
        done = started.wait(400)
        assert done.code == 0, done.stderr[-4000:]
        assert "node2 is left out: ssh: connect to host node2" in done.stderr
        assert "try 2 of 2 on node1 x 1" in done.stderr
        assert "resumed from" in done.stderr
        assert json.loads((run / "done.json").read_text())["step"] == 100
        assert len(losses(run)) == 100


def test_torchrun_starts_all_ranks_again_when_one_is_killed(
    cluster: Hosts, digits: Path, tmp_path: Path
) -> None:
    run, training = tmp_path / "torchrun", long_run(digits, tmp_path, "torchrun", TIMEOUT)
    training[training.index("optim.steps=3000")] = "optim.steps=100"
    environment = variables(tmp_path) | {"GLOO_SOCKET_IFNAME": "eth0", "PORT": str(free_port())}
    environment |= {"NODES": "2", "GPUS": "1", "FIRST_HOST": "node1", "RESTARTS": "2"}
    command = ("launch/cluster/torchrun.sh", *training)
    both = [Started(*cluster.command(name, *command), **environment) for name in cluster.names]
    wait_for_checkpoint(run, both[0])
    [victim] = cluster.rank_processes("node2")
    cluster.run("node2", "kill", "-9", str(victim))
    done = [one.wait(300) for one in both]
    assert [one.code for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    assert "resumed from" in done[0].stderr
    assert json.loads((run / "done.json").read_text())["step"] == len(losses(run)) == 100
    assert_nothing_is_left(cluster)


@pytest.mark.parametrize("script", ["launch/preflight.py", "launch/elastic.py"])
def test_a_host_that_does_not_answer_is_named_within_a_minute(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, tmp_path: Path, script: str
) -> None:
    with two_hosts(tmp_path_factory) as cluster:
        cluster.cut("node2")
        training = arguments(digits, tmp_path, "absent")
        if script == "launch/preflight.py":
            options = (*training, "--timeout-seconds", "10")
            started = start(cluster, dict.fromkeys(cluster.names, 1), script, *options, root=tmp_path)
            reason = "not all of 2 ranks came to 10.77.0.1"
        else:
            hostfile = tmp_path / "hostfile"
            hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
            more = ("--min-hosts", "2", "--max-restarts", "0")
            started = supervised(cluster, hostfile, *more, *training)
            reason = "try 1 of 1: 1 hosts, 2 needed"
        done = started.wait(60 + BUSY)
        assert done.code != 0, done.stderr
        assert "ssh: connect to host node2 port 22" in done.stderr
        assert reason in done.stderr


def test_wrong_slots_end_the_launcher_with_the_line(cluster: Hosts, digits: Path, tmp_path: Path) -> None:
    slots = {"node1": "1", "node2": "many"}
    done = start(
        cluster, slots, "launch/train.py", *arguments(digits, tmp_path, "slots"), root=tmp_path
    ).wait(60)
    assert done.code == 1
    assert "node2 slots=many" in done.stderr
    assert not (tmp_path / "slots").exists()


def supervised(cluster: Hosts, hostfile: Path, *options: str) -> Started:
    """Start launch/elastic.py on node1."""
    script = (sys.executable, "launch/elastic.py", "--hostfile", hostfile, "--pause-seconds", "1")
    return Started(*cluster.command("node1", *script, *options), **variables(hostfile.parent))


def ends_in_time(started: Started) -> Finished:
    """Wait for the end of a run that lost something: its time-out, and what the launcher needs."""
    return started.wait(TIMEOUT + LAUNCHER)
