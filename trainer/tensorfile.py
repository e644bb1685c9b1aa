"""A safetensors file written as a stream: hashed on its way, a few MB at a time.

``safetensors.save_file`` would leave the hash to a second reading, and would need all of an accelerator's
state on the host first. The format is a line of JSON and the bytes of the tensors; the library reads it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trainer.manifest import Entry, sync

_CHUNK_BYTES = 16 << 20
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Entry:
    """Write a file that survives a power cut; return its size and hash. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(tensors, metadata):
            file.write(piece)
            digest.update(piece)  # both let other threads run
        size_bytes = file.tell()
    sync(path)
    return Entry(size_bytes, digest.hexdigest())


def _pieces(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the content of the file."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # all are aligned then
    entries: dict[str, object] = {"__metadata__": metadata}
    start = stop = 0
    for name in names:
        tensor = tensors[name]
        start, stop = stop, stop + tensor.nbytes
        shape = list(tensor.shape)
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [start, stop]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        yield from _bytes_of(tensors[name])


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, of any device and layout, without a copy where they lie ready."""
    rows = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    row_bytes = max(1, rows[:1].nbytes)
    for part in rows.split(max(1, _CHUNK_BYTES // row_bytes)):
        ready = part.cpu().contiguous()
        # A single element may keep any stride, which no view as bytes allows.
        yield memoryview(ready.as_strided((ready.numel(),), (1,)).view(torch.uint8).numpy())
