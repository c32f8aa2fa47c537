"""The base of every section: frozen, typed, documented per field, unknown keys refused."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """One section of the configuration file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes and true, which pydantic would take for 1."""
        assert info.field_name is not None
        if _is_truth_for_number(value, cls.model_fields[info.field_name].annotation):
            raise ValueError("a number")
        return value


def _is_truth_for_number(value: Any, annotation: Any) -> bool:
    """Whether it is true or false, or holds one, where the annotation has numbers only."""
    if isinstance(value, list | tuple) and get_origin(annotation) in (list, tuple):
        inner = [each for each in get_args(annotation) if each is not Ellipsis]
        return all(map(_takes_only_numbers, inner)) and any(isinstance(each, bool) for each in value)
    return isinstance(value, bool) and _takes_only_numbers(annotation)


def _takes_only_numbers(annotation: Any) -> bool:
    """int, float, numbers by name, or one of them or None."""
    if get_origin(annotation) is Literal:
        return int in map(type, get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _takes_only_numbers(get_args(annotation)[0])
    choices = [choice for choice in get_args(annotation) if choice is not type(None)]
    return annotation in (int, float) or (
        get_origin(annotation) in (Union, UnionType) and all(map(_takes_only_numbers, choices))
    )
