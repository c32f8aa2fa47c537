"""YAML and `--set section.key=value` to a RunConfig; every mistake is one line that names the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from engine_fast.config.base import Section
from engine_fast.config.run import RunConfig
from engine_fast.errors import ConfigError

_KIND = "transformer"
"""Of an architecture that does not say."""
_KIND_KEY = ".architecture.kind"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue  # `<<: *anchor` brings keys that may be overridden; a list as a key is refused below
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what _Loader would read as a number."""


# YAML 1.1 reads 1e-5, without a point, as a string.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_config(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, base: str | Path | None = None
) -> RunConfig:
    """Read a YAML file and apply `a.b=c` overrides (c is parsed as YAML).

    `base: other.yaml` in a file, relative to it, puts the file's keys over those of another one; the argument `base`
    takes its place. Sections are merged key by key; one of another `kind` replaces an architecture.

    Raises ConfigError: file missing, not YAML, unknown key (with the nearest), wrong value (with what was expected),
    files that are each other's base.
    """
    tree = _read(Path(path), below=None if base is None else Path(base))
    put_all(tree, [(*_parsed_override(override), f"--set {override!r}") for override in overrides])
    return parse_config(tree, str(path))


def find_config(path: Path) -> Path:
    """`path`, or where it is missing the shipped file of that name: configs/demo.yaml is found without a clone."""
    package = Path(__file__).resolve().parents[1]  # a wheel has configs/ inside, a clone beside it
    places = (path, *(root / "configs" / _below_configs(path) for root in (package, package.parent)))
    return next((place for place in places if place.is_file()), path)


def _below_configs(path: Path) -> Path:
    return Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path


def _read(path: Path, above: tuple[Path, ...] = (), *, below: Path | None = None) -> dict[str, Any]:
    """The file's tree over that of `below`, by default its own base. `above`: the files that led here."""
    if path.resolve() in (file.resolve() for file in above):
        chain = " -> ".join(str(file) for file in (*above, path))
        raise ConfigError(f"base: {chain} comes back to a file that it went through. Take one `base:` out.")
    tree = _parsed(path, above[-1] if above else None)
    base = tree.pop("base", None)
    if below is None and base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base = {base!r}, expected the path of one YAML file, relative to this one.")
        below = path.parent / base
    return tree if below is None else _merged(_read(below, (*above, path)), tree)


def _parsed(path: Path, above: Path | None) -> dict[str, Any]:
    origin = "" if above is None else f"{above}: its base "
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{origin}{path}: cannot be read ({error}). Give the path of a YAML file, see configs/."
        ) from error
    try:
        tree = yaml.load(text, Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}{path}: not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{origin}{path}: holds a {type(tree).__name__}, expected sections such as data:, teacher:, engine:."
        )
    return tree


def _merged(below: Any, above: Any, key: str = "") -> Any:
    """Mappings key by key, the values of `above` where both have one."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if key == "architecture" and _is_another(above.get("kind"), below):
        return above
    both = {name: _merged(below[name], value, name) if name in below else value for name, value in above.items()}
    return below | both


def _is_another(kind: Any, architecture: dict[str, Any]) -> bool:
    """Whether `kind` is given and is that of another network, which has other keys."""
    return kind is not None and kind != architecture.get("kind", _KIND)


def parse_config(tree: dict[str, Any], origin: str = "config") -> RunConfig:
    """Validate a plain tree. `origin` begins the error message."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(origin, item) for item in error.errors())) from error


def dump_config(config: BaseModel) -> str:
    """The effective configuration as YAML; load_config reads it back to an equal object."""
    return yaml.dump(config_tree(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def config_tree(config: BaseModel) -> dict[str, Any]:
    """The effective configuration as JSON has it; parse_config reads it back to an equal object."""
    tree = config.model_dump(mode="json", exclude_none=True)
    # engine.architecture is the CMLM's, whatever that is: a default written down would count as asked for.
    if isinstance(config, RunConfig) and "architecture" not in config.engine.model_fields_set:
        del tree["engine"]["architecture"]
    elif isinstance(config, RunConfig):
        tree["engine"]["architecture"] = config.engine.architecture.model_dump(mode="json", exclude_unset=True)
    return tree


def put_all(tree: dict[str, Any], settings: Sequence[tuple[str, Any, str]]) -> None:
    """Set each (section.key, value, origin) in a plain tree; an architecture's kind first, whatever the order.

    As between two files, another `kind` of architecture takes the keys of the old one out.
    Raises ConfigError, which begins with the origin, where that is no key.
    """
    for key, value, origin in sorted(settings, key=lambda setting: not setting[0].endswith(_KIND_KEY)):
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{origin}: {parent} holds {child!r}, not a section.")
            node = child
        if key.endswith(_KIND_KEY) and _is_another(value, node):
            node.clear()
        node[leaf] = value


def _parsed_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r}, expected section.key=value, for example --set engine.optim.lr=1e-5.")
    try:
        return key, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML.") from error


def _explain(origin: str, item: Any) -> str:
    location, section = _located(item["loc"])
    key = ".".join(location) or "the file"
    if item["type"] == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known here: {', '.join(known)}."
        return f"{origin}: {key} is not a known key.{hint}"
    if item["type"] == "missing":
        return f"{origin}: {key} is missing, and has no default."
    if item["type"] == "union_tag_invalid":
        tag, expected = item["ctx"]["tag"], item["ctx"]["expected_tags"].replace("'", "")
        return f"{origin}: {key}.kind = {tag!r}, expected: one of {expected}."
    if item["type"] == "union_tag_not_found":
        return f"{origin}: {key} = {item['input']!r}, expected: a section, for example {key}: {{kind: transformer}}."
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], dict):
        return f"{origin}: {key}: {message}."
    return f"{origin}: {key} = {item['input']!r}, expected: {message}."


def _located(parts: Sequence[str | int]) -> tuple[list[str], type[BaseModel]]:
    """The key as a user wrote it, and the section that its last part stands in.

    pydantic names the kind of an architecture in the path, which no user writes.
    """
    location: list[str] = []
    section: type[BaseModel] = RunConfig
    candidates: list[type[BaseModel]] = []
    for part in map(str, parts):
        chosen = [c for c in candidates if "kind" in c.model_fields and c.model_fields["kind"].default == part]
        if chosen:
            section, candidates = chosen[0], []
            continue
        if candidates:
            section, candidates = candidates[0], []
        location.append(part)
        field = section.model_fields.get(part)
        candidates = [] if field is None else _sections_in(field.annotation)
    return location, section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]
