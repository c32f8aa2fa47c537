"""The float32 master weights and Adam's moments by parameter, wherever the ZeRO stage keeps this rank's share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantity = Literal["fp32", "exp_avg", "exp_avg_sq"]
QUANTITIES: tuple[Quantity, ...] = ("fp32", "exp_avg", "exp_avg_sq")
"""DeepSpeed's names: master weight, first and second moment of the gradient."""


class MasterState:
    """A view into a DeepSpeed engine. Whole tensors go in; each rank keeps its part."""

    def __init__(self, engine: Any, stage: int) -> None:
        self._engine, self._optimizer, self._stage = engine, engine.optimizer, stage
        self._base: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter once, by DeepSpeed's name, in the optimizer's order."""
        return (pair for pair in self._engine.module.named_parameters() if pair[1].requires_grad)

    def flat(self) -> list[Tensor]:
        """This rank's master weights as the optimizer knows them: the parameters (stage 0) or flat partitions."""
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self._base.param_groups for parameter in group["params"]]

    def begin(self) -> None:
        """Make the moments that the first step would make, so that there always is a whole state to save or to fill."""
        for weights in self.flat():
            state = self._base.state[weights]
            if "exp_avg" not in state:
                state["step"] = self._step_of(weights, 0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def set_step(self, step: float) -> None:
        """The number of applied updates, for Adam's bias correction."""
        for weights in self.flat():
            self._base.state[weights]["step"] = self._step_of(weights, step)

    @torch.no_grad()
    def put(self, parameter: Any, quantity: Quantity, whole: Tensor) -> None:
        """Copy this rank's part of `whole` (any shape of as many elements). Moments need `begin` before."""
        from deepspeed import utils

        key = None if quantity == "fp32" else quantity
        if self._stage == 0:
            target = parameter.data if key is None else self._base.state[parameter][key]
            target.copy_(whole.view_as(target))
        elif self._stage == 3:
            part = _part(whole.flatten(), self._engine.global_rank, parameter.ds_tensor.numel())
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)

    @torch.no_grad()
    def publish(self) -> None:
        """Make the weights of the forward pass from the master weights. Collective."""
        if self._stage == 3:
            self._optimizer.checkpoint_event_prologue()  # what is gathered now is of the old weights
            for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer.checkpoint_event_epilogue()
        elif self._stage:
            self._optimizer.update_lp_params()

    def restore_loss_scale(self, saved: dict[str, Any]) -> None:
        """fp16 alone has a dynamic loss scale; it continues if both sides have one."""
        if saved.get("dynamic_loss_scale") and getattr(self._optimizer, "dynamic_loss_scale", False):
            self._optimizer.loss_scaler = saved["loss_scaler"]

    def _step_of(self, weights: Tensor, step: float) -> Tensor:
        fused = self._base.param_groups[0]["fused"]
        return torch.tensor(step, dtype=torch.float32, device=weights.device if fused else "cpu")


def _part(flat: Tensor, rank: int, length: int) -> Tensor:
    """The rank-th piece of `length` elements, padded with zeros at the end."""
    piece = flat[rank * length : (rank + 1) * length]
    return nn.functional.pad(piece, (0, length - piece.numel()))
