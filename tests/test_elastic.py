"""The supervisor: which hosts it takes, when it tries again, and when it stops."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from launching import Started

from launch.elastic import build_parser
from trainer import elastic
from trainer.elastic import Host, answering, dividing, read_hostfile, run_deepspeed, supervise
from trainer.errors import UserError

TWO = [Host("a", 2), Host("b", 2)]


def test_a_hostfile_is_read_in_order_with_comments(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# mine\nb slots=4\n\n  a  slots=8 # the big one\n")
    assert read_hostfile(tmp_path / "hostfile") == [Host("b", 4), Host("a", 8)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a slots=1\na slots=2\n", ":2: a stands there twice"),
        ("a slots=many\n", ":1: expected `HOST slots=N`, got 'a slots=many'"),
        ("a slots=0\n", ":1: expected"),
        ("a 8\n", ":1: expected"),
        ("a\n", ":1: expected"),
        ("# nothing\n", ": names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(tmp_path / "hostfile")
    assert str(caught.value).startswith(f"{tmp_path / 'hostfile'}{complaint}")


def test_a_hostfile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_bytes(b"\xff slots=1")
    with pytest.raises(UserError, match="hostfile: cannot read the hostfile: 'utf-8' codec"):
        read_hostfile(tmp_path / "hostfile")


@pytest.mark.parametrize(("option", "least"), [("--max-restarts", 0), ("--min-hosts", 1)])
def test_a_number_that_could_start_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], option: str, least: int
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--hostfile", "x", option, str(least - 1)])
    assert f"{option}: must be a whole number of at least {least}, not {least - 1}" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "taken"), [(12, "abc"), (10, "ab"), (8, "ab"), (2, "a"), (3, "")])
def test_as_many_of_the_first_hosts_are_taken_as_divide_the_batch(batch: int, taken: str) -> None:
    hosts = [Host("a", 1), Host("b", 1), Host("c", 1)]
    if batch in (2, 3):
        hosts = [Host("a", 2), Host("b", 2), Host("c", 2)]
    assert "".join(host.name for host in dividing(hosts, batch)) == taken


def supervised(tmp_path: Path, codes: list[int], done_at: int | None, **bounds: int) -> tuple[int, int]:
    """Return exit code and number of launches; launch number ``done_at`` (from 1) writes the marker."""
    launches: list[list[Host]] = []

    def launch(hosts: list[Host]) -> int:
        launches.append(hosts)
        if len(launches) == done_at:
            (tmp_path / "done.json").write_text("{}")
        return codes[len(launches) - 1]

    limits = {"max_restarts": 3, "min_hosts": 1} | bounds
    code = supervise(launch, lambda: TWO, tmp_path / "done.json", pause_seconds=0, **limits)
    return code, len(launches)


def test_it_tries_again_until_the_run_is_done(tmp_path: Path) -> None:
    assert supervised(tmp_path, [247, 255, 0], done_at=3) == (0, 3)


def test_it_gives_up_after_so_many_restarts_with_the_last_code(tmp_path: Path) -> None:
    assert supervised(tmp_path, [1, 1, 247], None, max_restarts=2) == (247, 3)


def test_exit_code_0_without_the_marker_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text("{}")  # of an earlier run
    os.utime(tmp_path / "done.json", (0, 0))
    assert supervised(tmp_path, [0, 0], None, max_restarts=1) == (1, 2)


def test_a_marker_counts_even_if_the_launcher_fails_afterwards(tmp_path: Path) -> None:
    assert supervised(tmp_path, [1], done_at=1) == (0, 1)


def test_what_the_user_has_to_mend_is_not_tried_again(tmp_path: Path) -> None:
    assert supervised(tmp_path, [2], None) == (2, 1)


def test_nothing_is_launched_on_too_few_hosts(tmp_path: Path) -> None:
    assert supervised(tmp_path, [], None, min_hosts=3) == (1, 0)


def test_a_host_that_does_not_answer_is_left_out_with_ssh_s_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\ncase $* in *' b true') echo 'No route to host' >&2; exit 255;; esac\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(elastic.log, "propagate", True)
    assert answering(TWO) == [Host("a", 2)]
    assert "b is left out: No route to host" in caplog.text


def test_the_launcher_gets_the_hosts_and_a_signal_ends_it(tmp_path: Path) -> None:
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\necho "$@" > started; cat "$2" >> started; exec sleep 60\n')
    launcher.chmod(0o755)

    def interrupt() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_deepspeed(launcher, tmp_path / "run", TWO, ["train.py", "seed=1"])
    finally:
        os.chdir(here)
        thread.join()
    first, *hosts = (tmp_path / "started").read_text().splitlines()
    assert first == f"--hostfile {tmp_path / 'run' / 'hostfile'} --force_multi train.py seed=1"
    assert hosts == ["a slots=2", "b slots=2"]


def test_the_command_refuses_what_it_cannot_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    done = Started(
        sys.executable, "launch/elastic.py", "--hostfile", tmp_path / "hostfile",
        f"data.train={tmp_path}", "optim.steps=1", "checkpoint.resume=never",
    ).wait()  # fmt: skip
    assert (done.code, done.errors) == (
        2,
        ["error: checkpoint.resume: has to be auto to go on, got 'never'"],
    )
