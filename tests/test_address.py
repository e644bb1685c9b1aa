import argparse
import sys
from pathlib import Path

import launching
import pytest
from web import served

from trainer.address import Url, local_path, location, without_credentials
from trainer.config import from_dict
from trainer.errors import UserError
from trainer.options import dump, load

SECRETS = ("hunter2", "signature")


def run(**data: object):
    return from_dict({"data": {"train": "x", **data}, "optim": {"steps": 1}})


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("https://ann:hunter2@host/a/b", "https://host/a/b"),
        ("https://ann:hun@ter2@host/a?sig=signature&x=1#y", "https://host/a"),
        ("s3://bucket/a set", "s3://bucket/a set"),
        ("pipe:curl -H 'token: hunter2' https://host/{}", "pipe:curl ..."),
        ("http://host:8000/a", "http://host:8000/a"),
    ],
)
def test_a_url_is_shown_and_saved_without_its_credentials(secret, shown):
    config = run(train=secret, allow_pipe=True)
    assert str(config.data.train) == shown
    assert f"train: {shown}\n" in dump(config)
    assert not any(word in text for word in SECRETS for text in (repr(config), dump(config)))
    assert config.data.train.secret == secret


@pytest.mark.parametrize(
    "text",
    [
        "error: https://ann:hunter2@host/a?sig=signature: answered 403",
        "data.train=https://host/a?X-Amz-Signature=signature eval.x=s3://k:hunter2@b/c",
        "a 'gs://k:hunter2@b/c' and \"https://h/?hunter2\"",
    ],
)
def test_credentials_are_taken_out_of_any_text(text):
    shown = without_credentials(text)
    assert not any(word in shown for word in SECRETS)
    assert without_credentials(shown) == shown
    assert without_credentials("plain text? yes: a@b, x://y") == "plain text? yes: a@b, x://y"


def test_a_message_keeps_what_follows_an_address():
    assert (
        without_credentials("data.train: pipe:aws ...: exit code 3")
        == "data.train: pipe:aws ...: exit code 3"
    )
    assert without_credentials("https://h/a?s=1 answered 403") == "https://h/a answered 403"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ftp://ann:hunter2@host/a", "scheme ftp: is not one of https, http, s3, gs, pipe"),
        ("simplecache://x::https://host/a", "scheme simplecache:"),
        ("file://host/a", "a local path has none"),
        ("https://host/a::pipe:id", "has :: in its path"),
        ("https:///a", "has no host"),
        (
            "https://host/my set?sig=hunter2",
            "has a space, which addresses write as %20 (https://host/my set)",
        ),
        ("s3://key:hunter2@bucket/set", "s3:// has credentials elsewhere (s3://bucket/set)"),
        ("gs://bucket/set?token=hunter2", "gs:// has credentials elsewhere (gs://bucket/set)"),
        ("https://host/a\nHost: other", "characters that no address has"),
        ("pipe:id", "is a command; it needs data.allow_pipe=true"),
    ],
)
def test_an_address_that_is_not_allowed_is_refused_in_one_line_without_its_password(
    address, reason, tmp_path
):
    file = tmp_path / "c.yaml"
    file.write_text(f"data:\n  train: {address!r}\noptim:\n  steps: 1\n".replace("'", '"'))
    with pytest.raises(UserError) as caught:
        load(file, [])
    message = str(caught.value)
    assert message.startswith("data.train: ")
    assert reason in message
    assert "hunter2" not in message
    assert "\n" not in message


def test_the_addresses_of_a_mixture_are_kept_like_any_other():
    config = run(mix={"https://ann:hunter2@host/a%20b?sig=signature": 0.5, "more/data": 2})
    assert [str(place) for place in config.data.mix] == ["https://host/a%20b", "more/data"]
    assert not any(word in text for word in SECRETS for text in (repr(config), dump(config)))
    assert next(iter(config.data.mix)).secret.startswith("https://ann:hunter2@host/")
    for place in ("ftp://ann:hunter2@host/a", "pipe:id hunter2"):
        with pytest.raises(UserError, match=r"^data\.mix") as caught:
            load(None, ["data.train=x", "optim.steps=1", f"data.mix={{'{place}': 1}}"])
        assert "hunter2" not in str(caught.value)


def test_test_sets_are_asked_for_the_same_permission_as_training_data():
    with pytest.raises(UserError, match=r"eval\.verification\.a: pipe:id is a command"):
        load(None, ["data.train=x", "optim.steps=1", "eval.verification.a=pipe:id"])


def test_text_without_a_scheme_is_a_path_and_file_is_local():
    assert str(location("runs:1/x")) == "runs:1/x"
    assert str(location("file:///a%20b/c")) == "/a b/c"
    assert str(location("./a::b")) == "a::b"


def test_files_of_a_folder_keep_its_credentials_and_query():
    folder = Url("https://ann:hunter2@host/set/?sig=signature")
    assert folder.file("index/a b.tar").secret == "https://ann:hunter2@host/set/index/a%20b.tar?sig=signature"


def test_names_in_an_object_store_are_taken_as_they_are():
    assert (
        Url("s3://bucket/my set/").file("index/a b+%20.tar").secret == "s3://bucket/my set/index/a b+%20.tar"
    )


@pytest.mark.parametrize(
    "address", ["s3://bucket/set", "https://ann:hunter2@host/set", "ftp://ann:hunter2@h"]
)
def test_a_command_that_reads_or_writes_here_refuses_an_address(address):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        local_path(address)
    assert "hunter2" not in str(caught.value)
    assert local_path("a/b") == Path("a/b")


def test_the_name_of_a_file_stays_one_argument_of_a_pipe():
    pipe = Url("pipe:cat '/my set/{}' --").file("index/x' ; id {} $HOME")
    assert pipe.command == ["cat", "/my set/index/x' ; id {} $HOME", "--"]


def test_the_command_line_that_wandb_keeps_has_no_credentials(monkeypatch, tmp_path):
    from trainer import log

    monkeypatch.setattr(
        sys, "argv", ["train.py", "data.train=https://ann:hunter2@host/a?sig=signature", "seed=1"]
    )
    monkeypatch.setattr(log.wandb, "setup", lambda **_: None)
    monkeypatch.setattr(log.wandb, "init", lambda **options: options["config"]["data"]["train"])
    config = load(None, ["data.train=https://ann:hunter2@host/a", "optim.steps=1", f"run.root={tmp_path}"])
    assert log._start_wandb(config) == "https://host/a"
    assert sys.argv == ["train.py", "data.train=https://host/a", "seed=1"]


@pytest.mark.nightly
def test_a_run_on_a_remote_data_set_leaves_its_credentials_nowhere(folder):
    with served(folder) as web:
        url = web.url("/packed?sig=signature", user="ann:hunter2@")
        own = launching.options(folder, "remote", "optim.steps=4", "log.wandb=offline")
        own = [option for option in own if not option.startswith(("data.train=", "eval."))]
        cache = f"data.cache_dir={folder / 'cache'}"
        addresses = (f"data.train={url}", f"eval.classification.same={url}")
        done = launching.start_train(1, *addresses, cache, *own, no_proxy="*").wait()
    assert done.code == 0, done.stderr
    assert "(not encrypted), cached in" in done.stderr
    assert [r.path.partition("?")[0] for r in web.requests].count("/packed/data-000000.tar") == 1
    written = [path for top in ("remote", "cache") for path in (folder / top).rglob("*") if path.is_file()]
    contents = [done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in written)]
    assert len(contents) > 10
    assert not any(word.encode() in content for word in SECRETS for content in contents)
