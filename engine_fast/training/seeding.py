"""Randomness without state: draws follow from the seed and from where the run is, so resuming needs no generator."""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: object) -> int:
    """A 63-bit seed from anything printable: equal parts, equal seed."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_torch(*parts: object) -> None:
    """Set torch's generators, on every device, from `derive`."""
    torch.manual_seed(derive(*parts))
