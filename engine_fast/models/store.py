"""Model directories: model.safetensors + config.json + the vocabularies, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from engine_fast import __version__
from engine_fast.config import AnyArchitecture, Architecture, LSTMArchitecture, TaggerArchitecture
from engine_fast.data.vocabulary import Vocabulary, load_vocabulary, save_pair
from engine_fast.errors import CheckpointError, DataError, VocabularyError
from engine_fast.models.cmlm import CMLM
from engine_fast.models.huggingface.network import HuggingFaceArchitecture, HuggingFaceTeacher
from engine_fast.models.lstm import Seq2Seq
from engine_fast.models.protocols import Network, Student, Teacher
from engine_fast.models.tagger import Tagger
from engine_fast.models.transformer import Transformer

FORMAT = 1
WEIGHTS = "model.safetensors"
KINDS: dict[str, type[Teacher] | type[Student]] = {
    "transformer": Transformer,
    "lstm": Seq2Seq,
    "huggingface": HuggingFaceTeacher,
    "cmlm": CMLM,
    "tagger": Tagger,
}
"""Networks by the name that a model directory has for them."""
_BY_ARCHITECTURE: dict[tuple[str, str], type[Teacher] | type[Student]] = {
    ("teacher", "transformer"): Transformer,
    ("teacher", "lstm"): Seq2Seq,
    ("student", "transformer"): CMLM,
    ("student", "bilstm"): Tagger,
}
_ARCHITECTURES: dict[str, type[AnyArchitecture] | type[HuggingFaceArchitecture]] = {
    "transformer": Architecture,
    "lstm": LSTMArchitecture,
    "huggingface": HuggingFaceArchitecture,
    "cmlm": Architecture,
    "tagger": TaggerArchitecture,
}

_TEXTS = (
    "weights.sha256", *(f"vocabularies.{side}.{key}" for side in ("source", "target") for key in ("file", "hash")),
)  # fmt: skip
"""What a config.json must name."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode with everything needed to turn text into text."""

    model: Teacher | Student
    source_vocabulary: Vocabulary
    target_vocabulary: Vocabulary
    card: dict[str, Any]
    """What the writer noted: training settings, scores."""


def save_model(
    directory: str | Path,
    model: Network,
    source_vocabulary: Vocabulary,
    target_vocabulary: Vocabulary,
    *,
    card: dict[str, Any] | None = None,
    readme: str | None = None,
) -> None:
    """Write a model directory. A directory that exists is replaced only once the new one is complete on disk.

    card: what config.json keeps beside the architecture. readme: text of a README.md to put in.

    Raises VocabularyError when a vocabulary's size is not the model's, CheckpointError when the disk refuses.
    """
    directory = Path(directory)
    for side, vocabulary, size in (
        ("source", source_vocabulary, model.source_size),
        ("target", target_vocabulary, model.target_size),
    ):
        if len(vocabulary) != size:
            raise VocabularyError(f"{directory}: the {side} vocabulary has {len(vocabulary)} pieces, the model {size}.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as name:
            fresh = Path(name) / directory.name
            fresh.mkdir()
            files = save_pair(fresh, source_vocabulary, target_vocabulary)
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in unique_state(model).items()}
            save_file(weights, fresh / WEIGHTS, metadata={"format": "pt"})
            config = {
                "format": FORMAT,
                "engine_fast": __version__,
                "kind": model.kind,
                "architecture": model.architecture.model_dump(mode="json"),
                "vocabularies": {
                    "source": {
                        "file": files["source"],
                        "size": model.source_size,
                        "hash": source_vocabulary.fingerprint,
                    },
                    "target": {
                        "file": files["target"],
                        "size": model.target_size,
                        "hash": target_vocabulary.fingerprint,
                    },
                },
                "weights": {"sha256": _sha256(fresh / WEIGHTS)},
                "card": (card or {}) | ({"right_to_left": True} if getattr(model, "right_to_left", False) else {}),
            }
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if readme is not None:
                (fresh / "README.md").write_text(readme, encoding="utf-8")
            for path in fresh.iterdir():
                path.chmod(0o644)  # safetensors and tempfile keep their files to the owner; models are shared
                _sync(path)
            fresh.chmod(0o755)
            if directory.exists():
                shutil.move(directory, Path(name) / "replaced")
            os.replace(fresh, directory)
            _sync(directory.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: the model could not be written ({error}). Free disk space or choose another directory."
        ) from error


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kind: str | None = None,
) -> LoadedModel:
    """Read a model directory; `kind`, one of KINDS or "teacher" or "student", refuses the others.

    Raises CheckpointError for a missing, damaged or newer directory, VocabularyError for a changed vocabulary file.
    """
    directory = Path(directory)
    config = _read_config(directory)
    if kind is not None:
        _check_kind(directory, config["kind"], kind)
    vocabularies = _read_vocabularies(directory, config)
    try:
        architecture = read_architecture(config["kind"], config["architecture"])
    except ValidationError as error:
        raise CheckpointError(f"{directory}/config.json: the architecture cannot be used ({error}).") from error
    with WithoutRandomFill():
        model = KINDS[config["kind"]](architecture, len(vocabularies[0]), len(vocabularies[1]))
    weights = directory / WEIGHTS
    try:
        if _sha256(weights) != config["weights"]["sha256"]:
            raise CheckpointError(f"{weights}: its bytes have changed since it was written. Export the model again.")
        load_unique_state(model, _TensorFile(weights), str(weights))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: missing or damaged ({error}). Export or train the model again.") from error
    model.to(device=device, dtype=dtype).eval()
    card = config.get("card", {})
    if isinstance(model, Teacher):
        model.right_to_left = bool(card.get("right_to_left"))
    return LoadedModel(model, vocabularies[0], vocabularies[1], card)


def require_kind(directory: Path, kind: str) -> None:
    """Raises CheckpointError unless the directory holds a model of `kind`, as load_model has it."""
    _check_kind(directory, _read_config(directory)["kind"], kind)


def _check_kind(directory: Path, found: str, kind: str) -> None:
    if kind not in (found, _role(found)):
        raise CheckpointError(f"{directory}: holds a {found} model, expected a {kind} model. Give the other directory.")


def load_vocabularies(directory: Path) -> tuple[Vocabulary, Vocabulary]:
    """Of source and target, one object where they are one; the weights are not read. Raises as load_model."""
    return _read_vocabularies(directory, _read_config(directory))


def stage_model(path: Path) -> Path:
    """The model directory in a stage's directory, or `path` itself."""
    return path / "model" if (path / "model" / "config.json").is_file() else path


def fingerprint(directory: Path) -> str:
    """sha256 over all that decides what a model computes: weights, kind, architecture, reading direction.

    Two imports of one multilingual network have equal weights, and differ in the languages their architecture names.
    Raises CheckpointError.
    """
    config = _read_config(directory)
    try:
        weights = _sha256(directory / WEIGHTS)
    except OSError as error:
        raise CheckpointError(
            f"{directory / WEIGHTS}: cannot be read ({error.strerror}). Give a directory that holds a model."
        ) from error
    meaning = [config["kind"], config["architecture"], config.get("card", {}).get("right_to_left", False)]
    return hashlib.sha256((weights + json.dumps(meaning, sort_keys=True)).encode()).hexdigest()


def new_network(
    role: Literal["teacher", "student"], architecture: AnyArchitecture, source_size: int, target_size: int
) -> Teacher | Student:
    """A network of random weights, as its section of the configuration describes it."""
    return _BY_ARCHITECTURE[role, architecture.kind](architecture, source_size, target_size)


def read_architecture(kind: str, tree: Any) -> Any:
    """The architecture of a model of that kind. Raises pydantic's ValidationError."""
    return _ARCHITECTURES[kind].model_validate(tree)


def _role(kind: str) -> str:
    return "teacher" if issubclass(KINDS[kind], Teacher) else "student"


def unique_state(model: Network) -> dict[str, torch.Tensor]:
    """The state dict with a tied tensor under its first name only."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


class _TensorFile(Mapping[str, torch.Tensor]):
    """A safetensors file, mapped anew for each tensor: what was read stays resident for as long as it is mapped, and
    the weights would be in memory twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class WithoutRandomFill(TorchFunctionMode):
    """Networks made in here get no random weights, for a file's will be copied over them: memory that nobody writes to
    is not resident yet, and drawing numbers takes longer than reading a file."""

    _SKIPPED = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_unique_state(model: Network, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Copy a unique_state into the model. Raises CheckpointError that names the first tensor that does not fit."""
    expected = unique_state(model)
    for name in sorted(expected.keys() ^ set(state)):
        where = "is missing" if name in expected else "is not part of this architecture"
        raise CheckpointError(f"{origin}: tensor {name} {where}. The file belongs to another architecture or version.")
    with torch.no_grad():
        for name, tensor in sorted(expected.items()):
            given = state[name]
            if given.shape != tensor.shape:
                raise CheckpointError(
                    f"{origin}: tensor {name} has shape {tuple(given.shape)}, expected {tuple(tensor.shape)}."
                )
            tensor.copy_(given)


def copy_matching(model: Network, donor: Network) -> tuple[int, int]:
    """Start `model` from the tensors of `donor` whose names and shapes agree; returns (copied, all) tensor counts."""
    own, other = unique_state(model), unique_state(donor)
    shared = [name for name in own if name in other and own[name].shape == other[name].shape]
    with torch.no_grad():
        for name in shared:
            own[name].copy_(other[name])
    return len(shared), len(own)


def is_model_directory(directory: Path) -> bool:
    """Whether one of ours stands there, readable or of another version: what may be replaced by a new one."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"format", "kind", "vocabularies"} <= config.keys()


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        inside = directory / "model"
        hint = f"Give {inside}." if inside.is_dir() else "Give the one that train or import wrote."
        raise CheckpointError(f"{directory}: no config.json here, so not a model directory. {hint}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). The directory is damaged: export the model again."
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("kind") not in list(KINDS):
        if isinstance(config, dict) and "model_type" in config:
            raise CheckpointError(
                f"{directory}: a model of Hugging Face, expected one of ours. Import it: "
                f"engine-fast import {directory} --to DIR."
            )
        got = config.get("format") if isinstance(config, dict) else config
        raise CheckpointError(
            f"{path}: format {got!r}, expected {FORMAT} with kind {' or '.join(KINDS)}. "
            "Use the version that wrote it, or export again."
        )
    wrong = [key for key in _TEXTS if not isinstance(_at(config, key), str)]
    wrong += ["architecture"] * (not isinstance(config.get("architecture"), dict))
    wrong += ["card"] * (not isinstance(config.get("card", {}), dict))
    if wrong:
        raise CheckpointError(
            f"{path}: {', '.join(wrong)} missing or damaged. Put the original back, or export the model again."
        )
    return config


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _read_vocabularies(directory: Path, config: dict[str, Any]) -> tuple[Vocabulary, Vocabulary]:
    source, target = (_read_vocabulary(directory, side, config["vocabularies"][side]) for side in ("source", "target"))
    return source, source if source.fingerprint == target.fingerprint else target


def _read_vocabulary(directory: Path, side: str, entry: dict[str, Any]) -> Vocabulary:
    path = directory / entry["file"]
    try:
        vocabulary = load_vocabulary(path)
    except DataError as error:
        raise CheckpointError(f"{directory}: the {side} vocabulary cannot be read: {error}") from error
    if vocabulary.fingerprint != entry["hash"]:
        raise VocabularyError(
            f"{path}: hash {vocabulary.fingerprint[:12]}, but the model was trained with {entry['hash'][:12]}. "
            "The vocabulary file was changed: put the original back."
        )
    return vocabulary


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
