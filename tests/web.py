"""A web server that misbehaves on demand: it cuts, corrupts, delays and refuses what it serves."""

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Fault:
    """What happens to one answer. The neutral one is a plain, whole answer."""

    status: int = 0
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    flip: bool = False
    delay: float = 0.0
    stall_after: int | None = None
    """Send so many bytes, then nothing until the test ends."""
    drip: float = 0.0
    """Seconds between single bytes."""
    ranges: bool = True
    redirect: str = ""


@dataclass
class Request:
    path: str
    range: str | None
    authorization: str | None
    fault: Fault


@dataclass
class Web:
    """The folder served, the requests so far, and what to do with the next ones."""

    root: Path
    port: int = 0
    choose: Callable[[str, int], Fault] = lambda path, count: Fault()
    """From the path and the number of earlier requests for it."""
    requests: list[Request] = field(default_factory=list)
    most_at_once: dict[str, int] = field(default_factory=dict)
    """Requests for a path that waited for their answers together."""
    closing: threading.Event = field(default_factory=threading.Event)
    _now: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, path: str = "", user: str = "", scheme: str = "http") -> str:
        return f"{scheme}://{user}127.0.0.1:{self.port}{path}"

    def of(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path.partition("?")[0] == path]


@contextmanager
def served(root: Path):
    """Serve a folder on a free port of this machine."""
    web = Web(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            with web._lock:
                fault = web.choose(path, len(web.of(path)))
                asked = self.headers.get("Range")
                web.requests.append(Request(self.path, asked, self.headers.get("Authorization"), fault))
                web._now[path] = web._now.get(path, 0) + 1
                web.most_at_once[path] = max(web.most_at_once.get(path, 0), web._now[path])
            time.sleep(fault.delay)
            with web._lock:  # before the answer: who has all of it asks again at once
                web._now[path] -= 1
            with suppress(BrokenPipeError, ConnectionResetError):
                self._answer(path, asked, fault)

        def _answer(self, path: str, asked: str | None, fault: Fault) -> None:
            file = web.root / unquote(path.lstrip("/"))
            status = fault.status or (200 if file.is_file() else 404)
            if fault.redirect:
                self.send_response(302)
                self.send_header("Location", fault.redirect)
                self.end_headers()
                return
            if status != 200:
                self.send_error(status)
                return
            whole = body = file.read_bytes()
            if asked and fault.ranges:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                body = whole[start:]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault.flip:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if fault.drip:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if web.closing.wait(fault.drip):
                        return
            self.wfile.write(body[: min(fault.cut_after or len(body), fault.stall_after or len(body))])
            if fault.stall_after is not None:
                self.wfile.flush()
                web.closing.wait()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
