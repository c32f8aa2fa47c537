"""A frozen model that is too large for one device: its weights lie in shards and come together around each use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from engine_fast.distributed.quiet import quiet


class _Host(nn.Module):
    """What DeepSpeed wraps: its call is where a step of gathering begins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, use: Callable[[Any], Any]) -> Any:
        return use(self.model)


def shard_frozen(
    model: nn.Module, *, device: torch.device, extra: dict[str, Any]
) -> Callable[[Callable[[Any], Any]], Any]:
    """Shard a module without weight gradients over the ranks' devices, in place, by ZeRO stage 3.

    The module comes on the CPU; its tensors reach `device` one after another, so that it never has to hold them all.

    Returns `within`: within(use) is use(model), called on every rank at once, with each layer's weights whole around
    its own call. What use() does to a weight it does through the module that owns it. Gradients reach the inputs of
    use(), also after within() has returned; outputs and gradients equal those of the whole model bit by bit.

    A module that is called twice in one step, such as a head, stays whole from its backward pass to the next step.
    `extra` is the deepspeed: section, of which the stage3_* keys of zero_optimization apply.
    """
    import deepspeed

    dtype = next(model.parameters()).dtype
    stage3 = {key: value for key, value in extra.get("zero_optimization", {}).items() if key.startswith("stage3_")}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, **stage3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    with quiet():
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)  # DeepSpeed moves nothing of a module that is in shards already
        engine, *_ = deepspeed.initialize(model=_Host(model), config=settings, dist_init_required=False)
    # Not engine(...): that call is made for models that are trained.
    host = engine.module
    return lambda use: host(use)
