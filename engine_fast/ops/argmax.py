"""linear_argmax(h, weight): what decoding asks of the vocabulary. N rows, V vocabulary, D width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_fast.ops import checks, library, reference


@torch.no_grad()
def linear_argmax(
    h: Tensor, weight: Tensor, bias: Tensor | None = None, *, forbidden: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The most probable word of each row that is not forbidden, and log softmax(h weight' + bias) of it.

    See `ops.reference.linear_argmax`. Logits exist for one tile of rows at a time (16 MiB), in the dtype of h, and are
    read once for maximum, argmax and sum, which is accumulated in float32 (float64 for float64). No probabilities are
    stored.

    Args: h: (N, D) hidden states; weight: (V, D) head; bias: (V,); of one dtype, float32, float64, bfloat16 or (GPU)
        float16. forbidden: ids that are never chosen, while their probability counts.
    Returns: (N,) nats, float32 (float64 for float64); (N,) int64 ids, the lowest among equals.
    Gradients: none, for inference only.
    """
    checks.head("linear_argmax", "h", h, "weight", weight, "bias", bias)
    checks.forbidden("linear_argmax", forbidden, weight.shape[0])
    if not library.fused(h):
        return reference.linear_argmax(h, weight, bias, forbidden=forbidden)
    if library.checks_finite():
        checks.finite("linear_argmax", weight=weight, bias=bias)
    head = library.autocast(h, weight, bias)
    checks.kernel_dtype("linear_argmax", h=head[0])
    value, word = torch.ops.engine_fast.linear_argmax(*head, list(forbidden))
    return value, word


@library.fake("linear_argmax")
def _(h: Tensor, w: Tensor, b: Tensor | None, forbidden: list[int]) -> tuple[Tensor, Tensor]:
    torch._check(h.ndim == 2 and w.ndim == 2, lambda: f"linear_argmax: h {h.shape}, w {w.shape}")
    rows = h.shape[0]
    return h.new_empty(rows, dtype=library.wide(h)), h.new_empty(rows, dtype=torch.int64)
