"""DeepSpeed's configuration, generated from ours; the `deepspeed:` section adds to it, and every key is checked.

DeepSpeed ignores an unknown top-level key silently, so its names (0.19.8) are written down here.
"""

from __future__ import annotations

import difflib
from typing import Any

from engine_fast.config import TrainConfig
from engine_fast.errors import ConfigError

KNOWN_KEYS = frozenset(
    {
        "activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger", "communication_data_type",
        "compile", "compression_training", "csv_monitor", "data_efficiency", "data_types", "datastates_ckpt",
        "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "fp16",
        "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine", "log_level", "memory_breakdown",
        "prescale_gradients", "seq_parallel_communication_data_type", "sequence_parallel_size", "tensor_parallel",
        "tensorboard", "timers", "torch_autocast", "use_data_before_expert_parallelism", "wall_clock_breakdown",
        "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)  # fmt: skip
REDUCE_BUCKET = 50_000_000
"""Elements of gradients that are reduced at once."""
OURS = {
    "train_batch_size": "batch.max_tokens",
    "train_micro_batch_size_per_gpu": "batch.max_tokens",
    "gradient_accumulation_steps": "batch.accumulate",
    "managed_gradient_accumulation": "batch.accumulate",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "steps_per_print": "log_every",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload.optimizer",
    "zero_optimization.offload_param": "offload.parameters",
    "zero_optimization.overlap_comm": "overlap_communication",
    "zero_optimization.memory_efficient_linear": "nothing: true would change the frozen teacher",
    "zero_optimization.compute_grad_norm": "nothing: the norm tells whether an update may be applied",
    "bf16.enabled": "precision",
    "bf16.check_grad_overflow": "nothing: an update that is not finite is never applied",
    "fp16.enabled": "precision",
}


def check_extra(extra: dict[str, Any]) -> None:
    """Raise ConfigError for a key that DeepSpeed would ignore (with the nearest) or that our own schema sets."""
    for key, value in extra.items():
        names = [key, *(f"{key}.{inner}" for inner in value)] if isinstance(value, dict) else [key]
        for name in names:
            if name in OURS:
                raise ConfigError(f"deepspeed.{name} is not set here. Set, in the stage's own section, {OURS[name]}.")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS | OURS.keys(), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"deepspeed.{key} is not a key of DeepSpeed's configuration, which would ignore it.{hint}"
            )


def deepspeed_config(config: TrainConfig, extra: dict[str, Any], *, device: str = "cpu") -> dict[str, Any]:
    """What deepspeed.initialize is given on `device` ("cpu" or "cuda").

    The caller owns accumulation and normalisation: a backward adds gradients, one step() reduces and applies them.
    """
    check_extra(extra)
    stage = config.effective_zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # batches are counted in tokens; DeepSpeed only wants a number
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        # At stage 0 DeepSpeed reports no norm and applies NaN: there the engine clips for itself.
        "gradient_clipping": config.optim.clip_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config, device),
        "checkpoint": {"tag_validation": "Ignore"},
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }
    if config.precision == "bf16" and stage == 1:
        # Another optimizer of DeepSpeed's: gradients are summed in float32, and on a CPU a step takes 13% less time.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(settings, extra)


def _zero(config: TrainConfig, device: str) -> dict[str, Any]:
    overlap = device == "cuda" if config.overlap_communication is None else config.overlap_communication
    zero: dict[str, Any] = {
        # DeepSpeed's own 5e8 takes 1 or 2 GB of every device, however small the model.
        "reduce_bucket_size": REDUCE_BUCKET,
        "stage": config.effective_zero_stage, "memory_efficient_linear": False, "overlap_comm": overlap,
    }  # fmt: skip
    host = {"device": "cpu", "pin_memory": device == "cuda"}
    if config.offload.optimizer:
        zero["offload_optimizer"] = host
    if config.offload.parameters:
        zero["offload_param"] = host
    return zero


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
