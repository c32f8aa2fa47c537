"""Named corpora: found, refused, downloaded with checksums, and prepared as the paper does."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine_fast.config import DataConfig
from engine_fast.data import catalog, download, moses
from engine_fast.data.catalog import CATALOG, resolve, resolve_config
from engine_fast.data.download import Archive, fetch
from engine_fast.data.text import iter_lines
from engine_fast.errors import ConfigError, DataError

from .conftest import write


def archive(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An HTTP server of this machine: (its address, the folder it serves)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()


MULTI30K = {
    "training.tar.gz": {"train.de": "ein Hund\nzwei\n", "train.en": "a dog\ntwo\n"},
    "validation.tar.gz": {"val.de": "drei\n", "val.en": "three\n", "._val.de": "\0junk"},
    "mmt16_task1_test.tar.gz": {"test.de": "vier\n", "test.en": "four\n", "test.fr": "quatre\n"},
}


def serve_multi30k(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, **wrong: str) -> None:
    address, folder = server
    archives = []
    for name, members in MULTI30K.items():
        path = archive(folder / name, members)
        archives.append(Archive(name, address + name, wrong.get(name.split(".")[0], digest(path))))
    entry = replace(CATALOG["multi30k_de_en"], archives=tuple(archives))
    monkeypatch.setitem(CATALOG, "multi30k_de_en", entry)


@pytest.fixture
def nothing_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_FAST_DATA", str(tmp_path / "no-data"))


def lines(pair: object, side: str) -> list[str]:
    return list(iter_lines(Path(getattr(pair, side))))


@pytest.mark.usefixtures("nothing_local")
def test_download_with_the_right_checksums(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    serve_multi30k(server, monkeypatch)
    pairs = resolve("multi30k_de_en")
    assert lines(pairs["train"], "source") == ["ein Hund", "zwei"]
    assert lines(pairs["valid"], "source") == ["drei"]
    assert lines(pairs["test"], "target") == ["four"]
    for path in server[1].iterdir():  # the second time nothing is fetched
        path.unlink()
    assert resolve("multi30k_de_en") == pairs
    turned = resolve_config(DataConfig(corpus="multi30k_de_en", source_language="en", target_language="de"))
    assert lines(turned["train"], "source") == ["a dog", "two"]


@pytest.mark.usefixtures("nothing_local")
def test_download_with_a_wrong_checksum(
    server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve_multi30k(server, monkeypatch, validation="0" * 64)
    with pytest.raises(DataError, match=rf"validation.tar.gz: what came has another sha256 than {'0' * 64}"):
        resolve("multi30k_de_en")
    assert not (tmp_path / "cache" / "validation.tar.gz").exists()


def test_download_that_fails(server: tuple[str, Path]) -> None:
    with pytest.raises(DataError, match=r"missing.tgz: could not be downloaded .* put missing.tgz into data.root"):
        fetch(Archive("missing.tgz", server[0] + "missing.tgz", "0" * 64), None)


def test_an_unknown_checksum_needs_a_decision(server: tuple[str, Path]) -> None:
    path = archive(server[1] / "de-en.tgz", {"x": "x"})
    unknown = Archive("de-en.tgz", server[0] + "de-en.tgz", None)
    with pytest.raises(DataError, match=r"no checksum is known.*data.sha256 \(\{de-en.tgz: HEX\}\).*allow_unverified"):
        fetch(unknown, None)
    with pytest.raises(DataError, match="another sha256"):
        fetch(unknown, None, sha256="1" * 64)
    assert fetch(unknown, None, sha256=digest(path)).read_bytes() == path.read_bytes()
    assert fetch(unknown, None, allow_unverified=True).read_bytes() == path.read_bytes()


def test_the_users_own_copy_comes_first_and_is_checked(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tgz", {"x": "x"})
    assert fetch(Archive("a.tgz", None, None), tmp_path) == path
    assert fetch(Archive("a.tgz", None, digest(path)), tmp_path) == path
    with pytest.raises(DataError, match=rf"a.tgz: sha256 is {digest(path)}, expected 2222"):
        fetch(Archive("a.tgz", None, "2" * 64), tmp_path)
    with pytest.raises(DataError, match=r"b.tgz: cannot be downloaded by a program. Get it from somewhere"):
        fetch(Archive("b.tgz", None, None, "somewhere"), tmp_path)


def test_damaged_archives(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tgz", {"x.de": "a\n" * 50_000})
    with pytest.raises(DataError, match=r"holds no x\.en"):
        list(download.member_text(path, "x.en"))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="is damaged"):
        list(download.member_text(path, "x.de"))
    bad = tmp_path / "b.tgz"
    with tarfile.open(bad, "w:gz") as tar:
        info = tarfile.TarInfo("x.de")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"a\n\xff\n"))
    with pytest.raises(DataError, match=r"line 2 of x.de is not UTF-8"):
        list(download.member_text(bad, "x.de"))


def test_ready_files_in_any_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "deen_mix"
    folder.mkdir(parents=True)
    monkeypatch.setenv("ENGINE_FAST_DATA", str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"deen_mix: holds no train, valid, test files.*ENGINE_FAST_DATA"):
        resolve("deen_mix")
    for split, suffix in (("train", ".xz"), ("valid", ".gz"), ("test", "")):
        for language in ("de", "en"):
            write(folder / f"{split}.{language}{suffix}", [f"{split} {language}"])
    for pairs in (resolve("deen_mix"), resolve("deen_mix", folder)):
        assert lines(pairs["train"], "target") == ["train en"]
        assert lines(pairs["test"], "source") == ["test de"]
    with pytest.raises(DataError, match=r"data.root is not a folder"):
        resolve("deen_mix", tmp_path / "nowhere")


def test_mistakes_in_the_configuration_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"data.corpus = 'multi30k', expected one of .* Did you mean 'multi30k_de_en'"
    ):
        resolve_config(DataConfig(corpus="multi30k"))
    with pytest.raises(ConfigError, match="= fr, en, expected de and en in either order"):
        resolve_config(DataConfig(corpus="multi30k_de_en", source_language="fr"))
    with pytest.raises(
        ConfigError, match=r"iwslt14_de_en holds space-separated Moses tokens. Set data.pretokenised=true"
    ):
        resolve_config(DataConfig(corpus="iwslt14_de_en"))


def test_iwslt14_is_prepared_as_the_paper_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokeniser:
        def __init__(self, lang: str) -> None:
            self.lang = lang

        def tokenize(self, line: str, return_str: bool, escape: bool) -> str:
            assert return_str
            assert escape
            return line.replace(".", " .").replace("'", " &apos;")

    monkeypatch.setattr(moses.importlib, "import_module", lambda name: SimpleNamespace(MosesTokenizer=Tokeniser))
    german = [f"Satz {number}." for number in range(1, 47)]
    english = [f"Sentence {number}." for number in range(1, 47)]
    meta = ["<url>http</url>", "<talkid>1</talkid>", "<keywords>a, b</keywords>"]
    german[10:10] = [*meta, "<title>Ein Titel.</title>", "", "kurz", " ".join(["w"] * 200)]
    english[10:10] = [*meta, "<title>A title.</title>", "not empty", "much too long for that", " ".join(["w"] * 200)]
    members = {
        f"de-en/train.tags.de-en.{side}": "".join(f"{line}\n" for line in text)
        for side, text in (("de", german), ("en", english))
    }
    for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
        for side in ("de", "en"):
            members[f"de-en/IWSLT14.{name}.de-en.{side}.xml"] = (
                f'<doc>\n<seg id="1"> {name} {side.upper()}\u2019s. </seg>\n<description>no</description>\n</doc>\n'
            )
    archive(tmp_path / "de-en.tgz", members)
    pairs = resolve("iwslt14_de_en", tmp_path)
    train, valid = lines(pairs["train"], "source"), lines(pairs["valid"], "source")
    assert len(train) + len(valid) == 47  # 46 sentences and the title
    assert "ein titel ." in train
    assert valid == ["satz 22 .", "satz 45 ."]  # every 23rd of the accepted pairs
    assert lines(pairs["valid"], "target") == ["sentence 22 .", "sentence 45 ."]
    assert lines(pairs["test"], "target") == [
        f"{name} en &apos;s ."
        for name in ("ted .dev2010", "tedx .dev2012", "ted .tst2010", "ted .tst2011", "ted .tst2012")
    ]


def test_iwslt14_without_the_tokeniser_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(moses.importlib, "import_module", missing)
    archive(tmp_path / "de-en.tgz", {"x": ""})
    with pytest.raises(DataError, match="pip install sacremoses"):
        resolve("iwslt14_de_en", tmp_path)


@pytest.mark.parametrize(
    ("words", "accepted"),
    [((1, 1), True), ((0, 1), False), ((2, 3), True), ((2, 4), False), ((175, 175), True), ((176, 170), False)],
)
def test_iwslt14_length_limits(words: tuple[int, int], accepted: bool) -> None:
    assert moses.acceptable(*("w " * number for number in words)) is accepted
    assert moses.acceptable(*("w " * number for number in reversed(words))) is accepted


def test_wmt16_undoes_the_merges(tmp_path: Path) -> None:
    members = {}
    for stem in ("train/corpus", "dev/dev", "test/test"):
        members[f"wmt16/en-ro/{stem}.bpe.ro"] = f"dou@@ ă {stem.split('/')[1]} te@@ xte@@\n"
        members[f"wmt16/en-ro/{stem}.bpe.en"] = "two te@@ xts\n"
    archive(tmp_path / "wmt16.tar.gz", members)
    pairs = resolve("wmt16_ro_en", tmp_path)
    assert lines(pairs["train"], "source") == ["două corpus texte"]
    assert lines(pairs["test"], "target") == ["two texts"]


def test_the_catalog_names_no_checksum_that_is_not_one() -> None:
    for entry in CATALOG.values():
        for one in entry.archives:
            assert one.url or one.origin
            assert one.sha256 is None or len(bytes.fromhex(one.sha256)) == 32


def test_the_shared_corpora_resolve(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_FAST_DATA", str(shared_data))
    for name in ("multi30k_de_en", "deen_mix", "wmt16_roen"):
        if (shared_data / CATALOG[name].folder).is_dir():
            for pair in catalog.resolve(name).values():
                assert os.path.isfile(pair.source)
                assert os.path.isfile(pair.target)
