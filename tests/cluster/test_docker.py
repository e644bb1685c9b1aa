"""The image, for real: `make docker-test` builds docker/Dockerfile, twice, looks into it and trains in it.

Uses the engine that answers, or starts one by docker/engine.sh (root), with stand-ins for base images where
no registry can be reached. An image of VARIANT=cuda (the default) takes 7 GB, 9 GB while it is built; with an
engine of its own the first is removed before the second is built. ENGINE_MEMORY=9g keeps all of it in memory,
REBUILD=0 builds only once.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import REPOSITORY, Started, read_metrics
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ENGINE = Path(os.environ.get("ENGINE", Path.home() / ".cache" / "coco-trainer" / "engine"))
BASE = re.search(r"^ARG BASE_IMAGE=(\S+)$", (REPOSITORY / "docker/Dockerfile").read_text(), re.M)[1]  # type: ignore[index]
IMAGE = "coco-trainer:test"
VARIANT = os.environ.get("VARIANT", "cuda")  # the Makefile reads it too
CUDA_ONLY = ("nvidia-", "cuda-", "triton")  # as in docker/lock.py
STEPS = 12
HARDENED = ("--network=none", "--read-only", "--tmpfs=/tmp:mode=1777", "--cap-drop=ALL", "--shm-size=512m")


class Docker:
    """A client and the engine it talks to, which is of this test alone or not."""

    def __init__(self, program: str, options: tuple[str, ...], is_own: bool, **environment: str) -> None:
        self.program, self.options, self.is_own = program, options, is_own
        self.environment = {**os.environ, "DOCKER_BUILDKIT": "1", **environment}

    def __call__(self, *arguments: str, seconds: float = 1800) -> str:
        done = subprocess.run(
            [self.program, *arguments],
            cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, (
            f"docker {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
        return done.stdout

    def build(self, tag: str, *more: str) -> None:
        """Build by the Makefile's own line."""
        options = " ".join((*self.options, f"--tag {tag}", *more))
        subprocess.run(
            ["make", "docker", f"DOCKER={self.program}", f"DOCKER_OPTIONS={options}"],
            cwd=REPOSITORY, env=self.environment, check=True, timeout=3000,
        )  # fmt: skip

    def forget(self, tag: str) -> None:
        """Remove an image, and with an engine of this test's own what its build has kept."""
        self("image", "rm", tag, f"coco-trainer:{VARIANT}")
        if self.is_own:
            self("image", "prune", "--force")
            self("builder", "prune", "--all", "--force")

    def in_image(self, *command: str, options: tuple[str, ...] = HARDENED) -> str:
        return self("run", "--rm", *options, IMAGE, *command)


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """The engine of this machine, or one of its own that stops afterwards."""
    if shutil.which("docker") and not subprocess.run(["docker", "version"], capture_output=True).returncode:
        yield Docker("docker", (), is_own=False)
        return
    for program, package in (("dockerd", "docker.io"), ("debootstrap", "debootstrap")):
        if os.geteuid() != 0 or not shutil.which(program):
            reason = f"no Docker engine answers, and to start one needs root and Debian's {package}"
            if os.environ.get("REQUIRE_DOCKER") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
    environment = os.environ | {"ENGINE": str(ENGINE)}
    for command in (["up"], ["base", BASE], ["serve"]):
        subprocess.run(["docker/engine.sh", *command], cwd=REPOSITORY, env=environment, check=True)
    options = ("--network=host", f"--secret id=pip,src={ENGINE / 'pip.conf'}")
    try:
        yield Docker("/usr/bin/docker", options, is_own=True, DOCKER_HOST=f"unix://{ENGINE / 'docker.sock'}")
    finally:
        subprocess.run(["docker/engine.sh", "down"], cwd=REPOSITORY, env=environment, check=True)


@pytest.fixture(scope="session")
def image(docker: Docker) -> str:
    docker.build(IMAGE)
    return IMAGE


@pytest.fixture(scope="session")
def files(docker: Docker, image: str) -> dict[str, str]:
    return files_of(docker, image)


def files_of(docker: Docker, image: str) -> dict[str, str]:
    """Return path -> kind, mode, owner and content hash of every file of an image; times are left out."""
    container = docker("create", image).strip()
    found = {}
    try:
        command = [docker.program, "export", container]
        with subprocess.Popen(command, env=docker.environment, stdout=subprocess.PIPE) as exported:
            with tarfile.open(fileobj=exported.stdout, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member) if member.isfile() else None
                    digest = (
                        hashlib.file_digest(content, "sha256").hexdigest() if content else member.linkname
                    )
                    found[member.name] = f"{member.type!r} {member.mode:o} {member.uid}:{member.gid} {digest}"
            assert exported.wait() == 0
    finally:
        docker("rm", container)
    # What the engine itself puts there when a container is made.
    return {
        name: entry
        for name, entry in found.items()
        if not name.startswith(("dev/", "proc", "sys", "etc/mtab"))
    }


def test_it_runs_as_nobody_in_particular_and_carries_labels(docker: Docker, image: str) -> None:
    [inspected] = json.loads(docker("image", "inspect", image))
    lock = hashlib.sha256((REPOSITORY / "requirements.lock").read_bytes()).hexdigest()
    revision = subprocess.check_output(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=REPOSITORY, text=True
    )
    labels = inspected["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == revision.strip()
    assert labels["coco-trainer.lock-sha256"] == lock
    assert labels["coco-trainer.variant"] == VARIANT
    assert inspected["Config"]["User"] == "1000"
    assert docker.in_image("id", "-u").strip() == "1000"


def test_its_packages_are_those_of_the_lock(docker: Docker, image: str) -> None:
    listed = docker.in_image("python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check")
    found = {canonicalize_name(p["name"]): p["version"].partition("+")[0] for p in json.loads(listed)}
    python = docker.in_image("python", "-c", "import platform; print(platform.python_version())").strip()
    pins = [Requirement(line.rstrip(" \\")) for line in LOCK.splitlines() if re.match(r"\w\S*==", line)]
    locked = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate({"python_full_version": python})
    }
    if VARIANT == "cpu":
        locked = {name: pin for name, pin in locked.items() if not name.startswith(CUDA_ONLY)}
    assert len(locked) > 50
    assert {name: found.get(name) for name in locked} == locked


def test_it_holds_no_credentials_caches_or_compilers(
    docker: Docker, image: str, files: dict[str, str]
) -> None:
    wrong = re.compile(
        r"(^|/)(\.netrc|\.git|\.ssh|id_rsa|id_ed25519|ssh_host_\w+|pip\.conf|\.pypirc|credentials)$"
        r"|^root/\.cache/.|^tmp/.|^var/lib/apt/lists/.|^usr/bin/(gcc|g\+\+|cc)$|^app/(data|runs)/.|\.whl$"
    )
    # An empty place where the secret was mounted, and what Python itself makes environments with.
    allowed = re.compile(r"^etc/pip\.conf$|^usr/local/lib/python[\d.]+/ensurepip/_bundled/")
    assert [name for name in files if wrong.search(name) and not allowed.search(name)] == []
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert not re.search(r"(token|password|secret=|api_key)", history, re.I)


@pytest.fixture(scope="session")
def outside(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The losses of a run on this machine, without any image."""
    root = tmp_path_factory.mktemp("outside")
    done = Started(sys.executable, "launch/train.py", *arguments(digits, root)).wait()
    assert done.code == 0, done.stderr
    return losses(root)


def arguments(data: Path | str, root: Path | str) -> tuple[str, ...]:
    """Return the demo's recipe, shortened."""
    return (
        "--config", "configs/demo.yaml", f"optim.steps={STEPS}", "optim.epochs=null", "log.every_steps=1",
        "log.progress=false", "optim.lr=0.0001", "head.lr_multiplier=1", f"data.train={data}/train",
        f"eval.classification.test={data}/test", f"run.root={root}",
    )  # fmt: skip


def losses(root: Path) -> torch.Tensor:
    return torch.tensor([line["train/loss"] for line in read_metrics(root / "demo")], dtype=torch.float64)


def mounted(digits: Path, runs: Path) -> tuple[str, ...]:
    """Return the options of a container that reads data and writes runs on this machine's disk."""
    runs.mkdir()
    runs.chmod(0o777)  # the user of the image is nobody here
    digits.chmod(0o755)
    variables = ("--env=OMP_NUM_THREADS=1", "--env=DS_ACCELERATOR=cpu")
    return (*HARDENED, f"--volume={digits}:/app/data:ro", f"--volume={runs}:/app/runs", *variables)


def test_the_same_run_gives_the_same_curve_inside_and_outside(
    docker: Docker, image: str, digits: Path, outside: torch.Tensor, tmp_path: Path
) -> None:
    options = mounted(digits, tmp_path / "runs")
    docker.in_image("python", "launch/train.py", *arguments("data", "runs"), options=options)
    inside = losses(tmp_path / "runs")
    assert len(inside) == STEPS
    assert torch.equal(inside, outside)


def test_two_containers_train_together_on_a_cable_of_their_own(
    docker: Docker, image: str, digits: Path, outside: torch.Tensor, tmp_path: Path
) -> None:
    """As docker/compose.yaml has it, but connected by hand: the engine of this test has no networks."""
    if not docker.is_own:
        pytest.skip("connecting containers needs root and an engine on this machine")
    addresses = {"node1": "10.78.0.1", "node2": "10.78.0.2"}
    options = (
        *mounted(digits, tmp_path / "runs"), *(f"--add-host={n}:{a}" for n, a in addresses.items()),
        "--env=NODES=2", "--env=GPUS=1", "--env=FIRST_HOST=node1", "--env=GLOO_SOCKET_IFNAME=eth0",
    )  # fmt: skip
    wait = 'until [ -e runs/connected ]; do sleep 0.1; done; exec launch/cluster/torchrun.sh "$@"'
    command = (IMAGE, "bash", "-c", wait, "torchrun.sh", *arguments("data", "runs"))
    both = [docker("run", "--detach", f"--hostname={n}", *options, *command).strip() for n in addresses]
    try:
        pids = [docker("inspect", "--format", "{{.State.Pid}}", one).strip() for one in both]
        ends = ("netns", pids[0], "type", "veth", "peer", "name", "eth0", "netns", pids[1])
        subprocess.run(["ip", "link", "add", "eth0", *ends], check=True)
        for pid, address in zip(pids, addresses.values(), strict=True):
            inside = ("nsenter", "--target", pid, "--net", "ip")
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", "eth0"], check=True)
            subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)
        (tmp_path / "runs" / "connected").touch()
        codes = [docker("wait", one, seconds=300).strip() for one in both]
        assert codes == ["0", "0"], [docker("logs", "--tail", "30", one) for one in both]
    finally:
        docker("rm", "--force", *both)
    # float32 sums in another order
    torch.testing.assert_close(losses(tmp_path / "runs"), outside, rtol=1e-4, atol=0)


def test_the_tests_run_inside(docker: Docker, image: str) -> None:
    chosen = (
        "tests/test_head.py",
        "tests/test_fused.py",
        "tests/test_collectives.py",
        "tests/test_options.py",
    )
    told = docker.in_image("python", "-m", "pytest", "-p", "no:cacheprovider", *chosen)
    assert re.search(r"^\d+ passed", told, re.M), told[-2000:]
    assert not re.search(r"\d skipped", told)


@pytest.mark.skipif(os.environ.get("REBUILD") == "0", reason="REBUILD=0: no second build")
def test_two_builds_hold_the_same_files(docker: Docker, image: str, files: dict[str, str]) -> None:
    docker.forget(image)
    docker.build(f"{IMAGE}-again", "--no-cache")
    again = files_of(docker, f"{IMAGE}-again")
    print(f"{len(files)} files, tree {tree_hash(files)}; again {len(again)} files, tree {tree_hash(again)}")
    assert len(files) > 10_000
    assert {name for name in files.keys() | again.keys() if files.get(name) != again.get(name)} == set()


def tree_hash(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


LOCK = (REPOSITORY / "requirements.lock").read_text()
