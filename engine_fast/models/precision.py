"""What a model computes in when it decodes: fp32, bf16 or int8, with its weights laid out for that.

On a CPU the linear layers are replaced, for inference only: F.linear rearranges its weights on every call, which is a
third of the time of a sentence alone (benchmarks/NOTES.md). Everything else of a network stays what it is.
"""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from engine_fast.errors import ConfigError
from engine_fast.models.protocols import Network

Precision = Literal["fp32", "bf16", "int8"]
AnyModel = TypeVar("AnyModel", bound=Network)

_ROWS = 128
"""Rows that oneDNN is told to expect; other numbers work, too."""


class PackedLinear(nn.Module):
    """x W' + b in bfloat16, W (out, in) arranged once as the CPU's kernels read it. No gradient."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16(), _ROWS)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class Int8Linear(nn.Module):
    """x W' + b with int8 products summed in int32, one scale for each row of x and of W. No gradient.

    A scale is the row's largest absolute value over 127, so that a sentence depends on none beside it in the batch, as
    it would with one scale for all of x, which is what torch's own dynamic quantisation has. Input and output float32.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rounded, scales = _rounded(linear.weight.detach().float())
        packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("scales", scales[:, 0].contiguous(), persistent=False)
        self.register_buffer("zeros", torch.zeros(len(scales), dtype=torch.int64), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rounded, scales = _rounded(x)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        y.mul_(scales)
        return y if self.bias is None else y.add_(self.bias)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and (..., 1) float32 whose product is nearly x; a row of zeros has any scale."""
    scales = x.abs().amax(-1, keepdim=True).mul_(1 / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (x / scales).round_().to(torch.int8), scales


def set_precision(model: AnyModel, precision: Precision) -> AnyModel:
    """The model, in place, ready to decode in `precision`; the last thing that is done to it: no training, no saving.

    fp32: float32 throughout.
    bf16: weights and activations bfloat16, products summed in float32. On a CPU whose bfloat16 oneDNN knows, linear
        layers are packed (PackedLinear).
    int8 (CPU only): linear layers with int8 weights and activations (Int8Linear), all else float32. On a CPU with
        bfloat16 units it is no faster than bf16 at the paper's size; it is for those without.
    The head stays a matrix, for fused operators read it: float32 or bfloat16.

    Raises: ConfigError for another precision, for int8 on another device, or where this torch lacks its kernels.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision = {precision!r}, expected one of {', '.join(get_args(Precision))}.")
    device = next(model.parameters()).device
    model.requires_grad_(False)
    if precision == "int8":
        _require_int8(device)
        _replace(model.float(), Int8Linear)
    elif precision == "bf16":
        model.bfloat16()
        if (
            device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            _replace(model, PackedLinear)
    else:
        model.float()
    return model


def _require_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError(f"precision = 'int8' on {device}, expected a CPU. On a GPU use bf16.")
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise ConfigError(
            f"precision = 'int8': torch {torch.__version__} has no int8 products of oneDNN here. Use fp32 or bf16."
        )


def _replace(module: nn.Module, make: type[PackedLinear] | type[Int8Linear]) -> None:
    """Every nn.Linear below `module`, but for subclasses, which the heads are."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, make(child))
        else:
            _replace(child, make)
