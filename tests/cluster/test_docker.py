"""The image, for real: `make docker-test` builds docker/Dockerfile, twice, looks into it and trains in it.

Uses the engine that answers, or starts one by docker/engine.sh (root), with stand-ins for base images where
no registry can be reached. Two builds of 6 GB take some minutes and 15 GB of disk; REBUILD=0 makes only one.
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

ENGINE = Path(os.environ.get("ENGINE", Path.home() / ".cache" / "coco-trainer" / "engine"))
BASE = re.search(r"^ARG BASE_IMAGE=(\S+)$", (REPOSITORY / "docker/Dockerfile").read_text(), re.M)[1]  # type: ignore[index]
IMAGE = "coco-trainer:test"
STEPS = 12
HARDENED = ("--network=none", "--read-only", "--tmpfs=/tmp:mode=1777", "--cap-drop=ALL", "--shm-size=512m")


class Docker:
    """A client and the engine it talks to."""

    def __init__(self, program: str, options: tuple[str, ...], **environment: str) -> None:
        self.program, self.options = program, options
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

    def in_image(self, *command: str, options: tuple[str, ...] = HARDENED) -> str:
        return self("run", "--rm", *options, IMAGE, *command)


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """The engine of this machine, or one of its own that stops afterwards."""
    if shutil.which("docker") and not subprocess.run(["docker", "version"], capture_output=True).returncode:
        yield Docker("docker", ())
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
        yield Docker("/usr/bin/docker", options, DOCKER_HOST=f"unix://{ENGINE / 'docker.sock'}")
    finally:
        subprocess.run(["docker/engine.sh", "down"], cwd=REPOSITORY, env=environment, check=True)


@pytest.fixture(scope="session")
def image(docker: Docker) -> str:
    docker.build(IMAGE)
    return IMAGE


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
    assert labels["coco-trainer.variant"] == "cuda"
    assert inspected["Config"]["User"] == "1000"
    assert docker.in_image("id", "-u").strip() == "1000"


def test_its_packages_are_those_of_the_lock(docker: Docker, image: str) -> None:
    listed = docker.in_image("python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check")
    found = {package["name"].lower().replace("_", "-"): package["version"] for package in json.loads(listed)}
    for name in ("torch", "deepspeed", "timm", "webdataset", "numpy"):
        pinned = re.findall(rf"^{name}==(\S+)(?: ;.*!= 'aarch64'.*)? \\$", LOCK, re.M)
        assert found[name] in pinned, name


def test_it_holds_no_credentials_caches_or_compilers(docker: Docker, image: str) -> None:
    names = files_of(docker, image)
    wrong = re.compile(
        r"(^|/)(\.netrc|\.git|\.ssh|id_rsa|id_ed25519|ssh_host_\w+|pip\.conf|\.pypirc|credentials)$"
        r"|^root/\.cache/.|^tmp/.|^var/lib/apt/lists/.|^usr/bin/(gcc|g\+\+|cc)$|^app/(data|runs)/.|\.whl$"
    )
    allowed = "etc/pip.conf"  # an empty place where the secret was mounted
    assert [name for name in names if wrong.search(name) and name != allowed] == []
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert not re.search(r"(token|password|secret=|api_key)", history, re.I)


def test_the_same_run_gives_the_same_curve_inside_and_outside(
    docker: Docker, image: str, digits: Path, tmp_path: Path
) -> None:
    shared = (
        "--config", "configs/demo.yaml", f"optim.steps={STEPS}", "optim.epochs=null", "log.every_steps=1",
        "log.progress=false",
    )  # fmt: skip

    def where(data: Path, root: Path) -> tuple[str, ...]:
        return (f"data.train={data}/train", f"eval.classification.test={data}/test", f"run.root={root}")

    done = Started(sys.executable, "launch/train.py", *shared, *where(digits, tmp_path)).wait()
    assert done.code == 0, done.stderr
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o777)
    for folder in [digits, *digits.parents]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp") and "pytest" in str(folder):
            folder.chmod(0o755)
    mounts = (f"--volume={digits}:/app/data:ro", f"--volume={tmp_path / 'runs'}:/app/runs")
    docker.in_image(
        "python", "launch/train.py", *shared, *where(Path("/app/data"), Path("/app/runs")),
        options=(*HARDENED, *mounts, "--env=OMP_NUM_THREADS=1", "--env=DS_ACCELERATOR=cpu"),
    )  # fmt: skip
    inside, outside = (
        torch.tensor([line["train/loss"] for line in read_metrics(run)], dtype=torch.float64)
        for run in (tmp_path / "runs" / "demo", tmp_path / "demo")
    )
    assert len(outside) == STEPS
    assert torch.equal(inside, outside)


@pytest.mark.skipif(os.environ.get("REBUILD") == "0", reason="REBUILD=0: no second build")
def test_two_builds_hold_the_same_files(docker: Docker, image: str) -> None:
    docker.build(f"{IMAGE}-again", "--no-cache")
    first, second = files_of(docker, image), files_of(docker, f"{IMAGE}-again")
    assert len(first) > 10_000
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} == set()


LOCK = (REPOSITORY / "requirements.lock").read_text()
