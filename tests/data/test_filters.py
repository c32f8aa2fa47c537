"""Filters and the search for repeated pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_fast.config import FilterConfig
from engine_fast.data import filters
from engine_fast.data.filters import PairHashes, length_rule, text_rule


def test_text_rules() -> None:
    config = FilterConfig()
    assert text_rule(config, "", "a") == text_rule(config, "a", "") == text_rule(config, "", "") == "empty"
    assert text_rule(config, "a", "a") == "identical"
    assert text_rule(config, "a", "b") is None
    assert text_rule(FilterConfig(drop_identical=False), "a", "a") is None


@pytest.mark.parametrize(
    ("lengths", "rule"),
    [
        ((50, 50), None),
        ((51, 3), "too_long"),
        ((3, 51), "too_long"),
        ((1, 9), None),
        ((3, 10), "ratio"),
        ((10, 3), "ratio"),
        ((10, 4), None),
        ((30, 10), None),
        ((31, 10), "ratio"),
    ],
)
def test_length_rules_at_their_borders(lengths: tuple[int, int], rule: str | None) -> None:
    assert length_rule(FilterConfig(max_tokens=50, max_ratio=3.0), *lengths) == rule


@given(pairs=st.lists(st.tuples(st.sampled_from("ab \n"), st.sampled_from("abc")), max_size=60))
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_repeated_pairs_in_any_number_of_parts(
    tmp_path_factory: pytest.TempPathFactory, at_once: int, pairs: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("hashes") / "hashes"
    with pytest.MonkeyPatch.context() as patch, PairHashes(path) as hashes:
        patch.setattr(filters, "_HASHES_AT_ONCE", at_once)
        for pair in pairs:
            hashes.add(*pair)
        assert hashes.repeated().tolist() == [pair in pairs[:index] for index, pair in enumerate(pairs)]
    assert not path.exists()


def test_the_border_between_the_sides_counts(tmp_path: Path) -> None:
    with PairHashes(tmp_path / "hashes") as hashes:
        for pair in (("a b", "c"), ("a", "b c"), ("a b", "c")):
            hashes.add(*pair)
        assert hashes.repeated().tolist() == [False, False, True]
