"""Translation over HTTP, and a page that shows how it comes about. Needs the extra: pip install engine-fast[serve]."""

from __future__ import annotations

from engine_fast.errors import ConfigError

_EXTRA = ("fastapi", "starlette", "uvicorn", "prometheus_client")

try:
    from engine_fast.inference.serving.app import create_app
    from engine_fast.inference.serving.limits import Limits
    from engine_fast.inference.serving.run import run
    from engine_fast.inference.serving.systems import load_systems
except ModuleNotFoundError as error:
    if error.name not in _EXTRA:
        raise
    raise ConfigError(
        f"serve needs {error.name}, which is not installed. Run: pip install engine-fast[serve]"
    ) from error

__all__ = ["Limits", "create_app", "load_systems", "run"]
