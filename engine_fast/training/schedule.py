"""Learning rate of an update: linear warm-up, then one of four shapes."""

from __future__ import annotations

import math

from engine_fast.config import OptimConfig


def learning_rate(config: OptimConfig, update: int, max_updates: int) -> float:
    """The rate of update number `update`, 0 for the first.

    With w = warmup_updates: warmup_lr + (lr - warmup_lr) * update / w while update < w. From w on, with
    p = (update - w) / (max_updates - 1 - w), 1 at the last update:

        constant      lr
        inverse_sqrt  lr * sqrt(max(w, 1) / max(update, 1))
        linear        min_lr + (lr - min_lr) * (1 - p)
        cosine        min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2

    and never less than min_lr after the warm-up.
    """
    peak, warmup = config.lr, config.warmup_updates
    if update < warmup:
        return config.warmup_lr + (peak - config.warmup_lr) * update / warmup
    progress = min(1.0, (update - warmup) / max(1, max_updates - 1 - warmup))
    if config.schedule == "constant":
        rate = peak
    elif config.schedule == "inverse_sqrt":
        rate = peak * math.sqrt(max(warmup, 1) / max(update, 1))
    elif config.schedule == "linear":
        rate = config.min_lr + (peak - config.min_lr) * (1 - progress)
    else:
        rate = config.min_lr + (peak - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    return max(rate, config.min_lr)
