"""Every error that engine_fast raises on purpose: one root, a few leaves.

A message names the thing, what came, what was wanted and the next step.
"""

from __future__ import annotations


class EngineFastError(Exception):
    """Root of every error meant for a user; the command line prints its text and exits with 2."""


class ConfigError(EngineFastError):
    """A value in a configuration file or flag cannot be used."""


class DataError(EngineFastError):
    """A corpus, a shard or a piece of text cannot be used."""


class VocabularyError(EngineFastError):
    """Two parts of a run do not share one vocabulary, or a vocabulary cannot be read."""


class CheckpointError(EngineFastError):
    """A checkpoint or a model directory is missing, incomplete, corrupt or of another version."""


class DivergenceError(EngineFastError):
    """Training produced a value that is not finite."""


class SweepError(EngineFastError):
    """Trials of a sweep are missing, so that nothing can be said of the whole."""


class DistributedError(EngineFastError):
    """The processes of a run do not fit together, or have lost one another."""


class PeerError(DistributedError):
    """Another process of the run failed or is gone, and this one stops with it; the cause is the other's."""


class BuildError(EngineFastError):
    """The compiled extension is missing, broken or not usable on this machine."""


def require(ok: bool, key: str, got: object, wanted: str, hint: str = "") -> None:
    """Raise ConfigError("key = got, expected wanted. hint") unless ok."""
    if not ok:
        raise ConfigError(f"{key} = {got!r}, expected {wanted}." + (f" {hint}" if hint else ""))
