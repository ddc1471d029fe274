"""A second device where there is none: tensors that claim to be elsewhere, and refuse to meet those of the CPU.

In the block of `pretend_devices`, `tensor.to(THERE)` gives a tensor that reports that device, computes on
the CPU, and raises as torch does when it is mixed with tensors of another device. So a model can be spread over
several devices in a test without any of them, with the hooks that accelerate puts on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
THERE = torch.device("lazy:1")
"""The device that is pretended. (A real type of torch that no build supports, and that nothing tries to start.)"""

MOVES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_")


class Elsewhere(Tensor):
    """A tensor that reports another device; `raw` has its values."""

    raw: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, raw: Tensor, place: torch.device) -> Elsewhere:
        wrapper = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device="meta"
        )
        wrapper.raw, wrapper.place = raw, place
        return wrapper

    @property
    def device(self) -> torch.device:
        return self.place

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.raw!r} on {self.place}"


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _Construction(TorchFunctionMode):
    """`torch.tensor` makes its memory before any operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor:
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


_LACKS_FLOAT64 = False


@contextmanager
def pretend_devices(lack_float64: bool = False) -> Iterator[None]:
    """Let tensors move between the CPU and pretended devices while the block runs.

    Args:
        lack_float64: whether they refuse float64, as GPUs of Apple do.

    """
    global _LACKS_FLOAT64
    _LACKS_FLOAT64 = lack_float64
    try:
        with _Operations(), _Construction():
            yield
    finally:
        _LACKS_FLOAT64 = False


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the raw tensors and give its result the device it would have."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    name = func._schema.name
    mixed = tensors[:1] if name in INDEXING and tensors[0].device != CPU else tensors
    places = {t.device for t in mixed if t.dim() or t.device != CPU}
    if len(places) > 1 and name not in MOVES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {places}")
    target = kwargs.get("device") or (mixed[0].device if name in MOVES else next(iter(places), CPU))
    if torch.device(target).type == "meta":  # asked for by autograd, which knows the wrapper's own device alone
        target = THERE
    if "device" in kwargs:
        kwargs = {**kwargs, "device": CPU}
    wrappers = {id(t.raw): t for t in tensors if isinstance(t, Elsewhere)}
    raw_args, raw_kwargs = tree_map(lambda leaf: leaf.raw if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    result = func(*raw_args, **raw_kwargs)

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or torch.device(target) == CPU:
            return value
        if _LACKS_FLOAT64 and value.dtype == torch.float64:
            raise TypeError(f"{name}: the pretended device has no float64")
        known = wrappers.get(id(value))  # an operation in place returns what it was given
        return Elsewhere(value, torch.device(target)) if known is None else known

    return tree_map(wrap, result)


def spread(model: Any, parts: dict[str, str]) -> None:
    """Put modules on devices the way accelerate's `dispatch_model` does: weights there, inputs moved by hooks.

    Args:
        parts: device by the path of a module, for all of them.

    """
    for path, device in parts.items():
        place = torch.device(device)
        for module in model.get_submodule(path).modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and place != CPU:
                    moved = Elsewhere(parameter.detach(), place)
                    module._parameters[name] = nn.Parameter(moved, requires_grad=False)
        add_hook_to_module(
            model.get_submodule(path),
            AlignDevicesHook(execution_device=place, skip_keys=model._skip_keys_device_placement),
        )
    model.hf_device_map = parts
