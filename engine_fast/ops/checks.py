"""Wrong arguments, refused before anything is computed: the operator, the argument, what came, what was wanted.

csrc/aten repeats what a kernel's safety needs, for callers of the raw operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from engine_fast.errors import ConfigError

Reduction = Literal["none", "sum"]
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def energy(
    z: Tensor,
    s: Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    weight: Tensor | None,
    ignore: Tensor | None,
    temperature: float,
) -> None:
    where = "energy"
    if z.ndim != 2 or z.shape != s.shape:
        raise ConfigError(f"{where}: z {tuple(z.shape)}, s {tuple(s.shape)}, expected two equal (N, V) shapes.")
    _pair(where, "z", z, "s", s)
    options(where, z, z.shape[0], z.shape[1], noise, seed, weight, ignore, temperature)


def soft_embedding(
    z: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    ignore: Tensor | None,
    temperature: float,
) -> None:
    where = "soft_embedding"
    if z.ndim != 2 or table.ndim != 2 or z.shape[1] != table.shape[0]:
        raise ConfigError(f"{where}: z {tuple(z.shape)}, table {tuple(table.shape)}, expected (N, V) and (V, D).")
    _pair(where, "z", z, "table", table)
    options(where, z, z.shape[0], z.shape[1], noise, seed, None, ignore, temperature)


def head(
    where: str, hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        hint = ""
        if weight.numel() == 0 and hidden.ndim == 2:
            hint = " A weight sharded by ZeRO-3 is whole only inside the module that owns it: call from there."
        raise ConfigError(
            f"{where}: {hidden_name} {tuple(hidden.shape)}, {weight_name} {tuple(weight.shape)}, "
            f"expected (N, D) and (V, D).{hint}"
        )
    _same_device(where, hidden_name, hidden, weight_name, weight)
    if not _autocast(hidden):
        _dtype(where, weight_name, weight, hidden.dtype, hidden_name)
    if bias is not None:
        _same_device(where, hidden_name, hidden, bias_name, bias)
        if bias.shape != weight.shape[:1]:
            raise ConfigError(
                f"{where}: {bias_name} {tuple(bias.shape)}, expected ({weight.shape[0]},) as {weight_name}."
            )
        if not _autocast(hidden):
            _dtype(where, bias_name, bias, hidden.dtype, hidden_name)


def linear_energy(
    h_student: Tensor,
    w_student: Tensor,
    b_student: Tensor | None,
    h_teacher: Tensor,
    w_teacher: Tensor,
    b_teacher: Tensor | None,
    reduction: Reduction,
) -> None:
    where = "linear_energy"
    head(where, "h_student", h_student, "w_student", w_student, "bias_student", b_student)
    head(where, "h_teacher", h_teacher, "w_teacher", w_teacher, "bias_teacher", b_teacher)
    if h_student.shape[0] != h_teacher.shape[0]:
        raise ConfigError(
            f"{where}: h_teacher has {h_teacher.shape[0]} rows, expected {h_student.shape[0]} as h_student."
        )
    if w_student.shape[0] != w_teacher.shape[0]:
        raise ConfigError(
            f"{where}: w_teacher scores {w_teacher.shape[0]} words, expected {w_student.shape[0]} as w_student. "
            "Student and teacher must share one target vocabulary."
        )
    if not _autocast(h_student):
        _pair(where, "h_student", h_student, "h_teacher", h_teacher)
    if reduction not in ("none", "sum"):
        raise ConfigError(f"{where}: reduction = {reduction!r}, expected 'none' or 'sum'.")


def teacher_logits(z: Tensor, h_teacher: Tensor, w_teacher: Tensor) -> None:
    if z.ndim != 2 or z.shape != (h_teacher.shape[0], w_teacher.shape[0]):
        raise ConfigError(
            f"teacher_energy: z {tuple(z.shape)}, expected ({h_teacher.shape[0]}, {w_teacher.shape[0]}): rows as "
            "h_teacher, words as w_teacher. Student and teacher must share one target vocabulary."
        )
    if not _autocast(z):
        _pair("teacher_energy", "z", z, "h_teacher", h_teacher)


def table(where: str, weight: Tensor, table: Tensor, hidden: Tensor) -> None:
    if table.ndim != 2 or table.shape[0] != weight.shape[0]:
        raise ConfigError(
            f"{where}: table {tuple(table.shape)}, expected ({weight.shape[0]}, D), a row for every word of w_student "
            f"{tuple(weight.shape)}. Student and teacher must share one target vocabulary."
        )
    if not _autocast(hidden):
        _pair(where, "h", hidden, "table", table)


def forbidden(where: str, words: Sequence[int], num_words: int) -> None:
    if num_words < 1:
        raise ConfigError(f"{where}: V = {num_words}, expected at least one word.")
    for word in words:
        if isinstance(word, bool) or not isinstance(word, int) or not 0 <= word < num_words:
            raise ConfigError(f"{where}: forbidden holds {word!r}, expected ids from 0 to {num_words - 1}.")


def options(
    where: str,
    like: Tensor,
    num_rows: int,
    num_words: int,
    noise: Tensor | None,
    seed: int | Tensor | None,
    weight: Tensor | None,
    ignore: Tensor | None,
    temperature: float,
) -> None:
    """What every operator is told besides its matrices."""
    if num_words < 1:
        raise ConfigError(f"{where}: V = {num_words}, expected at least one word.")
    if noise is not None and seed is not None:
        raise ConfigError(f"{where}: noise and seed are both given, expected one of them.")
    if isinstance(temperature, bool) or not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ConfigError(f"{where}: temperature = {temperature!r}, expected a positive number.")
    if noise is not None:
        if noise.requires_grad:
            raise ConfigError(f"{where}: noise requires a gradient and gets none. Detach it.")
        if noise.dtype not in _FLOATS:
            raise ConfigError(f"{where}: noise is {noise.dtype}, expected a floating dtype.")
        _same_device(where, "the logits' side", like, "noise", noise)
        if noise.shape != (num_rows, num_words):
            raise ConfigError(f"{where}: noise {tuple(noise.shape)}, expected {(num_rows, num_words)} as the logits.")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ConfigError(f"{where}: seed {seed.dtype} {tuple(seed.shape)}, expected one int64.")
    is_key = isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63
    if seed is not None and not isinstance(seed, Tensor) and not is_key:
        raise ConfigError(f"{where}: seed = {seed!r}, expected an integer from -2**63 to 2**63 - 1.")
    for name, vector in (("weight", weight), ("ignore", ignore)):
        if vector is None:
            continue
        _same_device(where, "the logits' side", like, name, vector)
        if vector.shape != (num_rows,):
            raise ConfigError(f"{where}: {name} {tuple(vector.shape)}, expected ({num_rows},), one for each row.")
    if weight is not None and weight.requires_grad:
        raise ConfigError(f"{where}: weight requires a gradient and gets none. Multiply the energies by it instead.")
    if ignore is not None and ignore.dtype != torch.bool:
        raise ConfigError(f"{where}: ignore is {ignore.dtype}, expected torch.bool.")


def finite(where: str, **tensors: Tensor | None) -> None:
    """Raise ConfigError naming the first tensor that holds NaN or an infinity. Waits for a GPU."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        bad = ~tensor.detach().isfinite()
        if count := int(bad.sum()):
            first = tuple(int(index) for index in bad.nonzero()[0])
            raise ConfigError(
                f"{where}: {name} {tuple(tensor.shape)} holds {count} values that are not finite, the first "
                f"{tensor[first].item()} at {first}. Look for a diverged run or a damaged checkpoint."
            )


def kernel_dtype(where: str, **tensors: Tensor | None) -> None:
    """What the compiled kernels take, after autocast."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise ConfigError(f"{where}: {name} is {tensor.dtype}, expected float32, float64, bfloat16 or float16.")
        if tensor.dtype == torch.float16 and tensor.device.type == "cpu":
            raise ConfigError(
                f"{where}: {name} is float16 on a CPU, expected bfloat16, float32 or float64. "
                "Convert it, or set ENGINE_FAST_OPS=reference."
            )


def _autocast(like: Tensor) -> bool:
    return torch.is_autocast_enabled(like.device.type)


def _pair(where: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    _same_device(where, first_name, first, second_name, second)
    for name, tensor in ((first_name, first), (second_name, second)):
        if tensor.dtype not in _FLOATS:
            raise ConfigError(f"{where}: {name} is {tensor.dtype}, expected float32, float64, bfloat16 or float16.")
    dtypes = {first.dtype, second.dtype}
    if len(dtypes) == 2 and (torch.float64 in dtypes or torch.float32 not in dtypes):
        raise ConfigError(
            f"{where}: {first_name} is {first.dtype} and {second_name} {second.dtype}, expected one dtype, or "
            "float32 beside a half-precision one. Convert one of them."
        )


def _dtype(where: str, name: str, tensor: Tensor, wanted: torch.dtype, like: str) -> None:
    if tensor.dtype != wanted:
        raise ConfigError(f"{where}: {name} is {tensor.dtype}, expected {wanted} as {like}. Convert one of them.")


def _same_device(where: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.device != second.device:
        raise ConfigError(f"{where}: {second_name} is on {second.device}, expected {first.device} as {first_name}.")
