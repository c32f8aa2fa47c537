"""The generated DeepSpeed configuration, and what may be added to it."""

import pytest

from engine_fast.config import TrainConfig
from engine_fast.distributed.settings import KNOWN_KEYS, OURS, check_extra, deepspeed_config
from engine_fast.errors import ConfigError


def test_fp32_is_stage_0_and_half_precision_stage_1():
    assert deepspeed_config(TrainConfig(), {})["zero_optimization"]["stage"] == 0
    half = deepspeed_config(TrainConfig(precision="bf16"), {})
    assert half["zero_optimization"]["stage"] == 1
    assert half["bf16"] == {"enabled": True}
    assert half["fp16"] == {"enabled": False}


def test_the_frozen_teacher_and_our_own_division_are_always_safe():
    for stage in range(4):
        settings = deepspeed_config(TrainConfig(zero_stage=stage), {})
        assert settings["zero_optimization"]["memory_efficient_linear"] is False
        assert settings["managed_gradient_accumulation"] is False


def test_extra_keys_are_merged_below_the_top():
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    settings = deepspeed_config(TrainConfig(zero_stage=2), extra)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"zero_optimisation": {}}, "deepspeed.zero_optimisation is not a key .* Did you mean 'zero_optimization'"),
        ({"xyzzy": 1}, r"deepspeed.xyzzy is not a key of DeepSpeed's configuration, which would ignore it\.$"),
        ({"train_batch_size": 4}, "batch.max_tokens"),
        ({"zero_optimization": {"stage": 3}}, r"deepspeed.zero_optimization.stage is not set here.* zero_stage"),
        ({"zero_optimization": {"memory_efficient_linear": True}}, "frozen teacher"),
        ({"fp16": {"enabled": True}}, "precision"),
    ],
)
def test_unknown_and_taken_keys_are_refused(extra, message):
    with pytest.raises(ConfigError, match=message):
        check_extra(extra)


def test_no_key_is_both_ours_and_the_users():
    assert not KNOWN_KEYS & OURS.keys()
