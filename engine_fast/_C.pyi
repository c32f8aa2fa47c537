"""The compiled extension; reach it through engine_fast.extension.load()."""

from typing import Any

import numpy as np
import numpy.typing as npt

def build_info() -> dict[str, Any]: ...
def pack_batches(
    source_lengths: npt.NDArray[np.int32],
    target_lengths: npt.NDArray[np.int32],
    order: npt.NDArray[np.int64],
    max_tokens: int,
    max_sentences: int,
) -> npt.NDArray[np.int64]: ...
