"""Corpora by name: where their files are, and how the paper prepares them.

Ready files are looked for first, as {train,valid,test}.LANGUAGE with nothing, .gz or .xz behind: in data.root, else in
the corpus's folder under $ENGINE_FAST_DATA. Then its archives, in data.root or downloaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from engine_fast.config import DataConfig, TextPair
from engine_fast.data import moses
from engine_fast.data.atomic import new_directory, sha256_of, write_file
from engine_fast.data.download import Archive, cache_directory, fetch, member_text
from engine_fast.data.text import expand_path, write_lines
from engine_fast.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
Texts = dict[str, tuple[Iterable[str], Iterable[str]]]
"""Split -> (source lines, target lines)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One named corpus."""

    folder: str
    """Under $ENGINE_FAST_DATA."""
    languages: tuple[str, str]
    pretokenised: bool
    archives: tuple[Archive, ...] = ()
    extract: Callable[[dict[str, Path]], Texts] | None = None
    """Archive name -> path, to the texts in the order of `languages`."""


def _extract_iwslt14(paths: dict[str, Path]) -> Texts:
    path = paths["de-en.tgz"]
    tokenise = (moses.moses_tokeniser("de"), moses.moses_tokeniser("en"))
    sides = (member_text(path, "train.tags.de-en.de"), member_text(path, "train.tags.de-en.en"))
    try:
        train, valid = moses.train_and_valid(sides, tokenise)
    except ValueError as error:
        raise DataError(f"{path}: its training files have different numbers of sentences. Get it again.") from error
    names = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
    test = [
        [line for name in names for line in moses.held_out(member_text(path, f"IWSLT14.{name}.de-en.{side}.xml"), one)]
        for side, one in zip(("de", "en"), tokenise, strict=True)
    ]
    columns = {split: tuple(zip(*pairs, strict=True)) for split, pairs in (("train", train), ("valid", valid))}
    return {**{split: (pair[0], pair[1]) for split, pair in columns.items()}, "test": (test[0], test[1])}


def _extract_wmt16(paths: dict[str, Path]) -> Texts:
    # The archive holds 40,000 joint byte-pair merges already applied; undone, the text is Moses tokens again.
    def words(name: str) -> Iterable[str]:
        return (f"{line} ".replace("@@ ", "").strip() for line in member_text(paths["wmt16.tar.gz"], name))

    files = {"train": "corpus.bpe", "valid": "dev.bpe", "test": "test.bpe"}
    return {split: (words(f"{stem}.ro"), words(f"{stem}.en")) for split, stem in files.items()}


def _extract_multi30k(paths: dict[str, Path]) -> Texts:
    files = {"train": ("training", "train"), "valid": ("validation", "val"), "test": ("mmt16_task1_test", "test")}
    return {
        split: (member_text(paths[f"{name}.tar.gz"], f"{stem}.de"), member_text(paths[f"{name}.tar.gz"], f"{stem}.en"))
        for split, (name, stem) in files.items()
    }


_MULTI30K = "https://raw.githubusercontent.com/neychev/small_DL_repo/master/datasets/Multi30k/"
CATALOG: dict[str, Entry] = {
    "iwslt14_de_en": Entry(
        "iwslt14_deen",
        ("de", "en"),
        True,
        (Archive("de-en.tgz", "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz", None),),
        _extract_iwslt14,
    ),
    "wmt16_ro_en": Entry(
        "wmt16_ro_en_lee2018",
        ("ro", "en"),
        True,
        (
            Archive(
                "wmt16.tar.gz",
                None,
                None,
                "https://drive.google.com/file/d/1YrAwCEuktG-iDVxtEW-FE72uFTLc5QMl (data of Lee et al. 2018, named by "
                "github.com/nyu-dl/dl4mt-nonauto)",
            ),
        ),
        _extract_wmt16,
    ),
    "multi30k_de_en": Entry(
        "multi30k_deen",
        ("de", "en"),
        False,
        (
            Archive(
                "training.tar.gz",
                _MULTI30K + "training.tar.gz",
                "20140d013d05dd9a72dfde46478663ba05737ce983f478f960c1123c6671be5e",
            ),
            Archive(
                "validation.tar.gz",
                _MULTI30K + "validation.tar.gz",
                "a7aa20e9ebd5ba5adce7909498b94410996040857154dab029851af3a866da8c",
            ),
            Archive(
                "mmt16_task1_test.tar.gz",
                _MULTI30K + "mmt16_task1_test.tar.gz",
                "6d1ca1dba99e2c5dd54cae1226ff11c2551e6ce63527ebb072a1f70f72a5cd36",
            ),
        ),
        _extract_multi30k,
    ),
    "deen_mix": Entry("deen_mix", ("de", "en"), True),
    "wmt16_roen": Entry("wmt16_roen", ("ro", "en"), False),
}


def data_directory() -> Path:
    """$ENGINE_FAST_DATA, else ../shared/data."""
    return Path(os.environ.get("ENGINE_FAST_DATA") or "../shared/data")


def resolve_config(config: DataConfig) -> dict[str, TextPair]:
    """The files of a configuration that names files or a catalog corpus. Raises ConfigError, DataError."""
    if config.corpus is None:
        files = {"train": config.train, "valid": config.valid, "test": config.test}
        return {split: pair for split, pair in files.items() if pair is not None}
    entry = _entry(config.corpus)
    languages = (config.source_language, config.target_language)
    if sorted(languages) != sorted(entry.languages):
        raise ConfigError(
            f"data.source_language, data.target_language = {', '.join(languages)}, expected "
            f"{' and '.join(entry.languages)} in either order for data.corpus = {config.corpus}."
        )
    if config.pretokenised != entry.pretokenised:
        held = "space-separated Moses tokens" if entry.pretokenised else "untokenised text"
        raise ConfigError(
            f"data.pretokenised = {config.pretokenised}, expected {entry.pretokenised}: {config.corpus} holds {held}. "
            f"Set data.pretokenised={str(entry.pretokenised).lower()}."
        )
    root = None if config.root is None else expand_path(config.root)
    pairs = resolve(config.corpus, root, sha256=config.sha256, allow_unverified=config.allow_unverified)
    if languages == entry.languages:
        return pairs
    return {split: TextPair(source=pair.target, target=pair.source) for split, pair in pairs.items()}


def resolve(
    name: str, root: Path | None = None, *, sha256: dict[str, str] | None = None, allow_unverified: bool = False
) -> dict[str, TextPair]:
    """Split -> files of a named corpus, source and target in the order of its own name.

    Raises ConfigError for an unknown name, DataError when the corpus is neither here nor to be had.
    """
    entry = _entry(name)
    if root is not None and not root.is_dir():
        raise DataError(
            f"{root}: data.root is not a folder. Give the folder that holds the files or archives of {name}."
        )
    folder = root if root is not None else data_directory() / entry.folder
    found = _ready_files(folder, entry.languages)
    if found is not None:
        return found
    if entry.extract is None:
        raise DataError(
            f"{folder}: holds no {', '.join(SPLITS)} files of {name}. Set ENGINE_FAST_DATA to the directory that has "
            f"{entry.folder}/, or data.root to the folder itself."
        )
    paths = {
        archive.name: fetch(archive, root, sha256=(sha256 or {}).get(archive.name), allow_unverified=allow_unverified)
        for archive in entry.archives
    }
    return _extracted(name, entry.languages, entry.extract, paths)


def _entry(name: str) -> Entry:
    if name not in CATALOG:
        near = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"data.corpus = {name!r}, expected one of {', '.join(CATALOG)}.{hint}")
    return CATALOG[name]


def _ready_files(folder: Path, languages: tuple[str, str]) -> dict[str, TextPair] | None:
    pairs = {}
    for split in SPLITS:
        sides = []
        for language in languages:
            names = [folder / f"{split}.{language}{suffix}" for suffix in ("", ".gz", ".xz")]
            sides += [str(path) for path in names if path.is_file()][:1]
        if len(sides) < 2:
            return None
        pairs[split] = TextPair(source=sides[0], target=sides[1])
    return pairs


def _extracted(
    name: str, languages: tuple[str, str], extract: Callable[[dict[str, Path]], Texts], paths: dict[str, Path]
) -> dict[str, TextPair]:
    """Texts taken out of the archives once, kept in the cache under the archives' own hash."""
    digest = "-".join(sha256_of(path)[:12] for path in paths.values())
    folder = cache_directory() / f"{name}-{digest}"
    if not (folder / "complete").exists():
        with new_directory(folder, marker="complete") as partial:
            for split, sides in extract(paths).items():
                for language, lines in zip(languages, sides, strict=True):
                    write_lines(partial / f"{split}.{language}", lines)
            write_file(partial / "complete", b"")
    found = _ready_files(folder, languages)
    if found is None:
        raise DataError(f"{folder}: is incomplete. Delete it and try again.")
    return found
