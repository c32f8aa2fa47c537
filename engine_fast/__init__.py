"""engine_fast: train non-autoregressive translators to minimise an autoregressive teacher's energy."""

__version__ = "0.1.0"
