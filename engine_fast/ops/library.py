"""Which implementation runs, and the ties between the compiled operators and Python.

ENGINE_FAST_OPS = fused | reference chooses; unset, the compiled kernels run where they load and one warning says why
where they do not. ENGINE_FAST_CHECK_FINITE=1 lets every operator look for NaN and infinities in its weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine_fast import extension
from engine_fast.errors import BuildError, ConfigError

Implementation = Literal["fused", "reference"]
_F = TypeVar("_F", bound=Callable[..., Any])
_IMPLEMENTATIONS = ("fused", "reference")


def _load() -> str:
    try:
        extension.load()
    except BuildError as error:
        return str(error)
    return ""


PROBLEM = _load()
"""Why the compiled operators cannot be used; empty where they can."""
_HAS_CUDA = not PROBLEM and bool(extension.build_info()["cuda"])
"""Read once: every call asks, it costs a file, and torch.compile does not trace files."""

_forced: Implementation | None = None
_check_finite: bool = os.environ.get("ENGINE_FAST_CHECK_FINITE", "0") not in ("", "0")
_warned: set[str] = set()


def implementation(device: torch.device | str = "cpu") -> Implementation:
    """What runs for tensors of `device`. Raises BuildError where `fused` is demanded and cannot be."""
    wanted = _forced or os.environ.get("ENGINE_FAST_OPS") or "auto"
    if wanted not in (*_IMPLEMENTATIONS, "auto"):
        raise ConfigError(f"ENGINE_FAST_OPS = {wanted!r}, expected fused, reference, or unset to choose by itself.")
    if wanted == "reference":
        return "reference"
    problem = PROBLEM or _missing_for(torch.device(device).type)
    if not problem:
        return "fused"
    if wanted == "fused":
        raise BuildError(f"ENGINE_FAST_OPS = 'fused', and the compiled operators cannot be used: {problem}")
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(
            f"engine_fast.ops runs its plain torch definitions, slower and with (N, V) tensors in memory: {problem} "
            "ENGINE_FAST_OPS=reference silences this.",
            stacklevel=4,  # of implementation, fused and the facade
        )
    return "reference"


def fused(tensor: Tensor) -> bool:
    """Whether the compiled operators run for tensors of this one's device."""
    return implementation(tensor.device) == "fused"


def checks_finite() -> bool:
    return _check_finite


@contextmanager
def using(choice: Implementation | None = None, *, check_finite: bool | None = None) -> Iterator[None]:
    """Within the block: this implementation, and weights checked for NaN and infinities or not."""
    global _forced, _check_finite
    if choice is not None and choice not in _IMPLEMENTATIONS:
        raise ConfigError(f"ops.using({choice!r}): expected 'fused' or 'reference'.")
    before = _forced, _check_finite
    _forced = choice or _forced
    _check_finite = _check_finite if check_finite is None else check_finite
    try:
        yield
    finally:
        _forced, _check_finite = before


def fake(name: str) -> Callable[[_F], _F]:
    """Register shapes and dtypes of the compiled operator `name`."""
    if PROBLEM:
        return lambda function: function
    return cast(Callable[[_F], _F], torch.library.register_fake(f"engine_fast::{name}"))


def differentiable(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> Callable[..., Any]:
    """Register the gradient of the compiled operator `name`; returns what the facade calls.

    Outside a compiler that is an autograd function of the same gradient: the registered one searches its arguments for
    tensors and binds them to names, which takes longer than a small operator does.
    """
    if PROBLEM:
        return _absent
    backward = once_differentiable(backward)
    torch.library.register_autograd(f"engine_fast::{name}", backward, setup_context=setup)
    operator = getattr(torch.ops.engine_fast, name).default

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = operator(*arguments)
        setup(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    direct: Any = type(name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return operator(*arguments) if traced else direct.apply(*arguments)

    return call


def _absent(*arguments: Any) -> Any:
    raise BuildError(PROBLEM)


def may_overwrite(*saved: Tensor) -> bool:
    """Asked in a backward pass: whether what was saved for it is needed by nobody after it.

    Not with retain_graph=True, nor where a compiler traces, which keeps buffers as it likes.
    """
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return all(type(tensor) is Tensor or type(tensor) is torch.nn.Parameter for tensor in saved)


def wide(tensor: Tensor) -> torch.dtype:
    """The accumulation dtype: float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


_T = TypeVar("_T", Tensor, Tensor | None)


def autocast(*tensors: _T) -> list[_T]:
    """The tensors in autocast's dtype where it is on, as for torch's own products; float64 stays."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _missing_for(device: str) -> str:
    if device == "cpu" or (device == "cuda" and _HAS_CUDA):
        return ""
    hint = " Rebuild with ENGINE_FAST_CUDA=1." if device == "cuda" else ""
    return f"engine_fast._C has no kernels for {device}.{hint}"
