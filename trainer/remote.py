"""A remote file to a local one: whole and verified, or an error within a bounded time.

Connections are cut, stall, and bring wrong bytes. So a file grows where the last attempt left it (a Range
request), is judged by its size and sha256, and is begun anew if they are wrong. Attempts that bring little
are counted, with longer and longer pauses between them, and ended by one line that names the address without
its credentials. http and https are spoken here, s3 and gs by fsspec, and a pipe is a program without a shell.

What names a program or a host comes from the user's configuration, never from data.
"""

import base64
import hashlib
import http.client
import importlib.util
import netrc
import os
import random
import re
import select
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from trainer.address import Url
from trainer.errors import UserError

TIMEOUT_SECONDS = 20.0  # to connect, and between two pieces
LEAST_BYTES = 1 << 16  # that must come in that time: some servers drip
ATTEMPTS = 6  # that bring less than this:
PROGRESS_BYTES = 16 << 20
STREAM_PROGRESS_BYTES = 1 << 20  # the same for a file of unknown size
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 8.0
LONGEST_SILENCE_SECONDS = ATTEMPTS * (2 * TIMEOUT_SECONDS + LONGEST_PAUSE_SECONDS)
"""A download that has not grown for so long has ended, one way or another."""

_CHUNK, _CLOUD_CHUNK = 1 << 18, 1 << 24
_FINAL = {400, 401, 403, 404, 405, 410, 451}  # asking again does not help
_CLIENTS = {"s3": "s3fs", "gs": "gcsfs"}

Chunks = Generator[bytes, None, None]


class _RefusedError(Exception):
    """The answer will be the same next time."""


class _LostError(Exception):
    """The connection failed: go on from here."""


class _WrongError(Exception):
    """What is there is not what was asked for: begin anew."""


def download(url: Url, path: Path, field: str, *, size: int, sha256: str) -> None:
    """Complete ``path`` with the file at ``url``; what is there of it already is kept.

    Returns when the size and the hash are right and the file is on disk; nobody else may write to it. Raises
    UserError, beginning with ``field``, when the file cannot be had.
    """

    def attempt() -> None:
        start = _size(path)
        if start < size:
            _write(path, "ab", _chunks(url, start, size), size + 1)
        _require(path, size, sha256)

    _persist(attempt, path, f"{field}: {url}", enough=min(PROGRESS_BYTES, size // 8))


def download_small(url: Url, path: Path, field: str, *, limit: int) -> None:
    """Write the file at ``url``, of unknown size up to ``limit``, to ``path``. Raises UserError."""

    def attempt() -> None:
        _write(path, "wb", _chunks(url, 0, None), limit + 1)
        if _size(path) > limit:
            raise _RefusedError(f"has more than {limit} bytes")

    _persist(attempt, path, f"{field}: {url}", enough=limit)


def stream(url: Url, field: str) -> Chunks:
    """Yield the bytes of the file at ``url`` as they come, without keeping them; go on after a cut.

    There is no hash to judge them by. Raises UserError, beginning with ``field``, if the file cannot be had.
    """
    patience, done = _Patience(f"{field}: {url}"), 0
    while True:
        before = done
        try:
            for chunk in _arriving(_chunks(url, done, None)):
                done += len(chunk)
                yield chunk
            return
        except (_RefusedError, _WrongError) as error:  # what was handed out cannot be begun anew
            raise UserError(f"{field}: {url}: {error}") from None
        except _LostError as error:
            patience.spend(error, int(done - before < STREAM_PROGRESS_BYTES))


def progress_of(path: Path) -> Any:
    """Return something that changes as long as a download goes on."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _persist(attempt: Callable[[], None], path: Path, what: str, enough: int) -> None:
    """Try until it succeeds; an attempt that brings ``enough`` bytes is free, the others are counted."""
    patience = _Patience(what)
    while True:
        before = _size(path)
        try:
            return attempt()
        except _RefusedError as error:
            raise UserError(f"{what}: {error}") from None
        except _WrongError as error:
            path.unlink(missing_ok=True)
            patience.spend(error, 2)  # the whole file, for nothing
        except _LostError as error:
            patience.spend(error, int(_size(path) - before < enough))
        except OSError as error:  # of the disk
            raise UserError(f"{what}: cannot write {path}: {error.strerror}") from None


class _Patience:
    """What is left of the attempts at one file, with longer and longer pauses between them."""

    def __init__(self, what: str) -> None:
        self._what, self._failures = what, 0

    def spend(self, reason: Exception, cost: int) -> None:
        """Pause before the next attempt. Raises UserError if there is none."""
        self._failures += cost
        if self._failures >= ATTEMPTS:
            raise UserError(f"{self._what}: {reason}; gave up after several attempts")
        pause = min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2**self._failures)
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1))  # the seeded generator is for augmentation


def _arriving(chunks: Chunks) -> Chunks:
    """Pass pieces on; raise _LostError for whatever cuts a connection."""
    with closing(chunks):
        while True:
            try:
                chunk = next(chunks, None)
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an odd redirect
                raise _LostError(_reason(error)) from None
            if chunk is None:
                return
            yield chunk


def _write(path: Path, mode: Literal["ab", "wb"], chunks: Chunks, limit: int) -> None:
    """Write or append pieces until the file has ``limit`` bytes or they end."""
    with closing(_arriving(chunks)) as arriving, path.open(mode) as file:
        for chunk in arriving:
            file.write(chunk[: limit - file.tell()])
            file.flush()  # a kill leaves it to the next attempt, and who waits sees it grow
            if not chunk:  # skipped
                os.utime(path)
            if file.tell() >= limit:
                break
        os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require(path: Path, size: int, sha256: str) -> None:
    found = _size(path)
    if found < size:
        raise _LostError(f"was cut off at {found} of {size} bytes")
    if found > size:
        raise _WrongError(f"has more than the {size} bytes its index says")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise _WrongError(f"has sha256 {digest[:12]}..., its index says {sha256[:12]}...")


def _steady(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass pieces on; raise _LostError if they come slower than LEAST_BYTES in TIMEOUT_SECONDS."""
    since, arrived = 0.0, 0
    for chunk in chunks:
        since = since or time.monotonic()
        yield chunk
        arrived += len(chunk)
        now = time.monotonic()
        if now - since > TIMEOUT_SECONDS:
            if arrived < LEAST_BYTES:
                raise _LostError(f"sent {arrived} bytes in {now - since:.0f} s")
            since, arrived = now, 0


def _chunks(url: Url, start: int, size: int | None) -> Chunks:
    """Yield the file's bytes from ``start`` on, as they come. ``size`` is what the whole should have.

    Raises _RefusedError, _WrongError, and _LostError, OSError or HTTPException for what may pass.
    """
    if url.scheme in ("http", "https"):
        return _http_chunks(url, start, size)
    return _pipe_chunks(url, start) if url.scheme == "pipe" else _cloud_chunks(url, start, size)


def _http_chunks(url: Url, start: int, size: int | None) -> Chunks:
    with _answer(_request(url, start)) as response:
        skip, length = start, response.headers.get("Content-Length")
        if response.status == 206:
            span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if span.partition("-")[0] != str(start):
                raise _WrongError(f"answered bytes {ascii(span)[1:-1]} instead of {start}-")
            skip = 0
        else:
            total = length or "*"
        if size is not None and re.fullmatch(r"[0-9]{1,19}", total) and int(total) != size:
            raise _RefusedError(f"has {total} bytes, its index says {size}")
        yield from _without(skip, _steady(iter(lambda: response.read1(_CHUNK), b"")))
        if response.length:  # read1 takes a cut for the end
            raise _LostError(f"was cut off {response.length} bytes before its end")


def _without(skip: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Drop the first ``skip`` bytes: some can only send a file from its beginning."""
    for chunk in chunks:
        kept = chunk[skip:]
        skip = max(0, skip - len(chunk))
        yield kept


def _request(url: Url, start: int) -> urllib.request.Request:
    parts = urlsplit(url.secret)
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    request.add_header("User-Agent", "coco-trainer")
    request.add_header("Accept-Encoding", "identity")
    if start:
        request.add_header("Range", f"bytes={start}-")
    if login := _login(parts.username, parts.password, parts.hostname or ""):
        text = base64.b64encode(login.encode()).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {text}")  # not for another host
    return request


def _login(user: str | None, password: str | None, host: str) -> str | None:
    """Return "user:password" from the address, else from ~/.netrc (or $NETRC), else None."""
    if user is not None:
        return f"{unquote(user)}:{unquote(password or '')}"
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).hosts.get(host)
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError):  # its message may quote what is in the file
        raise _RefusedError("cannot read ~/.netrc, or others may read it too (chmod 600)") from None
    return f"{entry[0]}:{entry[2]}" if entry else None


def _answer(request: urllib.request.Request) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):  # the default opener also reads file:, ftp: and data:
        opener.add_handler(handler)
    try:
        return cast(http.client.HTTPResponse, opener.open(request, timeout=TIMEOUT_SECONDS))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code // 100 == 3:  # the reason would name the target, which may hold credentials
            raise _RefusedError(f"answered {error.code}, in a circle or to what is not the web") from None
        kind = _WrongError if error.code == 416 else _RefusedError if error.code in _FINAL else _LostError
        raise kind(f"answered {error.code} {ascii(error.reason)[1:-1]}") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _RefusedError(f"its certificate is not valid: {error.reason.verify_message}") from None
        raise


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow to http or https, and never from https to http."""

    def redirect_request(  # type: ignore[no-untyped-def]
        self, request, answer, code, message, headers, target
    ) -> urllib.request.Request | None:
        scheme = urlsplit(target).scheme.lower()
        if scheme != "https" and not (scheme == "http" and request.type == "http"):
            raise _RefusedError(f"redirects from {request.type}: to {ascii(scheme)[1:-1]}:, which is refused")
        return super().redirect_request(request, answer, code, message, headers, target)


def _cloud_chunks(url: Url, start: int, size: int | None) -> Chunks:
    package = _CLIENTS.get(url.scheme)
    if package is not None and importlib.util.find_spec(package) is None:
        raise _RefusedError(f"{url.scheme}:// needs the package {package} (pip install {package})")
    try:
        # Not fsspec.open: that gives a meaning to more than the scheme.
        with _file_system(url.scheme).open(url.secret.partition("://")[2], "rb", cache_type="none") as file:
            if size is not None and file.size != size:
                raise _RefusedError(f"has {file.size} bytes, its index says {size}")
            file.seek(start)
            yield from _steady(iter(lambda: file.read(_CLOUD_CHUNK), b""))
    except FileNotFoundError:
        raise _RefusedError("is not there") from None
    except PermissionError as error:
        raise _RefusedError(_reason(error)) from None
    except (_RefusedError, _LostError, OSError):
        raise
    except Exception as error:  # the clients have errors of their own
        raise _LostError(_reason(error)) from None


def _file_system(scheme: str) -> Any:
    """Return fsspec's client. That of s3 is told to try once: its 25 attempts would come to six times 25."""
    import fsspec

    if scheme != "s3":
        return fsspec.filesystem(scheme)
    of_user = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    system = fsspec.filesystem("s3", config_kwargs={"retries": {"total_max_attempts": 1}, **of_user})
    system.retries = 1
    return system


def _pipe_chunks(url: Url, start: int) -> Chunks:
    try:
        process = subprocess.Popen(url.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0)
    except (OSError, ValueError) as error:
        raise _RefusedError(f"cannot be started: {_reason(error)}") from None
    assert process.stdout is not None
    try:
        yield from _without(start, _steady(_output(process.stdout.fileno())))
        if process.wait(TIMEOUT_SECONDS):
            raise _LostError(f"ended with exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        raise _LostError("does not end") from None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _output(descriptor: int) -> Iterator[bytes]:
    while True:
        if not select.select([descriptor], [], [], TIMEOUT_SECONDS)[0]:
            raise _LostError(f"sent nothing for {TIMEOUT_SECONDS:.0f} s")
        if not (chunk := os.read(descriptor, _CHUNK)):
            return
        yield chunk


def _reason(error: BaseException) -> str:
    """Return why, in one line and without an address: that may hold credentials."""
    cause: Any = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return " ".join(f"{type(cause).__name__} {cause}".split()) if isinstance(cause, Exception) else str(cause)
