"""Being told to stop, in processes of their own: what the first signal does, and the second."""

import signal
import subprocess
import sys
import time

import pytest
from launching import REPOSITORY

WAITING = """
import sys, time
from trainer import signals
from trainer.signals import StopRequest
signals._ECHO_SECONDS = 0.3
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.is_asked:
        time.sleep(0.01)
    print("asked", flush=True)
    import ctypes
    for _ in range(int(sys.argv[1])):
        # like a collective: C code that does not come back, and lets other threads run
        ctypes.CDLL(None).poll(None, 0, 1000)
print("done", flush=True)
"""


def start(seconds: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WAITING, str(seconds)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_signal_asks_and_its_echo_changes_nothing(number: signal.Signals) -> None:
    process = start(1)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # as a launcher does that got it too
    stdout, stderr = process.communicate(timeout=30)
    assert (stdout, stderr, process.returncode) == ("asked\ndone\n", "", 0)


def test_a_second_signal_ends_a_process_at_once_even_in_a_collective() -> None:
    process = start(60)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert stderr == "error: second SIGTERM: ended at once\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_handlers_are_given_back() -> None:
    from trainer.signals import SIGNALS, StopRequest

    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert not stop.is_asked
        signal.raise_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not stop.is_asked:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
