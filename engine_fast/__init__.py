"""engine_fast: train non-autoregressive translators to minimise an autoregressive teacher's energy."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine_fast.inference.load import load as load

__version__ = "0.1.0"

# On a CPU torch keeps one compiled bf16 product per shape, each with its scratch memory, up to 1024 of them. Sentences
# come in so many shapes that a run would grow by gigabytes (benchmarks/NOTES.md). Both are read at the first product.
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def __getattr__(name: str) -> Any:
    """`engine_fast.load`, imported at its first use, because it needs torch and `import engine_fast` does not."""
    if name == "load":
        from engine_fast.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
