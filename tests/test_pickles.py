import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import fuzz, message_of
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.pickles import read_pickle

PLAIN = {
    "text": "caf\u00e9",
    b"bytes": b"\x00\xff" * 300,
    7: [1, -5, 2**40, 0.5, True, False, None],
    "nested": ([], {}, (), (1,), (1, 2), (1, 2, 3, 4), [[b"a"], {"b": (b"c",)}]),
    "array": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "column major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalars": [np.int64(3), np.float32(0.5), np.bool_(True)],
}


def read(path: Path, content: bytes):
    path.write_bytes(content)
    return read_pickle(path)


def same(left, right) -> bool:
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read_as_pickle_reads_it(tmp_path, protocol):
    assert same(read(tmp_path / "a", pickle.dumps(PLAIN, protocol)), PLAIN)


def test_an_array_that_occurs_twice_is_one(tmp_path):
    array = np.arange(3)
    first, second = read(tmp_path / "a", pickle.dumps([array, array]))
    assert first is second


def test_text_of_python_2_stays_bytes(tmp_path):
    """{'data': 'ab\\xff', 'labels': [6, 9]} as Python 2's cPickle wrote it, CIFAR's way."""
    content = b"\x80\x02}q\x01(U\x04dataq\x02U\x03ab\xffU\x06labelsq\x03]q\x04(K\x06K\teu."
    assert read(tmp_path / "a", content) == {b"data": b"ab\xff", b"labels": [6, 9]}


class Attack:
    def __init__(self, function, *arguments) -> None:
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(tmp_path, protocol):
    touched = tmp_path / "touched"
    for attack in (
        Attack(os.system, f"touch {touched}"),
        Attack(eval, f"open({str(touched)!r}, 'w')"),
        Attack(np.load, str(touched)),
        Attack(getattr, 1, "real"),
    ):
        with pytest.raises(UserError, match="not a pickle of plain data"):
            read(tmp_path / "a", pickle.dumps([attack], protocol))
    assert not touched.exists()


def test_no_module_is_imported(tmp_path):
    read(tmp_path / "a", b"\x80\x04\x8c\x04this\x8c\x01s\x93.")
    with pytest.raises(UserError, match=r"it calls 'this\.s', which is not allowed"):
        read(tmp_path / "a", b"cthis\ns\n(tR.")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"not a pickle",
        b"\x80\x02]q\x01",
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2^31 entries: 32 GB in the C unpickler
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2^63 - 1
        b"\x80\x02]q\x00h\x00a.",  # a list in itself
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\x02Pfile\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension
        pickle.dumps(np.array([object()])),
        pickle.dumps(np.arange(3, dtype=">i4")),
        pickle.dumps({(1, 2): 3}),
    ],
)
def test_hostile_bytes_are_refused_or_harmless(tmp_path, content):
    message = message_of(lambda: read(tmp_path / "a", content))
    assert not message or "not a pickle of plain data" in message
    assert "\n" not in message


@fuzz(100)
@given(st.data())
def test_any_bytes_give_a_value_or_an_error_of_the_user(tmp_path, data):
    protocol = data.draw(st.integers(0, 5))
    content = bytearray(pickle.dumps([b"ab", {"c": np.arange(3)}, "text", 2**70], protocol))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)):
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = data.draw(st.binary())
    assert "\n" not in message_of(lambda: read(tmp_path / "a", bytes(content)))
