"""The image, for real: `make docker-test` builds docker/Dockerfile, twice, looks into it and trains in it.

Uses the engine that answers, or starts one by docker/engine.sh (root), with stand-ins for base images where
no registry can be reached. An image of VARIANT=cuda (the default) takes 7 GB, 9 GB while it is built; with an
engine of its own the first is removed before the second is built. ENGINE_MEMORY=9g keeps all of it in memory,
REBUILD=0 builds only once. `pytest -m nightly tests/cluster/test_docker.py` runs `make test` inside.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

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
        return self.run(self.program, *arguments, seconds=seconds)

    def run(self, *command: str, seconds: float, **variables: str) -> str:
        done = subprocess.run(
            command,
            cwd=REPOSITORY, env=self.environment | variables, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def compose(self, *arguments: str, **variables: str) -> str:
        """Run Compose, the client's plugin or a program of its own, on docker/compose.yaml."""
        plugin = (self.program, "compose")
        if not subprocess.run([*plugin, "version"], capture_output=True).returncode:
            program = plugin
        elif shutil.which("docker-compose"):
            program = ("docker-compose",)
        else:
            give_up("no Docker Compose: apt-get install docker-compose (all: docker/apt-engine.txt)")
        command = (*program, "--project-name", "coco-trainer-test", "-f", "docker/compose.yaml", *arguments)
        return self.run(*command, seconds=300, **variables)

    def build(self, image: str, *more: str) -> None:
        """Build by the Makefile's own line."""
        options = " ".join((*self.options, *more))
        tag = f"TAG={image.partition(':')[2]}"
        subprocess.run(
            ["make", "docker", tag, f"DOCKER={self.program}", f"DOCKER_OPTIONS={options}"],
            cwd=REPOSITORY, env=self.environment, check=True, timeout=3000,
        )  # fmt: skip

    def forget(self, *images: str) -> None:
        """Remove images, and with an engine of this test's own what their builds have kept."""
        self("image", "rm", *images)
        if self.is_own:
            self("image", "prune", "--force")
            self("builder", "prune", "--all", "--force")

    def in_image(self, *command: str, options: tuple[str, ...] = HARDENED) -> str:
        return self("run", "--rm", *options, IMAGE, *command)


def give_up(reason: str) -> NoReturn:
    """Skip with the reason, or fail where the tests are required to run (REQUIRE_DOCKER=1)."""
    if os.environ.get("REQUIRE_DOCKER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """The engine of this machine, or one of its own that stops afterwards."""
    if shutil.which("docker") and not subprocess.run(["docker", "version"], capture_output=True).returncode:
        yield Docker("docker", (), is_own=False)
        return
    for program, package in (("dockerd", "docker.io"), ("debootstrap", "debootstrap")):
        if os.geteuid() != 0 or not shutil.which(program):
            give_up(f"no Docker engine answers, and to start one needs root and Debian's {package}")
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


@pytest.fixture
def runs(digits: Path, tmp_path: Path) -> Path:
    """A folder that can be written, beside data that can be read, by the user of the image: nobody here."""
    digits.chmod(0o755)
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def test_the_same_run_gives_the_same_curve_inside_and_outside(
    docker: Docker, image: str, digits: Path, outside: torch.Tensor, runs: Path
) -> None:
    folders = (f"--volume={digits}:/app/data:ro", f"--volume={runs}:/app/runs")
    options = (*HARDENED, *folders, "--env=OMP_NUM_THREADS=1", "--env=DS_ACCELERATOR=cpu")
    docker.in_image("python", "launch/train.py", *arguments("data", "runs"), options=options)
    inside = losses(runs)
    assert len(inside) == STEPS
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("hosts", [1, 2])
def test_compose_trains_on_one_host_and_on_two_that_follow_the_same_curve(
    docker: Docker, image: str, digits: Path, outside: torch.Tensor, runs: Path, hosts: int
) -> None:
    recipe = arguments("data", "runs")
    variables = {"IMAGE": image, "DATA": str(digits), "RUNS": str(runs), "ARGUMENTS": shlex.join(recipe)}
    try:
        if hosts == 1:
            docker.compose("run", "--rm", "-e", "OMP_NUM_THREADS=1", "train", *recipe, **variables)
        else:
            told = docker.compose("--profile", "two", "up", "--no-color", **variables)
            both = docker.compose("--profile", "two", "ps", "-a", "-q", **variables).split()
            codes = [docker("inspect", "--format", "{{.State.ExitCode}}", one).strip() for one in both]
            assert codes == ["0", "0"], told[-4000:]
    finally:
        docker.compose("--profile", "two", "down", **variables)
    # float32 sums of two hosts come in another order
    torch.testing.assert_close(losses(runs), outside, rtol=0 if hosts == 1 else 1e-4, atol=0)


@pytest.mark.nightly
def test_make_test_passes_inside(docker: Docker, image: str) -> None:
    """All tests, with no more than a slim image has, on a read-only file system without network."""
    docker.build(f"{IMAGE}-stage", "--target test")
    writable = ("--tmpfs=/tmp:mode=1777,size=4g,exec", "--shm-size=1g")
    options = ("--network=none", "--read-only", *writable)
    told = docker("run", "--rm", *options, f"{IMAGE}-stage", "make", "test", seconds=3600)
    docker("image", "rm", f"{IMAGE}-stage")
    print(told[-500:])
    assert re.search(r"^\d{4,} passed", told, re.M)


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
