import functools
import hashlib
import os
import random
import socket
import time

import fsspec
import pytest
from web import Fault, served

from trainer import address, remote
from trainer.address import Url
from trainer.errors import UserError
from trainer.remote import download, download_small

CONTENT = bytes(i * i % 251 for i in range(100_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.tar").write_bytes(CONTENT)
    with served(tmp_path / "web") as web:
        yield web


def fetch(web, path, url=None, **changed) -> None:
    url = Url(url or web.url("/a.tar"))
    download(url, path, "data.train", **{"size": len(CONTENT), "sha256": SHA256, **changed})


def refusal(call) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        call()
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert message.startswith("data.train: ")
    assert "\n" not in message
    return message


def faults(*listed: Fault):
    """Serve these one after another, then without fault."""
    return lambda path, count: listed[count] if count < len(listed) else Fault()


def test_a_file_is_fetched_whole(web, tmp_path):
    fetch(web, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert [request.range for request in web.requests] == [None]


def test_a_file_that_is_there_already_costs_no_request(web, tmp_path):
    (tmp_path / "part").write_bytes(CONTENT)
    fetch(web, tmp_path / "part")
    assert not web.requests


def test_a_cut_download_goes_on_where_it_was_cut(web, tmp_path):
    web.choose = faults(Fault(cut_after=30_000), Fault(cut_after=40_000))
    fetch(web, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert [request.range for request in web.requests] == [None, "bytes=30000-", "bytes=70000-"]


def test_a_server_without_ranges_sends_again_what_is_there_already(web, tmp_path):
    web.choose = faults(Fault(cut_after=30_000), Fault(ranges=False))
    fetch(web, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert len(web.requests) == 2


def test_wrong_bytes_are_fetched_again_from_the_beginning(web, tmp_path):
    web.choose = faults(Fault(flip=True))
    fetch(web, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert [request.range for request in web.requests] == [None, None]


def test_wrong_beginning_left_by_another_is_found_out(web, tmp_path):
    (tmp_path / "part").write_bytes(b"x" * 500)
    fetch(web, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert [request.range for request in web.requests] == ["bytes=500-", None]


def test_bytes_that_stay_wrong_are_an_error_that_names_both_hashes(web, tmp_path):
    web.choose = lambda path, count: Fault(flip=True)
    message = refusal(lambda: fetch(web, tmp_path / "part"))
    wrong = hashlib.sha256(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])).hexdigest()
    assert f"{web.url('/a.tar')}: has sha256 {wrong[:12]}..., its index says {SHA256[:12]}..." in message
    assert len(web.requests) == 3
    assert not (tmp_path / "part").exists()


def test_a_file_of_another_size_than_its_index_says_is_an_error_at_once(web, tmp_path):
    message = refusal(lambda: fetch(web, tmp_path / "part", size=len(CONTENT) + 1))
    assert message.endswith(f"a.tar: has {len(CONTENT)} bytes, its index says {len(CONTENT) + 1}")
    assert len(web.requests) == 1


@pytest.mark.parametrize("status", [403, 404])
def test_a_final_answer_is_an_error_at_once(web, tmp_path, status):
    web.choose = lambda path, count: Fault(status=status)
    assert f"a.tar: answered {status} " in refusal(lambda: fetch(web, tmp_path / "part"))
    assert len(web.requests) == 1


def test_a_busy_server_is_asked_again_and_not_for_ever(web, tmp_path):
    web.choose = faults(Fault(status=503), Fault(status=429))
    fetch(web, tmp_path / "part")
    assert len(web.requests) == 3
    web.requests.clear()
    web.choose = lambda path, count: Fault(status=503)
    message = refusal(lambda: fetch(web, tmp_path / "other"))
    assert message.endswith("a.tar: answered 503 Service Unavailable; gave up after several attempts")
    assert len(web.requests) == remote.ATTEMPTS


def test_a_server_that_cuts_for_ever_is_left_although_each_attempt_brings_a_little(web, tmp_path):
    web.choose = lambda path, count: Fault(cut_after=100)
    assert "was cut off 99400 bytes before its end; gave up" in refusal(lambda: fetch(web, tmp_path / "part"))


def test_attempts_that_bring_much_are_not_counted(web, tmp_path):
    web.choose = lambda path, count: Fault(cut_after=len(CONTENT) // 7)
    fetch(web, tmp_path / "part")
    assert len(web.requests) == 8 > remote.ATTEMPTS


@pytest.mark.parametrize("fault", [Fault(stall_after=50), Fault(delay=1.0), Fault(drip=0.02)])
def test_a_server_that_stalls_or_drips_is_left_in_bounded_time(web, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    web.choose = lambda path, count: fault
    assert "; gave up" in refusal(lambda: fetch(web, tmp_path / "part"))


def test_a_host_that_cannot_be_reached_is_an_error_in_bounded_time(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/set/a.tar"
        assert refusal(lambda: fetch(None, tmp_path / "part", url)).endswith(
            f"{url}: Connection refused; gave up after several attempts"
        )
    message = refusal(lambda: fetch(None, tmp_path / "part", "http://no-such-host.invalid/a"))
    assert "http://no-such-host.invalid/a: " in message


def test_credentials_are_sent_and_not_told(web, tmp_path):
    web.choose = lambda path, count: Fault(status=401)
    url = web.url("/a.tar?sig=signature", user="ann:hunter%402@")
    message = refusal(lambda: fetch(web, tmp_path / "part", url))
    assert message == f"data.train: {web.url('/a.tar')}: answered 401 Unauthorized"
    assert web.requests[0].path == "/a.tar?sig=signature"
    assert web.requests[0].authorization == "Basic YW5uOmh1bnRlckAy"


def test_credentials_come_from_netrc_too(web, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text(
        "machine 127.0.0.1 login ann password hunter@2\nmachine x login a password b"
    )
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch(web, tmp_path / "part")
    assert web.requests[0].authorization == "Basic YW5uOmh1bnRlckAy"
    (tmp_path / "netrc").write_text("hunter2")
    assert "hunter2" not in refusal(lambda: fetch(web, tmp_path / "other"))


def test_credentials_do_not_follow_to_another_address(web, tmp_path):
    web.choose = faults(Fault(redirect=f"http://localhost:{web.port}/a.tar"))
    fetch(web, tmp_path / "part", web.url("/a.tar", user="ann:hunter2@"))
    assert [request.authorization for request in web.requests] == ["Basic YW5uOmh1bnRlcjI=", None]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://x/"])
def test_redirects_to_anything_but_the_web_are_refused(web, tmp_path, target):
    web.choose = lambda path, count: Fault(redirect=target)
    message = refusal(lambda: fetch(web, tmp_path / "part"))
    assert "redirects from http: to ftp:, which is refused" in message or "to what is not the web" in message
    assert not (tmp_path / "part").read_bytes()


def test_redirects_from_https_to_http_are_refused():
    request = remote._request(Url("https://host/a"), 0)
    redirect = functools.partial(remote._Redirects().redirect_request, request, None, 302, "", {})
    with pytest.raises(remote._RefusedError, match="from https: to http:"):
        redirect("http://host/a")
    assert redirect("https://other/a").full_url == "https://other/a"


def test_redirects_in_a_circle_end(web, tmp_path):
    web.choose = lambda path, count: Fault(redirect="/a.tar")
    assert "answered 302" in refusal(lambda: fetch(web, tmp_path / "part"))


def test_a_full_disk_is_an_error_at_once(web, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(lambda: fetch(web, tmp_path / "part")).endswith("part: No space left on device")
    assert len(web.requests) == 1


def test_a_small_file_has_a_limit_and_no_half(web, tmp_path):
    web.choose = faults(Fault(cut_after=99_999))
    download_small(Url(web.url("/a.tar")), tmp_path / "small", "data.train", limit=len(CONTENT))
    assert (tmp_path / "small").read_bytes() == CONTENT
    message = refusal(
        lambda: download_small(Url(web.url("/a.tar")), tmp_path / "small", "data.train", limit=99_999)
    )
    assert message.endswith("a.tar: has more than 99999 bytes")


def test_object_stores_are_read_through_fsspec(tmp_path, monkeypatch):
    monkeypatch.setattr(address, "SCHEMES", (*address.SCHEMES, "memory"))
    fsspec.filesystem("memory").pipe_file("/bucket/set/a.tar", CONTENT)
    (tmp_path / "part").write_bytes(CONTENT[:1000])
    fetch(None, tmp_path / "part", "memory://bucket/set/a.tar")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert "has 100000 bytes" in refusal(
        lambda: fetch(None, tmp_path / "other", "memory://bucket/set/a.tar", size=5)
    )
    assert "b.tar: " in refusal(lambda: fetch(None, tmp_path / "other", "memory://bucket/set/b.tar"))


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_client_of_an_object_store_is_named(tmp_path, scheme, package, monkeypatch):
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    assert f"{scheme}:// needs the package {package}" in refusal(
        lambda: fetch(None, tmp_path / "part", f"{scheme}://bucket/a.tar")
    )


def test_a_pipe_is_a_program_and_not_a_shell(web, tmp_path):
    (tmp_path / "part").write_bytes(CONTENT[:1000])
    download(
        Url(f"pipe:cat {web.root}/{{}}").file("a.tar"),
        tmp_path / "part",
        "f",
        size=len(CONTENT),
        sha256=SHA256,
    )
    assert (tmp_path / "part").read_bytes() == CONTENT
    fetched = Url(f"pipe:cat {web.root}/{{}} ; touch {tmp_path}/owned").file("a.tar")
    message = refusal(lambda: fetch(web, tmp_path / "other", fetched.secret))
    assert "pipe:cat ...: ended with exit code 1" in message
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sleep 60", "sent nothing for"),
        ("no-such-program-here", "cannot be started"),
        ("head -c 10 /dev/zero", "10 of"),
    ],
)
def test_a_pipe_that_fails_or_hangs_is_an_error_in_bounded_time(tmp_path, command, reason, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    assert reason in refusal(lambda: fetch(None, tmp_path / "part", f"pipe:{command}"))


def test_the_seeded_generators_are_left_alone(web, tmp_path):
    state = random.getstate()
    web.choose = faults(Fault(cut_after=10))
    fetch(web, tmp_path / "part")
    assert random.getstate() == state
