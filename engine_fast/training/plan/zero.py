"""Who holds what under each ZeRO stage, as DeepSpeed 0.19.8 allocates it (read in its source, checked by bench_plan).

P parameters, R ranks, w bytes of a weight (fp32 4, else 2). Bytes on each rank:

stage                       weights    gradients kept        master     moments
0                           4 P        4 P                   -          8 P          Adam on the weights themselves
1, fp32 or fp16             w P        w P                   4 P / R    8 P / R      a flat float32 copy, also for fp32
1, bf16                     2 P        2 P + 4 P             4 P / R    8 P / R      BF16_Optimizer sums in float32
2                           w P        w P / R               4 P / R    8 P / R
3                           w P / R    w P / R, always there 4 P / R    8 P / R      weights of w P gathered in use

Besides: the reduction bucket (w * reduce_bucket_size, twice with overlap; in stages 1 and 2 while gradients exist, in
stage 3 for good), a copy of what is being reduced, and at the step the owned gradients once more, flat and in float32.
With ranks = 1 nothing is gathered or copied. Stage 3 and an exponential average also keep a whole model to validate.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from engine_fast.config import TrainConfig
from engine_fast.distributed.settings import deepspeed_config
from engine_fast.training.plan.sizes import Sizes
from engine_fast.training.plan.tape import BYTES

DEFAULTS = {
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}
"""DeepSpeed's, in values."""
_ALLREDUCE_VALUES = 500_000_000
"""Stage 0: deepspeed.runtime.engine.MEMORY_OPT_ALLREDUCE_SIZE."""
_NORM_BYTES = 8
"""A gradient's norm is taken in float64, tensor by tensor."""

Bytes = Counter[str]
"""Term -> bytes; the terms are TERMS of memory.py."""


@dataclass(frozen=True)
class Zero:
    """One rank's share of the state of `sizes` under `config`."""

    sizes: Sizes
    config: TrainConfig
    ranks: int
    extra: dict[str, Any]
    """The configuration's `deepspeed` section."""
    device: str

    @property
    def stage(self) -> int:
        return self.config.effective_zero_stage

    @property
    def weight_bytes(self) -> int:
        return BYTES[self.config.precision]

    @property
    def shard(self) -> int:
        """Parameters that this rank owns."""
        return -(-self.sizes.total // self.ranks)

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient that is kept: stage 1 in bf16 sums in float32."""
        types = deepspeed_config(self.config, self.extra, device=self.device).get("data_types", {})
        return 4 if types.get("grad_accum_dtype") == "fp32" else self.weight_bytes

    @property
    def sums_in_float32(self) -> bool:
        """DeepSpeed's BF16_Optimizer, which knows no offload."""
        wide = self.gradient_bytes > self.weight_bytes
        return wide and self.config.precision == "bf16" and self.stage == 1 and not self.config.offload.optimizer

    @property
    def bucket(self) -> int:
        """Bytes of the buffers that gradients are reduced in."""
        if not self.stage or self.sums_in_float32:
            return 0
        double = bool(self._zero("overlap_comm", False)) and self.stage < 3
        return (self.gradient_bytes if self.stage == 1 else self.weight_bytes) * self._reduce_bucket * (1 + double)

    @property
    def validates_a_copy(self) -> bool:
        """The live weights are sharded, or not the ones to be judged."""
        return self.stage == 3 or self.config.ema_decay > 0

    def held(self) -> tuple[Bytes, Bytes]:
        """(device, host): what is there from one update to the next."""
        p, w, own = self.sizes.total, self.weight_bytes, self.shard
        device, host = Counter[str](), Counter[str]()
        on_device, offload = device, self.config.offload
        state = host if offload.optimizer else on_device
        device["weights"] += 4 * self.sizes.buffers
        if self.stage == 0:
            device.update(weights=w * p, optimizer=8 * p)
        else:
            state.update(optimizer=12 * own)
            shards = host if offload.parameters else device
            shards.update(weights=w * (own if self.stage == 3 else p))
        if self.sums_in_float32:
            device.update(gradients=4 * p)
        if self.stage == 3:
            state.update(gradients=self.gradient_bytes * own)
            device.update(workspace=self.bucket)
        if offload.optimizer:
            host.update(gradients=4 * own)
            if self.stage < 3:
                host.update(workspace=w * (own + self.sizes.largest), gradients=w * own * (self.stage == 2))
                device.update(workspace=w * self.sizes.largest)
        if self.config.ema_decay:
            state.update(copies=4 * (own if self.stage else p))
        if self.validates_a_copy:
            # The copy that is validated: float32 in the host's memory until then, afterwards in the weights' precision.
            if self.device == "cpu":
                device.update(copies=4 * p)
            else:
                device.update(copies=w * p)
        return device, host

    def gathered(self) -> int:
        """Bytes of whole weights while they are in use: stage 3 keeps them from forward to backward up to a limit."""
        if self.stage < 3 or self.ranks == 1:
            return 0
        live: int = self._zero("stage3_max_live_parameters")
        return self.weight_bytes * min(self.sizes.total, live)

    def gathering(self) -> int:
        """Bytes of the copies that gloo makes of the weights that come together first, ahead of their use."""
        prefetched: int = self._zero("stage3_prefetch_bucket_size")
        scattered = self.gathered() - self.persistent()
        return min(scattered, self.weight_bytes * prefetched) * (self._copies - 1)

    def persistent(self) -> int:
        """Bytes of the small tensors that stage 3 keeps whole from one step to the next."""
        if self.stage < 3 or self.ranks == 1:
            return 0
        threshold: int = self._zero("stage3_param_persistence_threshold")
        return self.weight_bytes * sum(size for size in self.sizes.tensors if size <= threshold)

    def gradients(self, done: int, *, accumulated: bool) -> Bytes:
        """On the device in the backward pass when the gradients of `done` parameters are complete.

        accumulated: an earlier micro-batch of the update has left gradients.
        """
        p, w = self.sizes.total, self.weight_bytes
        if self.stage == 0 or self.sums_in_float32:
            return Counter(gradients=w * (p if accumulated else done), workspace=w * self.sizes.largest * accumulated)
        if self.stage == 1:
            kept = self.gradient_bytes * (p if accumulated else done)
            return Counter(gradients=kept, workspace=self.bucket if kept else 0)
        result = Counter[str]()
        flushed = done >= min(p, self._reduce_bucket)
        if flushed:
            result.update(workspace=self._reducing())
        if self.stage == 2:
            result.update(workspace=self.bucket if done else 0)
            if not self.config.offload.optimizer:
                result.update(gradients=w * self.shard * (flushed + accumulated))
        return result

    def stepping(self) -> Bytes:
        """On the device at the largest moment of reduction and step, besides what is held."""
        p, w, g, own = self.sizes.total, self.weight_bytes, self.gradient_bytes, self.shard
        half = 4 * own if g < 4 else 0
        norm = _NORM_BYTES * min(self.sizes.largest, own)
        offload = self.config.offload.optimizer
        # The owned weights go to all at the end, when the gradients have gone.
        spread = w * p * (self._copies - 1) * (self.ranks > 1)
        if self.stage == 0:
            return Counter(gradients=4 * p, workspace=4 * min(p, _ALLREDUCE_VALUES) * (self.ranks > 1))
        if self.sums_in_float32:
            return Counter(gradients=w * p, workspace=max(norm, w * p * (self.ranks > 1)))
        if self.stage == 1:
            # What went through the bucket has left its own memory; the owned part is copied out of it, then made flat.
            through = min(p, self._reduce_bucket)
            most = self.bucket + max(0, (0 if offload else g * own) + self._reducing() - g * through)
            if not offload:
                most = max(most, g * (2 * own - p) + max(norm, half))
            return Counter(gradients=g * p, workspace=max(most, spread - g * p))
        if self.stage == 2:
            kept = 0 if offload else w * own
            return Counter(gradients=kept, workspace=max(0 if offload else max(w * own + half, norm), spread - kept))
        if offload:
            return Counter[str]()
        return Counter(workspace=max(g * own + half, norm, self.persistent() * self._copies))

    @property
    def _reduce_bucket(self) -> int:
        return int(self._zero("reduce_bucket_size"))

    def _reducing(self) -> int:
        """Copies of what is in the bucket, in the order of its owners."""
        through = self.weight_bytes * min(self.sizes.total, self._reduce_bucket)
        if self.stage == 3:
            return through * self._copies
        return through if self.ranks > 1 else 0

    @property
    def _copies(self) -> int:
        """Of what is scattered or gathered: gloo makes one more."""
        return 2 if self.device == "cpu" else 1

    def _zero(self, key: str, default: Any = None) -> Any:
        settings = deepspeed_config(self.config, self.extra, device=self.device)["zero_optimization"]
        return settings.get(key, DEFAULTS.get(key, default))
