"""Where a data set is: a folder, or a URL that is never shown with its credentials.

A URL may carry secrets in three places: ``user:password@``, the query (presigned links, SAS tokens) and the
command of a ``pipe:``; not that of an object store, whose client has them from elsewhere. They stay in
memory: what is printed, logged, saved or sent to W&B is ``str(url)``.
"""

import argparse
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

OBJECT_STORES = ("s3", "gs")  # their names are not percent-encoded
SCHEMES = ("https", "http", *OBJECT_STORES, "pipe")
_SCHEME = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):)")
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"]*)[?#][^\s'\"]*")
_QUERY_BEHIND_SPACE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\n?#'\"]*)\?[\w.-]+=[^\s'\"]*")
_COMMAND = re.compile(r"\b(pipe:\s*[^\s'\"]+)\s(?!\.\.\.).*", re.DOTALL)


def without_credentials(text: str) -> str:
    """Return ``text`` with every URL in it stripped of user, password and query, and pipes of arguments."""
    text = _QUERY_BEHIND_SPACE.sub(r"\1", _USER.sub(r"\1", text))
    return _COMMAND.sub(r"\1 ...", _QUERY.sub(r"\1", text))


@dataclass(frozen=True)
class Url:
    """A remote folder or file. Raises ValueError for a scheme that is not one of ``SCHEMES``, or no host."""

    secret: str = field(repr=False)
    """The whole address, credentials included."""
    piped_name: str = ""
    """The file that a pipe is asked for."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme {self.scheme}: is not one of {', '.join(SCHEMES)}: ({self})")
        if not self.secret.isprintable():
            raise ValueError(f"has characters that no address has ({str(self)!a})")
        if self.scheme == "pipe":
            return
        if "::" in urlsplit(self.secret).path:  # other tools chain commands with it
            raise ValueError(f"has :: in its path ({self})")
        if not urlsplit(self.secret).hostname:
            raise ValueError(f"has no host ({self})")
        if self.scheme in ("http", "https") and " " in self.secret:
            raise ValueError(f"has a space, which addresses write as %20 ({self})")

    def __str__(self) -> str:
        return without_credentials(self.secret)

    @property
    def scheme(self) -> str:
        """Return the scheme in lower case."""
        return self.secret.partition(":")[0].lower()

    @property
    def command(self) -> list[str]:
        """Return the arguments of a pipe, one of them with the file's name: nothing in it is special."""
        return [
            part.replace("{}", self.piped_name) for part in shlex.split(self.secret.removeprefix("pipe:"))
        ]

    def file(self, name: str) -> "Url":
        """Return the address of a file of this folder; a query is the folder's."""
        if self.scheme == "pipe":
            return Url(self.secret, name)
        if self.scheme in OBJECT_STORES:
            return Url(f"{self.secret.rstrip('/')}/{name}")
        parts = urlsplit(self.secret)
        return Url(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}")))


def location(value: Any) -> Path | Url:
    """Turn text into a Url, if it begins with a scheme, or into a Path. Raises ValueError."""
    if isinstance(value, Path | Url):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a folder or an address")
    if not (match := _SCHEME.match(value)):
        return Path(value)
    if (match[1] or "").lower() != "file":
        return _without_secrets(Url(value))
    parts = urlsplit(value)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"file: has a host, {parts.hostname}; a local path has none (file:///path)")
    return Path(unquote(parts.path))


def local_path(text: str) -> Path:
    """Return what a command line names on this machine. Raises what argparse shows for any address."""
    try:
        place = location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if isinstance(place, Url):
        raise argparse.ArgumentTypeError(f"{place} is not on this machine")
    return place


def _without_secrets(url: Url) -> Url:
    """Return an address that was typed. Raises ValueError for secrets that an object store does not know."""
    if url.scheme in OBJECT_STORES and re.search(r"[?#]|://[^/]*@", url.secret):
        raise ValueError(f"has a password or a query; {url.scheme}:// has credentials elsewhere ({url})")
    return url
