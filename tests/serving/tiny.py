"""The three systems of a service, tiny and random."""

from __future__ import annotations

from engine_fast.decoding import DecodeSettings, Translator
from engine_fast.inference.serving.systems import System
from tests.decoding.tiny import load_tiny, make_student, make_teacher


def make_systems() -> dict[str, System]:
    """ENGINE first, as a service has them that was given all three."""
    teacher = make_teacher()
    return {
        "engine": System("engine", Translator(load_tiny(make_student()), DecodeSettings(length_beam=3)), teacher),
        "teacher": System("teacher", Translator(load_tiny(teacher), DecodeSettings(beam=2)), teacher),
        "cmlm": System("cmlm", Translator(load_tiny(make_student(seed=1)), DecodeSettings(length_beam=5)), teacher),
    }
