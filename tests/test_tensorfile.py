"""What the stream writes is what safetensors itself reads, whatever the type, the layout and the size."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from trainer import tensorfile
from trainer.manifest import entry_of
from trainer.tensorfile import write_tensors

TENSORS = {
    "matrix": torch.arange(35.0).reshape(7, 5),
    "transposed": torch.arange(35.0).reshape(5, 7).T,
    "every third": torch.arange(30)[::3],
    "number": torch.tensor(7),
    "nothing": torch.empty(0, 4),
    "rows of nothing": torch.empty(3, 0),
    "half": torch.linspace(-1, 1, 9).to(torch.bfloat16),
    "truth": torch.tensor([True, False, True]),
    "bytes": torch.arange(11, dtype=torch.uint8),
    "double": torch.tensor([1 / 3, float("nan"), -float("inf")], dtype=torch.float64),
    "image": torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(torch.float16),
    "trained": torch.ones(3, requires_grad=True),
}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("chunk_bytes", [1, 8, 24, 1 << 20])
def test_the_library_reads_what_was_written_and_the_hash_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(tensorfile, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "file.safetensors"
    entry = write_tensors(path, TENSORS, {"start": "3"})
    assert entry == entry_of(path)
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"start": "3"}
        assert set(file.keys()) == set(TENSORS)
        for name, expected in TENSORS.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert bits(found) == bits(expected), name


def test_tensors_that_lie_ready_are_written_without_a_copy() -> None:
    rows = torch.arange(12.0).reshape(4, 3)
    [view] = tensorfile._bytes_of(rows)
    rows[0, 0] = 7.0
    assert torch.frombuffer(view, dtype=torch.float32)[0] == 7.0


def test_a_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "empty.safetensors", {}, {})
    with safe_open(tmp_path / "empty.safetensors", framework="pt") as file:
        assert list(file.keys()) == []
