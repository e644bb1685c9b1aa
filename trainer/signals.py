"""Being told to stop: a scheduler's SIGTERM or SIGUSR1, or a launcher that is gone.

The first signal asks: training saves at the next step, on all ranks together, and ends with 0. A second one
ends the process at once. Launchers pass on what their whole process group has got already, so a signal that
comes within two seconds of the first is its echo.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_SECONDS = 2.0


class StopRequest:
    """Context manager that notices signals from its start to its end. Main thread only."""

    def __enter__(self) -> Self:
        self._first: float | None = None
        self._launcher = _launcher()
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._sender, False)
        # The interpreter runs handlers only between two instructions of the main thread, which may be waiting
        # in a collective for a rank that is gone. The bytes in this pipe reach a thread at once.
        self._before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
        self._wakeup_before = signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, before in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, before)
        os.close(self._sender)  # the thread reads the end of the pipe

    @property
    def is_asked(self) -> bool:
        """True once this rank was told to stop."""
        return self._first is not None or _launcher() != self._launcher

    def _listen(self) -> None:
        while number := os.read(self._receiver, 1):
            if number[0] not in SIGNALS:
                continue
            now = time.monotonic()
            if self._first is None:
                self._first = now
            elif now - self._first > _ECHO_SECONDS:
                sys.stderr.write(f"error: second {signal.Signals(number[0]).name}: ended at once\n")
                sys.stderr.flush()
                os._exit(128 + number[0])
        os.close(self._receiver)


def ignore_in_worker(_worker: int) -> None:
    """Let a process that reads data outlive a signal to the whole group: its rank still needs it.

    It ends with its rank all the same.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _launcher() -> tuple[int, ...]:
    """Return who started this rank: its parent and, of DeepSpeed's launcher, that one's parent.

    ``deepspeed`` dies of a signal without a word to ``deepspeed.launcher.launch``, which would train on.
    """
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return ()
        status = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
        return parent, int(status[1])
    except OSError:
        return ()
