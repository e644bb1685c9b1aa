"""Start a run again with the hosts that are left, at most so many times.

Training goes on from its newest complete checkpoint by itself (``checkpoint.resume: auto``), on any number
of ranks. All that is needed outside is to see which hosts answer, to start the launcher on those, and to
judge: by the completion marker ``done.json``, since the launcher's exit code is 0 after some failures.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError

log = logging.getLogger("trainer")

# Without it a runner waits for ever for a host whose cable was pulled.
SSH_ARGUMENTS = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
_WRONG_INPUT = 2  # launch/_main.py: the user's to mend, so it would fail again


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts in order. Raises UserError naming the line, as DeepSpeed would only later."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the hostfile: {error}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        key, _, count = words[-1].partition("=")
        if len(words) != 2 or key != "slots" or not count.isdecimal() or int(count) < 1:
            raise UserError(f"{path}:{number}: expected `HOST slots=N`, got {line.strip()!r}")
        if words[0] in (host.name for host in hosts):
            raise UserError(f"{path}:{number}: {words[0]} stands there twice")
        hosts.append(Host(words[0], int(count)))
    if not hosts:
        raise UserError(f"{path}: names no host")
    return hosts


def answering(hosts: Sequence[Host], seconds: int = 10) -> list[Host]:
    """Return the hosts that answer to ssh within so many seconds; warn of the others with the reason."""
    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}")

    def ask(host: Host) -> str | None:
        try:
            done = subprocess.run(
                ["ssh", *options, host.name, "true"], capture_output=True, text=True, timeout=2 * seconds
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {2 * seconds} s"
        return (done.stderr.strip() or f"ssh ended with {done.returncode}") if done.returncode else None

    with ThreadPoolExecutor(max_workers=64) as pool:
        reasons = list(pool.map(ask, hosts))
    for host, reason in zip(hosts, reasons, strict=True):
        if reason:
            log.warning("%s is left out: %s", host.name, " ".join(reason.split()))
    return [host for host, reason in zip(hosts, reasons, strict=True) if not reason]


def dividing(hosts: Sequence[Host], batch: int) -> list[Host]:
    """Return as many of the first hosts as have a number of slots by which ``batch`` is divisible."""
    chosen = list(hosts)
    while chosen and batch % sum(host.slots for host in chosen):
        chosen.pop()
    return chosen


def supervise(
    launch: Callable[[list[Host]], int],
    look: Callable[[], list[Host]],
    marker: Path,
    *,
    max_restarts: int,
    min_hosts: int,
    pause_seconds: float = 10.0,
) -> int:
    """Launch until ``marker`` is written anew; return 0, or the exit code of the last try (never 0).

    ``look`` tells which hosts to use, ``launch`` runs on them and returns the launcher's exit code.
    """
    code = 1
    for attempt in range(max_restarts + 1):
        which = f"try {attempt + 1} of {max_restarts + 1}"
        if attempt:
            time.sleep(pause_seconds)  # a host that restarts, ssh that is closed by a firewall
        hosts = look()
        if len(hosts) < min_hosts:
            log.warning(
                "try %d of %d: %d hosts, %d needed", attempt + 1, max_restarts + 1, len(hosts), min_hosts
            )
            continue
        names = ", ".join(f"{host.name} x {host.slots}" for host in hosts)
        log.info("%s on %s", which, names)
        before = _written(marker)
        code = launch(hosts)
        if _written(marker) not in (None, before):
            return 0
        code = code or 1
        if code == _WRONG_INPUT:
            return code
        log.warning(
            "try %d of %d ended with code %d before the run was done", attempt + 1, max_restarts + 1, code
        )
    return code


def run_deepspeed(deepspeed: Path, folder: Path, hosts: Sequence[Host], command: Sequence[str]) -> int:
    """Run ``command`` on hosts by DeepSpeed's launcher; return its exit code.

    SIGTERM and Ctrl-C go on to the launcher and from there to every host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))
    # --force_multi: a single host that is left need not be this one.
    launcher = subprocess.Popen(
        [str(deepspeed), "--hostfile", str(hostfile), "--force_multi", *command],
        env={"PDSH_SSH_ARGS_APPEND": SSH_ARGUMENTS, **os.environ},
        start_new_session=True,
    )
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        return _as_shell(launcher.wait())
    except KeyboardInterrupt:
        launcher.terminate()  # its handler ends the ranks of every host
        try:
            launcher.wait(timeout=30)
        finally:
            _kill_session(launcher)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _kill_session(launcher: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(launcher.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _as_shell(code: int) -> int:
    """Return an exit code as a shell tells it: 128 and the number of the signal."""
    return code if code >= 0 else 128 - code


def _written(marker: Path) -> int | None:
    """Return when the marker was written, None if it is not there."""
    return marker.stat().st_mtime_ns if marker.exists() else None
