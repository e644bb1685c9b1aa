"""Reading the pickles of foreign data sets without unpickling: no name in them is ever looked up or called.

A pickle is a program for a stack machine that may import and call anything. CIFAR's batches and InsightFace's
verification sets need a small part of it: numbers, text, bytes, lists, tuples, dicts and plain arrays of
numpy. This is that part, run on the tokens of ``pickletools``, which executes nothing. A callable is nothing
but its name here, and only the five names below mean something. Text of Python 2 comes as bytes.
"""

import io
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError

_PUSHED = {
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
}  # fmt: skip
_PYTHON_2_TEXT = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"}


class _Name(str):
    """The name of a callable."""


class _NewArray:
    """An array between its making and the BUILD that says what is in it."""

    def __init__(self) -> None:
        self.memo_keys: list[int] = []


def read_pickle(path: Path) -> Any:
    """Return what a pickle of plain data holds. Raises UserError for any other bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    try:
        return _Machine().run(content)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error) as error:
        reason = " ".join(ascii(error).split())[:200]
        raise UserError(f"{path}: not a pickle of plain data: {reason}") from None


class _Machine:
    """The stack, the stacks below the marks, and the memo: a dict, so that a large key costs nothing."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("it has no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _PYTHON_2_TEXT:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(items[::-1]))
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("APPENDS", "SETITEMS", "LIST", "TUPLE", "DICT"):
            self.stack = self.below.pop()
            self.gather(name, stack)
        elif name in ("APPEND", "SETITEM"):
            items = [stack.pop() for _ in range(1 if name == "APPEND" else 2)]
            self.gather(name + "S", items[::-1])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            key = len(self.memo) if name == "MEMOIZE" else argument
            self.memo[key] = stack[-1]
            if isinstance(stack[-1], _NewArray):
                stack[-1].memo_keys.append(key)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module}.{attribute}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            self.build(stack.pop())
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it needs the operation {name}")

    def gather(self, name: str, items: list[Any]) -> None:
        """Make a container of items, or add them to the one on the stack."""
        if name == "TUPLE":
            self.stack.append(tuple(items))
            return
        if name in ("LIST", "DICT"):
            self.stack.append([] if name == "LIST" else {})
        container = self.stack[-1]
        if name in ("APPENDS", "LIST") and isinstance(container, list):
            container += items
            return
        keys, values = items[::2], items[1::2]
        if not isinstance(container, dict) or any(not isinstance(key, str | bytes | int) for key in keys):
            raise ValueError("items are added to what is no list, or no dict of names")
        container.update(zip(keys, values, strict=True))

    def build(self, state: Any) -> None:
        made = self.stack[-1]
        if isinstance(made, np.dtype):
            if _text(state[1]) not in ("<", "|", "="):
                raise ValueError("an array of big-endian numbers")
            return
        if not isinstance(made, _NewArray):
            raise ValueError(f"it sets the attributes of a {type(made).__name__}")
        *_, shape, dtype, is_fortran, content = state
        self.stack[-1] = _array(content, dtype, shape, "F" if is_fortran else "C")
        for key in made.memo_keys:
            self.memo[key] = self.stack[-1]


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Do what one of five functions would do. Raises ValueError for every other."""
    if not isinstance(function, _Name):
        raise ValueError("it calls what is not a function")
    match function.replace("numpy._core.", "numpy.core."):
        case "numpy.core.multiarray._reconstruct" if arguments[0] == "numpy.ndarray":
            return _NewArray()
        case "numpy.dtype":
            code = _text(arguments[0]).lstrip("<|=")
            if code not in _DTYPES:
                raise ValueError(f"an array of {code!a}")
            return np.dtype(code)
        case "numpy.core.multiarray.scalar":
            dtype, content = arguments
            return _array(content, dtype, (), "C").item()
        case "numpy.core.numeric._frombuffer":
            content, dtype, shape, order = arguments
            return _array(content, dtype, shape, _text(order))
        case "_codecs.encode":  # how Python 3 writes bytes that Python 2 can read
            text, encoding = arguments
            if encoding != "latin1":
                raise ValueError(f"text in {encoding!a}")
            return text.encode("latin-1")
    raise ValueError(f"it calls {function!a}, which is not allowed")


def _array(content: Any, dtype: Any, shape: Any, order: str) -> Any:
    if (
        not isinstance(content, bytes | bytearray)
        or not isinstance(dtype, np.dtype)
        or order not in ("C", "F")
    ):
        raise ValueError("an array that is not made of bytes")
    array = np.frombuffer(content, dtype)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _text(value: Any) -> str:
    if not isinstance(value, str | bytes):
        raise ValueError("a name is expected")
    return value.decode("latin-1") if isinstance(value, bytes) else value
