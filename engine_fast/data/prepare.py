"""From text files to id shards: filter, train the vocabularies, encode, and leave a report.

Three streaming passes over the training text: judge every pair (and find repeated ones), learn the vocabularies from an
evenly spaced sample, encode. Memory grows with the corpus by a few bytes a pair only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_fast.config import DataConfig
from engine_fast.data import catalog, synthetic
from engine_fast.data.atomic import new_directory, sha256_of, write_file
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.encoding import encode_pairs
from engine_fast.data.filters import RULES, PairHashes, length_rule, text_rule
from engine_fast.data.prepared import Prepared, reference_file, source_file
from engine_fast.data.report import REPORT, VERSION, PrepareReport, SideReport, SplitReport, VocabularyReport
from engine_fast.data.shards import ShardWriter
from engine_fast.data.subwords import train_sentencepiece
from engine_fast.data.symbols import UNK
from engine_fast.data.text import expand_path, iter_lines, iter_pairs, write_lines
from engine_fast.data.vocabulary import SentencePieceVocabulary, Vocabulary, save_pair
from engine_fast.errors import DataError, EngineFastError

__all__ = ["PrepareReport", "Prepared", "prepare"]

_LOG = logging.getLogger(__name__)
_KEEP = len(RULES)
_MOST_CHARACTERS = {"bpe": 100_000_000, "unigram": 20_000_000}
"""Read by SentencePiece at most: it holds about 2 bytes a character for bpe, 20 (suffix arrays) for unigram."""
Verdicts = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Files:
    source: Path
    target: Path
    references: tuple[Path, ...]


def prepare(
    config: DataConfig, directory: Path, *, seed: int, given: tuple[Vocabulary, Vocabulary] | None = None
) -> PrepareReport:
    """Prepare a corpus in `directory`, whole or not at all; Prepared.open(directory) reads it.

    given: the vocabularies of source and target; None trains new ones, as data.vocabulary says.
    Does nothing when the directory already holds the result of the same settings and the same input bytes. The seed
    matters for the generated corpus only. Raises DataError, ConfigError.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="engine-fast-") as scratch:
        splits = _input_files(config, Path(scratch), seed)
        key = _key(config, splits, given)
        if os.path.exists(directory / REPORT):  # false, not an error, where it may not be looked at
            report = _reusable(directory, key)
            if report is not None:
                _LOG.info("%s: already prepared from the same input, nothing to do", directory)
                return report
        with new_directory(directory, marker=REPORT) as partial:
            report = _prepare_into(config, splits, partial, key, given)
            write_file(partial / REPORT, report.to_json())
    return replace(report, seconds=time.perf_counter() - started)


def _input_files(config: DataConfig, scratch: Path, seed: int) -> dict[str, _Files]:
    if config.synthetic is not None:
        result = {}
        for split in synthetic.SPLITS:
            source, target, *modes = synthetic.write_split(config.synthetic, scratch, split=split, seed=seed)
            result[split] = _Files(source, target, tuple(modes))
        return result
    pairs = catalog.resolve_config(config)
    files = {split: (expand_path(pair.source), expand_path(pair.target)) for split, pair in pairs.items()}
    return {split: _Files(source, target, (target,)) for split, (source, target) in files.items()}


def _settings(config: DataConfig) -> dict[str, Any]:
    shaping = {"vocabulary", "filters", "pretokenised", "shard_sentences", "source_language", "target_language"}
    return config.model_dump(mode="json", include=shaping)


def _key(config: DataConfig, splits: dict[str, _Files], given: tuple[Vocabulary, Vocabulary] | None) -> str:
    inputs = {
        split: [sha256_of(path) for path in (files.source, files.target, *files.references)]
        for split, files in splits.items()
    }
    imported = [] if given is None else [[vocabulary.fingerprint for vocabulary in given]]
    content = json.dumps([VERSION, _settings(config), inputs, *imported], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _reusable(directory: Path, key: str) -> PrepareReport | None:
    try:
        report = PrepareReport.read(directory)
        if report.key != key:
            return None
        prepared = Prepared.open(directory)
        for split in report.splits:
            prepared.split(split)
    except EngineFastError as error:
        _LOG.warning("%s Preparing again.", error)
        return None
    return replace(report, reused=True)


def _prepare_into(
    config: DataConfig,
    splits: dict[str, _Files],
    directory: Path,
    key: str,
    given: tuple[Vocabulary, Vocabulary] | None,
) -> PrepareReport:
    verdicts, num_characters = _judge(config, splits["train"], directory)
    share = min(1.0, _MOST_CHARACTERS[config.vocabulary.kind] / max(num_characters, 1))
    if given is None:
        vocabularies, files = _train_vocabularies(config, splits["train"], verdicts, share, directory)
    else:
        names = save_pair(directory, *given)
        vocabularies, files = given, (names["source"], names["target"])
    reports = {}
    for split, split_files in splits.items():
        reports[split] = _encode_split(
            config, split, split_files, verdicts if split == "train" else None, vocabularies, directory
        )
        _LOG.info("%s: %d of %d pairs kept", split, reports[split].kept, reports[split].read)
        if split != "train":
            _copy_text(split, split_files, directory)
    texts = sorted(path.name for path in directory.glob("*.txt"))
    kind = config.vocabulary.kind if given is None else "given"
    return PrepareReport(
        key=key,
        corpus="synthetic" if config.synthetic else config.corpus or "files",
        source_language=config.source_language,
        target_language=config.target_language,
        pretokenised=config.pretokenised,
        splits=reports,
        vocabularies={
            side: VocabularyReport(file, kind, len(vocabulary), vocabulary.fingerprint)
            for side, file, vocabulary in zip(("source", "target"), files, vocabularies, strict=True)
        },
        files={name: sha256_of(directory / name) for name in [*dict.fromkeys(files), *texts]},
        settings=_settings(config),
    )


def _judge(config: DataConfig, files: _Files, directory: Path) -> tuple[Verdicts, int]:
    """One number a pair: the index of the rule that drops it by its text, or _KEEP. And the characters read."""
    verdicts = bytearray()
    num_characters = 0
    with PairHashes(directory / "hashes") as hashes:
        for source, target in iter_pairs(files.source, files.target):
            rule = text_rule(config.filters, source, target)
            verdicts.append(_KEEP if rule is None else RULES.index(rule))
            hashes.add(source, target)
            num_characters += len(source) + len(target)
        result = np.frombuffer(verdicts, dtype=np.uint8)
        if config.filters.drop_duplicates:
            result[(result == _KEEP) & hashes.repeated()] = RULES.index("duplicate")
    _LOG.info("train: %d pairs read, %d kept by their text", len(result), int((result == _KEEP).sum()))
    return result, num_characters


def _train_vocabularies(
    config: DataConfig, files: _Files, verdicts: Verdicts, share: float, directory: Path
) -> tuple[tuple[Vocabulary, Vocabulary], tuple[str, str]]:
    most = int(share * (verdicts == _KEEP).sum())

    def train(sides: tuple[int, ...], stem: str) -> tuple[SentencePieceVocabulary, str]:
        limit = min(config.vocabulary.sample // len(sides), most)
        vocabulary = train_sentencepiece(
            (pair[side] for pair in _sample(files, verdicts, limit) for side in sides),
            kind=config.vocabulary.kind,
            size=config.vocabulary.size,
            character_coverage=config.vocabulary.character_coverage,
            exact=config.synthetic is None,
        )
        _LOG.info("%s vocabulary: %d pieces", stem, len(vocabulary))
        return vocabulary, vocabulary.save(directory, stem)

    if config.vocabulary.joint:
        vocabulary, file = train((0, 1), "joint")
        return (vocabulary, vocabulary), (file, file)
    (source, source_name), (target, target_name) = train((0,), "source"), train((1,), "target")
    return (source, target), (source_name, target_name)


def _sample(files: _Files, verdicts: Verdicts, limit: int) -> Iterator[tuple[str, str]]:
    """At most `limit` kept pairs, evenly spaced over the file."""
    kept = int((verdicts == _KEEP).sum())
    limit = min(max(limit, 1), kept)
    position = 0
    for pair, verdict in zip(iter_pairs(files.source, files.target), verdicts, strict=True):
        if verdict == _KEEP:
            position += 1
            if position * limit // kept > (position - 1) * limit // kept:
                yield pair


def _encode_split(
    config: DataConfig,
    split: str,
    files: _Files,
    verdicts: Verdicts | None,
    vocabularies: tuple[Vocabulary, Vocabulary],
    directory: Path,
) -> SplitReport:
    """Write the split's shards. With verdicts (train) filter; without (valid, test) keep every line."""
    pairs = iter_pairs(files.source, files.target)
    dropped: Counter[str] = Counter()
    if verdicts is not None:
        dropped.update(RULES[number] for number in verdicts if number != _KEEP)
        pairs = (pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict == _KEEP)
    kept = long = 0
    unknown = [0, 0]
    with ShardWriter(
        directory / split,
        source_fingerprint=vocabularies[0].fingerprint,
        target_fingerprint=vocabularies[1].fingerprint,
        shard_sentences=config.shard_sentences,
    ) as writer:
        for pair in encode_pairs(pairs, *vocabularies, workers=config.workers):
            rule = length_rule(config.filters, len(pair.source_ids), len(pair.target_ids))
            if rule and verdicts is not None:
                dropped[rule] += 1
                continue
            long += rule == "too_long"
            kept += 1
            unknown[0] += pair.source_ids.count(UNK)
            unknown[1] += pair.target_ids.count(UNK)
            writer.add(pair.source_ids, pair.target_ids)
    if not kept:
        counts = ", ".join(f"{rule} {count}" for rule, count in dropped.items())
        raise DataError(f"{files.source}: every pair was dropped ({counts}). Check the files or loosen data.filters.")
    corpus = ParallelCorpus.open(directory / split, verify=False)
    return SplitReport(
        read=kept + dropped.total(),
        kept=kept,
        dropped={rule: dropped[rule] for rule in RULES} if verdicts is not None else {},
        longer_than_limit=long,
        num_references=len(files.references),
        source=SideReport.of(corpus.source_lengths, unknown[0]),
        target=SideReport.of(corpus.target_lengths, unknown[1]),
    )


def _copy_text(split: str, files: _Files, directory: Path) -> None:
    write_lines(directory / source_file(split), iter_lines(files.source))
    for number, reference in enumerate(files.references):
        write_lines(directory / reference_file(split, number), iter_lines(reference))
