"""An accelerator without values, for finding what a GPU would refuse: tensors left on the host.

Its tensors are torch's ``meta`` tensors: shapes and types on a device of their own. What mixes them with
tensors of the host, sends the latter between ranks, or hands them to an optimizer's fused kernel is an error
here, as it is on a GPU (which crashes, or computes with memory that is not its own). What depends on values
goes on as if all numbers were 1, every mask chose all, and nothing that Python asks were so.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.optim.optimizer as optimizers
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.distributed import World

DEVICE = torch.device("meta")
_COPIES = ("_to_copy", "copy_")
_FUSED = ("_fused_sgd_", "_fused_adamw_")


class Accelerator(TorchDispatchMode):
    """While active, looks at every operation of torch, and computes shapes where there are no values."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        library, name = operation._schema.name.split("::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if tensor.device == DEVICE]
        elsewhere = [tensor for tensor in tensors if tensor.device != DEVICE]
        if library == "c10d":
            assert not elsewhere, f"{operation}: a tensor of the host is sent between ranks"
        if here and elsewhere and name not in _COPIES:
            is_number = all(tensor.ndim == 0 for tensor in elsewhere) and name not in _FUSED
            assert is_number, f"{operation}: tensors of the host among those of the device"
        if here and name in _INSTEAD:
            return _INSTEAD[name](*args, **kwargs)
        if here and name.startswith(("index", "_index", "_unsafe_index")):
            args = (args[0], _places(args[1]), *args[2:]) if isinstance(args[1], Sequence) else args
        return operation(*args, **kwargs)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def _number(tensor: Tensor) -> bool | int | float:
    return tensor.dtype != torch.bool and torch.ones((), dtype=tensor.dtype).item()


def _nonzero(tensor: Tensor) -> Tensor:
    return _empty(tensor.numel(), tensor.ndim, dtype=torch.int64)


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    return _empty(torch.broadcast_shapes(tensor.shape, mask.shape).numel(), dtype=tensor.dtype)


def _unique(tensor: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    inverse = torch.empty_like(tensor, dtype=torch.int64)
    return tensor.flatten(), inverse, inverse.flatten()


def _bincount(tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return _empty(minlength, dtype=torch.int64)


def _copy_to(tensor: Tensor, **changes: Any) -> Tensor:
    if torch.device(changes.get("device") or DEVICE) == DEVICE:
        return torch.ops.aten._to_copy(tensor, **changes)
    return torch.ones(tensor.shape, dtype=changes.get("dtype") or tensor.dtype)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the indices with every condition as the places where it is true."""
    found: list[Tensor | None] = []
    for index in indices:
        is_condition = index is not None and index.dtype == torch.bool
        found += list(_nonzero(index).unbind(1)) if is_condition and index is not None else [index]
    return found


_INSTEAD: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": _number,
    "nonzero": _nonzero,
    "masked_select": _masked_select,
    "_unique2": _unique,
    "unique_consecutive": _unique,
    "bincount": _bincount,
    "_to_copy": _copy_to,
    "_fused_sgd_": lambda *args, **kwargs: None,
    "_fused_adamw_": lambda *args, **kwargs: None,
}


@contextmanager
def accelerator_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Give rank 1 of 2, whose messages go nowhere, with ``DEVICE`` as its device."""
    new_generator = torch.Generator
    monkeypatch.setattr(
        torch, "Generator", lambda device="cpu": new_generator("cpu" if device == DEVICE else device)
    )
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with Accelerator():
            yield World(rank=1, size=2, local_rank=1, local_size=2, device=DEVICE, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
