"""How every entry point ends: 0 when done, 2 with one line for what the user can mend, 1 for the rest."""

import argparse
import atexit
import contextlib
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable

from trainer.address import without_credentials
from trainer.errors import UserError

_PATIENCE_SECONDS = 3.0
_READER_GONE = 141
"""What a shell says of a program whose reader has gone, as in ``... | head``."""


def run(main: Callable[[], object]) -> None:
    """Call ``main`` and exit, with the code that it returns, if any.

    An exception ends the process at once, without waiting for other ranks. A launcher reports the first exit
    code it sees, and ranks that only lost a partner die in the same moment as the one that knows why: they
    wait a little, so that the reason comes first.
    """
    rank = int(os.environ.get("RANK", "0"))
    code = 0
    try:
        returned = main()
        code = returned if isinstance(returned, int) else 0
    except UserError as error:
        if rank > 0:  # if rank 0 found the same it has said so, and the launcher ends this process meanwhile
            time.sleep(_PATIENCE_SECONDS)
        sys.stderr.write(f"error: {without_credentials(str(error))}\n")
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os._exit(_READER_GONE)
        logging.getLogger("trainer").exception("rank %d failed", rank)
        time.sleep(_PATIENCE_SECONDS)
        code = 1
    if not code:
        atexit._run_exitfuncs()
    logging.shutdown()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter is not taken apart. After a failure the destructors of process groups and worker pools
    # could wait for ranks that are gone. And after success: a thread of gloo that lets go of the last tensor
    # only now asks for the interpreter's lock, is ended in the middle of C++, and aborts a run that was done.
    os._exit(code)


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number, for argparse."""

    def whole(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text}")
        return int(text)

    return whole


def _nobody_reads() -> bool:
    """Return whether stdout is a pipe without a reader."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))
