"""An accelerator that computes on the host, for finding what a GPU would refuse: tensors left on the host.

Its tensors say that they are on a device of their own, torch's ``meta``, and keep their values in a tensor of
the host that nobody sees. What mixes them with tensors of the host, sends the latter between ranks, or hands
them to an optimizer's fused kernel is an error here, as it is on a GPU (which crashes, or computes with
memory that is not its own). All else gives what it gives on the host.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.optim.optimizer as optimizers
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from trainer.distributed import World

DEVICE = torch.device("meta")
_HOST = torch.device("cpu")
_COPIES = ("_to_copy", "copy_")
_FUSED = ("_fused_sgd_", "_fused_adamw_")


class OnDevice(Tensor):
    """A tensor of the accelerator."""

    values: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})

    def data_ptr(self) -> int:
        """Return where the values are."""
        return self.values.data_ptr()

    def tolist(self) -> Any:
        """Return the values, which a GPU would send to the host."""
        return self.values.tolist()

    def new_tensor(self, data: Any, **more: Any) -> Tensor:  # its own way to the device cannot be seen
        """Return a tensor beside this one."""
        return OnDevice(self.values.new_tensor(data, **more))


class Accelerator(TorchDispatchMode):
    """While active, tensors can be made on ``DEVICE`` and sent there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    library, name = operation._schema.name.split("::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    assert all(tensor.device != DEVICE for tensor in elsewhere), f"{operation}: made in a way not seen here"
    if library == "c10d" and name != "barrier":
        assert not elsewhere, f"{operation}: a tensor of the host is sent between ranks"
    if here and elsewhere and name not in _COPIES:
        is_number = all(tensor.ndim == 0 for tensor in elsewhere) and name not in _FUSED
        assert is_number, f"{operation}: tensors of the host among those of the device"
    goes_here = bool(here)
    own_args, own_kwargs = tree_map_only(OnDevice, lambda tensor: tensor.values, (args, dict(kwargs)))
    own_kwargs.pop("pin_memory", None)  # a GPU's driver gives it
    if own_kwargs.get("device") is not None:
        goes_here = torch.device(own_kwargs["device"]) == DEVICE
        own_kwargs["device"] = _HOST
    found = operation(*own_args, **own_kwargs)
    if library == "c10d":
        return found
    if here and torch.Tag.inplace_view in operation.tags:  # the tensor itself has the old shape
        with no_dispatch():
            operation(*args, **kwargs)
    changed = _changed_arguments(operation._schema, args, kwargs)
    if changed is not None:
        return changed
    return tree_map_only(Tensor, OnDevice, found) if goes_here else found


def _changed_arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments that an operation changes and returns; None if it returns others."""
    if not schema.returns or not all(r.alias_info and r.alias_info.is_write for r in schema.returns):
        return None
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    of_alias = {
        frozenset(argument.alias_info.before_set): given[argument.name]
        for argument in schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    }
    values = [of_alias[frozenset(r.alias_info.before_set)] for r in schema.returns]
    return values[0] if len(values) == 1 else tuple(values)


class HostGenerator(torch.Generator):
    """Draws on the host for the device too."""

    def __new__(cls, device: Any = _HOST) -> "HostGenerator":
        return super().__new__(cls, _HOST if torch.device(device) == DEVICE else device)


@contextmanager
def accelerated(world: World) -> Iterator[World]:
    """Give the rank an accelerator. Random numbers are those of the host."""
    new_tensor = torch.tensor

    def made(data: Any, device: Any = None, **more: Any) -> Tensor:
        return new_tensor(data, **more).to(device)

    with (
        mock.patch.object(torch, "Generator", HostGenerator),
        mock.patch.object(torch, "tensor", made),  # its own way to a device cannot be seen
        mock.patch.object(torch.accelerator, "get_memory_info", return_value=(1 << 40, 1 << 40)),
        mock.patch.object(
            optimizers, "_get_fused_kernels_supported_devices", return_value=["cpu", DEVICE.type]
        ),
        # They choose the device of what they send themselves.
        mock.patch.object(dist, "all_gather_object", _unseen(dist.all_gather_object)),
        mock.patch.object(dist, "broadcast_object_list", _unseen(dist.broadcast_object_list)),
        Accelerator(),
    ):
        yield replace(world, device=DEVICE)


def _unseen(function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            function(*args, **kwargs)

    return call


def on_host(tensor: Tensor) -> Tensor:
    """Return the values; fails for a tensor that is not on the device."""
    assert isinstance(tensor, OnDevice)
    return tensor.values
