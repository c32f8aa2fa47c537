"""What the corpus is and how it becomes ids."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from engine_fast.config.base import Section


class TextPair(Section):
    """Two aligned files, one sentence a line; plain, .gz or .xz. `${NAME}` is read from the environment."""

    source: str
    """Path of the source side."""
    target: str
    """Path of the target side."""


class VocabularyConfig(Section):
    """SentencePiece vocabularies, trained on the training split."""

    kind: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece model type."""
    joint: bool = True
    """One vocabulary for both languages (needed to tie all embeddings); otherwise one each."""
    size: PositiveInt = 10000
    """Pieces per vocabulary, special symbols included (the generated corpus: at most)."""
    character_coverage: float = Field(default=1.0, gt=0.9, le=1.0)
    """Share of characters that get a piece of their own; the rest become <unk>."""
    sample: PositiveInt = 1_000_000
    """Training lines SentencePiece reads at most, evenly spaced; fewer where they would not fit into 0.5 GiB."""


class FilterConfig(Section):
    """Which training pairs are dropped. Each rule's count is reported. Valid and test keep every line."""

    max_tokens: PositiveInt = 175
    """Longest side in pieces, end symbol included."""
    max_ratio: PositiveFloat = 3.0
    """Largest length ratio in pieces, either way round; sides shorter than 10 pieces are not judged."""
    drop_duplicates: bool = True
    """Drop repeated (source, target) pairs."""
    drop_identical: bool = True
    """Drop pairs whose two sides are the same text."""


class SyntheticConfig(Section):
    """The generated demo corpus: each sentence is translated in one of two modes at random."""

    num_words: PositiveInt = 60
    """Source words."""
    min_length: PositiveInt = 4
    """Shortest sentence in words."""
    max_length: PositiveInt = 10
    """Longest sentence in words."""
    num_train: PositiveInt = 30000
    """Training sentences."""
    num_valid: PositiveInt = 500
    """Validation sentences."""
    num_test: PositiveInt = 1000
    """Test sentences."""


class DataConfig(Section):
    """Corpus, vocabulary and filters."""

    source_language: str = "de"
    """Language code, for file names and reports."""
    target_language: str = "en"
    """Language code; sacreBLEU sees detokenised text of it."""
    corpus: str | None = None
    """Name of a catalog corpus; or give train, valid and test, or synthetic."""
    root: str | None = None
    """Where a catalog corpus already is, as files or archives; default: $ENGINE_FAST_DATA, then a checked download."""
    train: TextPair | None = None
    """Training files."""
    valid: TextPair | None = None
    """Validation files."""
    test: TextPair | None = None
    """Test files."""
    synthetic: SyntheticConfig | None = None
    """Generate the demo corpus instead of reading files."""
    pretokenised: bool = False
    """The files hold space-separated tokens (Moses); output is then token text, and BLEU uses tokenize=none."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Vocabularies."""
    filters: FilterConfig = FilterConfig()
    """Training filters."""
    shard_sentences: PositiveInt = 200_000
    """Sentences per memory-mapped shard."""
    workers: NonNegativeInt = 0
    """Threads that encode; 0 = one per core."""
    sha256: dict[str, str] = {}
    """Checksums of downloaded archives for which the catalog knows none: archive name -> sha256 in hex."""
    allow_unverified: bool = False
    """Take a downloaded archive whose checksum nobody stated."""

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        files = (self.train, self.valid, self.test)
        origins = [self.corpus is not None, any(files), self.synthetic is not None]
        if sum(origins) != 1:
            raise ValueError("give exactly one of: corpus (a catalog name), train+valid+test (files), synthetic")
        if any(files) and not all(files):
            raise ValueError("train, valid and test are needed together")
        return self
