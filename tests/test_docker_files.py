"""What can be said of the image without building it; `make docker-test` builds it."""

import importlib.util
import re
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from launching import REPOSITORY
from packaging.requirements import Requirement

DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text()
LOCK = (REPOSITORY / "requirements.lock").read_text()

spec = importlib.util.spec_from_file_location("lock", REPOSITORY / "docker" / "lock.py")
assert spec is not None
assert spec.loader is not None
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)


def test_the_dockerfile_keeps_to_what_old_engines_know_and_lint_asks_for() -> None:
    code = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("# "))
    assert "syntax=" not in DOCKERFILE.splitlines()[0]
    assert "<<" not in code
    assert "--link" not in code
    assert re.findall(r"^FROM (\S+)", code, re.M) == [
        "${BASE_IMAGE}",
        "${BASE_IMAGE}",
        "packages",
        "runtime",
        "runtime",
    ]
    [base] = re.findall(r"^ARG BASE_IMAGE=(\S+)$", code, re.M)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    assert code.index("requirements.lock") < code.index("COPY . .")
    users = re.findall(r"^USER (\S+)$", code, re.M)
    assert users[-1] == users[0] == "1000"  # a number: Kubernetes' runAsNonRoot reads no names


def test_credentials_and_data_cannot_get_into_the_build() -> None:
    allowed = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in allowed  # everything is left out but what follows
    for folder in ("!data", "!runs", "!.git", "!.venv", "!.netrc", "!."):
        assert folder not in allowed
    if (REPOSITORY / ".git").exists():  # not inside the image
        tracked = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True)
        top = {path.split("/")[0] for path in tracked.split()}
        assert {line[1:] for line in allowed if line.startswith("!")} <= top


def test_the_cpu_image_has_all_that_its_packages_need() -> None:
    head, *entries = re.split(r"\n(?=\S)", lock.rest(LOCK))
    assert head == "--require-hashes"
    kept = {re.split(r"[=\s]", entry)[0] for entry in entries} | {"torch", "torchvision"}
    assert not [name for name in kept if name.startswith(("nvidia", "cuda", "triton"))]
    for name in sorted(kept - {"torch"}):
        try:
            wanted = [Requirement(line) for line in requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for need in wanted:
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert need.name.lower().replace("_", "-") in kept, f"{name} needs {need.name}"
    for entry in entries:
        assert "--hash=sha256:" in entry


def test_the_two_layers_of_the_image_for_gpus_are_the_lock_cut_in_two() -> None:
    heavy, light = (text.splitlines()[1:] for text in (lock.torch_and_cuda(LOCK), lock.rest(LOCK)))
    assert lock.torch_and_cuda(LOCK).splitlines()[0] == "--require-hashes"
    assert sorted(heavy + light) == sorted("\n".join(lock.entries(LOCK)).splitlines())
    names = {line.split("==")[0] for line in heavy if "==" in line and not line.startswith(" ")}
    assert {"torch", "torchvision", "triton", "nvidia-cudnn-cu13"} <= names
    assert not names & {"numpy", "deepspeed", "timm"}


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", ["torch==2.14.1", "torchvision==0.29.1"]),
        ("aarch64", ["torch==2.9.1", "torchvision==0.24.1"]),
    ],
)
def test_torch_of_the_cpu_image_is_the_one_of_the_lock(machine: str, expected: list[str]) -> None:
    wanted = lock.torch_for_cpu(LOCK, "https://index", machine)
    assert wanted.splitlines() == ["--index-url https://index", *expected]


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("launch/cluster/kubernetes/*.yaml")), ids=lambda p: p.name
)
def test_manifests_run_as_nobody_on_a_read_only_root_with_shared_memory(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    [pod] = find(manifest, "containers")
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/app/runs", "/tmp", "/dev/shm"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    for part in [*container["command"], *container["args"]]:
        if part.startswith(("launch/", "configs/")):
            assert (REPOSITORY / part).is_file(), part


def test_compose_runs_every_service_hardened() -> None:
    services = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"]
    assert services.keys() == {"train", "node1", "node2"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


@pytest.mark.parametrize(
    "path",
    [
        *REPOSITORY.glob("launch/cluster/*.s*"),
        *REPOSITORY.glob("docker/*.sh"),
        *REPOSITORY.glob("tests/cluster/*.sh"),
    ],
    ids=lambda p: p.name,
)
def test_shell_scripts_parse_and_stop_at_errors(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert re.search(r"^set -eu", path.read_text(), re.M)


def find(tree: object, key: str) -> list[dict]:
    """Return every mapping of a YAML tree that has ``key``."""
    if isinstance(tree, dict):
        return ([tree] if key in tree else []) + [hit for value in tree.values() for hit in find(value, key)]
    return [hit for value in tree for hit in find(value, key)] if isinstance(tree, list) else []
