"""Another device, where there is no GPU: tensors that are on the CPU, but say that they are not, and do not mix.

torch checks this itself, but only on a machine that has the device. Here it is checked for the code that evaluates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("maia", 0)
"""A kind of device that torch knows and this build of it has not."""

CROSSING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor that says that it is on `DEVICE`; `held` is what it holds, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `another_device`")


@contextmanager
def another_device() -> Iterator[None]:
    """Where tensors can be on `DEVICE`; also inference mode, without which torch looks into them itself."""
    with torch.inference_mode(), _Dispatch(), _Functions():
        yield


def moved(module: nn.Module) -> nn.Module:
    """The module itself, its weights now on `DEVICE`; to be called inside of `another_device`."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: Elsewhere(each.detach().clone()) for name, each in held.items() if each is not None})  # type: ignore[arg-type]
    return module


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, Elsewhere)]
        here = [each for each in tensors if not isinstance(each, Elsewhere) and each.dim()]
        if there and here and func not in CROSSING:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} has some on {DEVICE}")
        goes_there = bool(there)
        if (device := kwargs.get("device")) is not None:
            goes_there = torch.device(device) == DEVICE
            kwargs["device"] = torch.device("cpu")
        made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda each: Elsewhere(each) if goes_there and isinstance(each, Tensor) else each, made)


class _Functions(TorchFunctionMode):
    """What torch refuses a device that it has not, before it comes to a dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Elsewhere):
            if func is Tensor.new_tensor:
                return Elsewhere(args[0].held.new_tensor(*args[1:], **(kwargs or {})))
            if func is Tensor.tolist:
                return args[0].held.tolist()
            if func is Tensor.__getitem__:
                return Elsewhere(args[0].held[tree_map(_held, args[1])])
            if func is Tensor.copy_:
                args[0].held.copy_(*map(_held, args[1:]))
                return args[0]
        return func(*args, **(kwargs or {}))


def _held(each: Any) -> Any:
    return each.held if isinstance(each, Elsewhere) else each
