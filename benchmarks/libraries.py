"""Fused losses of other packages, for the part of our operators that they compute. PARTS says which part that is.

None of them takes gradients to both sides, so each is a lower bound of what ours has to do, not the same work. Those
that are not installed, or need a GPU, raise Unavailable and leave a line in the table.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import ForwardBackward, Inputs, Provider, Unavailable
from engine_fast import ops

ENERGY_PARTS = {
    "cross_entropy": "F.cross_entropy, O(z) given as a table: energies and ds; no dz",
    "cross_entropy_softmax": "F.cross_entropy with z.softmax(): all of SX in two torch calls",
    "forward_kl": "torchtune's ForwardKLLoss: mean SX energy and ds; no dz",
    "liger_kl": "liger_kl_div, softmax(z) given as a table: mean KL and ds; no dz",
    "liger_jsd": "liger_jsd with beta = 0, log_softmax(z) given: mean KL and ds; no dz",
}
LINEAR_PARTS = {
    "linear_cross_entropy": "F.linear_cross_entropy in chunks: one head, class indices; dh and dW",
    "cut_cross_entropy": "cut-cross-entropy: one head, class indices; dh and dW",
    "liger_linear_cross_entropy": "Liger's fused linear cross-entropy: one head, class indices; dh and dW",
    "liger_linear_jsd": "Liger's fused linear JSD with beta = 0: both heads, gradients to one of them",
}
LIGER = "liger_kernel.transformers.functional"


def energy_peer(way: str, operator: str, inputs: Inputs) -> Provider:
    """A peer of energy(z, s). Tables of z are made here, outside the clock; they take no gradient."""
    z, s = inputs.tensors
    mean = inputs.upstream.mean()
    if way == "cross_entropy":
        q = ops.reference.relax(z.detach(), operator)
        return ForwardBackward(lambda x: F.cross_entropy(x, q, reduction="none"), [s], inputs.upstream)
    if way == "cross_entropy_softmax":
        return ForwardBackward(
            lambda a, b: F.cross_entropy(b, a.softmax(-1), reduction="none"), [z, s], inputs.upstream
        )
    if way == "forward_kl":
        loss = _load("torchtune.modules.loss", "ForwardKLLoss")()
        labels = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        fixed = z.detach()
        return ForwardBackward(lambda x: loss(x, fixed, labels), [s], mean)
    _needs_gpu(z)
    if way == "liger_kl":
        divergence, q = _load(LIGER, "liger_kl_div"), z.detach().softmax(-1)
        return ForwardBackward(lambda x: divergence(x.log_softmax(-1), q, reduction="batchmean"), [s], mean)
    if way == "liger_jsd":
        jsd, log_q = _load(LIGER, "liger_jsd"), z.detach().log_softmax(-1)
        return ForwardBackward(lambda x: jsd(x.log_softmax(-1), log_q, beta=0.0), [s], mean)
    raise ValueError(f"way = {way!r}, expected one of {', '.join(ENERGY_PARTS)}.")


def linear_peer(way: str, inputs: Inputs) -> Provider:
    """A peer of linear_energy; class indices are random words."""
    h_student, w_student, h_teacher, w_teacher = inputs.tensors
    target = torch.randint(len(w_student), (len(h_student),), device=h_student.device)
    if way == "linear_cross_entropy":
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        chunked = torch.nn.LinearCrossEntropyOptions()

        def ours_to_call(h: Tensor, w: Tensor) -> Tensor:
            return F.linear_cross_entropy(h, w, target, reduction="sum", options=chunked)

        return ForwardBackward(ours_to_call, [h_student, w_student], inputs.upstream)
    _needs_gpu(h_student)
    if way == "cut_cross_entropy":
        cut = _load("cut_cross_entropy", "linear_cross_entropy")
        return ForwardBackward(lambda h, w: cut(h, w, target, reduction="sum"), [h_student, w_student], inputs.upstream)
    if way == "liger_linear_cross_entropy":
        fused = _load(LIGER, "liger_fused_linear_cross_entropy")
        return ForwardBackward(
            lambda h, w: fused(h, w, target, reduction="sum"), [h_student, w_student], inputs.upstream
        )
    if way == "liger_linear_jsd":
        jsd = _load(LIGER, "liger_fused_linear_jsd")
        return ForwardBackward(
            lambda h, w: jsd(h, w, h_teacher.detach(), w_teacher, jsd_beta=0.0), [h_student, w_student], inputs.upstream
        )
    raise ValueError(f"way = {way!r}, expected one of {', '.join(LINEAR_PARTS)}.")


def _load(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as reason:
        raise Unavailable(f"{module}.{name} cannot be imported: {reason}") from reason


def _needs_gpu(tensor: Tensor) -> None:
    if tensor.device.type != "cuda":
        raise Unavailable("it needs a GPU")
