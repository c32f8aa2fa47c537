"""A directory that another program runs: a model, its vocabularies, export.json and README.md, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine_fast import __version__
from engine_fast.data.atomic import new_directory, sync_directory, write_file
from engine_fast.data.vocabulary import save_pair
from engine_fast.models import LoadedModel

MARKER = "export.json"
"""Tells an older export, which a new one replaces, from somebody's work."""


@contextmanager
def export_directory(to: Path, loaded: LoadedModel, *, form: str, readme: str, **facts: Any) -> Iterator[Path]:
    """Yield a hidden directory that stands at `to` once the block has filled it without an exception.

    Beside what the block writes it gets the vocabularies, README.md, and export.json: `form` and `facts`, the model's
    kind, limit and card, the vocabularies' files and hashes.
    Raises DataError: `to` holds something that no export wrote, or the disk refuses.
    """
    with new_directory(to, marker=MARKER) as fresh:
        yield fresh
        files = save_pair(fresh, loaded.source_vocabulary, loaded.target_vocabulary)
        vocabularies = {"source": loaded.source_vocabulary, "target": loaded.target_vocabulary}
        description = {
            "format": form,
            "engine_fast": __version__,
            "kind": loaded.model.kind,
            "max_positions": loaded.model.max_positions,
            **facts,
            "vocabularies": {
                side: {"file": files[side], "size": len(vocabulary), "hash": vocabulary.fingerprint}
                for side, vocabulary in vocabularies.items()
            },
            "card": loaded.card,
        }
        write_file(fresh / MARKER, (json.dumps(description, indent=2) + "\n").encode())
        write_file(fresh / "README.md", readme.encode())
        for path in fresh.rglob("*"):
            sync_directory(path)  # which flushes a file as well: CTranslate2 and torch do not flush theirs
