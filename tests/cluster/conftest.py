"""What only these tests need: hosts, and their end also when a test run is told to end."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="session", autouse=True)
def _ended_by_sigterm_as_by_ctrl_c() -> None:
    """Fixtures clean up after Ctrl-C; a cancelled job of continuous integration sends SIGTERM."""
    signal.signal(signal.SIGTERM, _interrupt)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Hosts]:
    """Two hosts. A test that breaks one must use hosts of its own."""
    skip_without_rights()
    with hosts.hosts_up(tmp_path_factory.mktemp("hosts"), 2) as both:
        yield both


def skip_without_rights() -> None:
    """Skip with the reason, or fail where the tests are required to run (REQUIRE_CLUSTER=1)."""
    reason = hosts.why_not()
    if reason and os.environ.get("REQUIRE_CLUSTER") == "1":
        pytest.fail(f"no hosts: {reason}")
    if reason:
        pytest.skip(f"no hosts: {reason}")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data: 5 000 real digits, packed as `make demo` packs them."""
    from launching import Started

    data = tmp_path_factory.mktemp("digits")
    packed = Started(sys.executable, "launch/pack.py", "mnist5k", data / "mnist").wait()
    assert packed.code == 0, packed.stderr
    return data / "mnist"
