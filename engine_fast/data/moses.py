"""The paper's cleaning of the IWSLT14 talks: Moses tokens, length limits, lower case, every 23rd line held out.

The recipe is the one of the usual preparation script for this corpus; the tokeniser is sacremoses, an optional package.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator

from engine_fast.errors import DataError

Tokenise = Callable[[str], str]

_META = ("<url>", "<talkid>", "<keywords>")
_TAGS = re.compile(r"</?(?:title|description)>")
_SEGMENT = re.compile(r"<seg id=\"[0-9]*\">\s*(.*?)\s*</seg>")
MAX_WORDS = 175
MAX_RATIO = 1.5
VALID_EVERY = 23


def moses_tokeniser(language: str) -> Tokenise:
    """A line to its Moses tokens, special characters escaped (&apos; ...). Raises DataError without sacremoses."""
    try:
        module = importlib.import_module("sacremoses")
    except ImportError as error:
        raise DataError(
            "the raw IWSLT14 archive needs the Moses tokeniser. Run `pip install sacremoses`, or name in data.root a "
            "folder with ready train, valid and test files of lower-cased Moses tokens."
        ) from error
    tokeniser = module.MosesTokenizer(lang=language)
    return lambda line: str(tokeniser.tokenize(line, return_str=True, escape=True))


def talk_lines(lines: Iterable[str]) -> Iterator[str]:
    """Sentences of a train.tags file: lines about the talk are dropped, title and description keep their text."""
    for line in lines:
        if not any(tag in line for tag in _META):
            yield _TAGS.sub("", line).strip()


def segment_lines(lines: Iterable[str]) -> Iterator[str]:
    """Sentences of a dev or test XML file, with straight apostrophes."""
    for line in lines:
        found = _SEGMENT.search(line)
        if found:
            yield found.group(1).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def acceptable(source: str, target: str) -> bool:
    """Whether both tokenised sides have 1 to 175 words and neither is more than 1.5 times as long as the other."""
    shorter, longer = sorted((len(source.split()), len(target.split())))
    return shorter >= 1 and longer <= MAX_WORDS and longer <= MAX_RATIO * shorter


def train_and_valid(
    sides: tuple[Iterable[str], Iterable[str]], tokenise: tuple[Tokenise, Tokenise]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Cleaned, lower-cased pairs: (train, valid), valid being every 23rd. Raises ValueError on unaligned sides."""
    train: list[tuple[str, str]] = []
    valid: list[tuple[str, str]] = []
    count = 0
    for source, target in zip(talk_lines(sides[0]), talk_lines(sides[1]), strict=True):
        pair = (tokenise[0](source), tokenise[1](target))
        if acceptable(*pair):
            count += 1
            (train if count % VALID_EVERY else valid).append((pair[0].lower(), pair[1].lower()))
    return train, valid


def held_out(lines: Iterable[str], tokenise: Tokenise) -> list[str]:
    """Lower-cased tokens of one side of a dev or test file; nothing is dropped."""
    return [tokenise(line).lower() for line in segment_lines(lines)]
