"""Teachers of Hugging Face: small random models of several families, against what transformers itself makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine_fast.config import Architecture
from engine_fast.data.symbols import BOS, EOS, MASK, PAD, UNK
from engine_fast.decoding import beam_search, generate, greedy
from engine_fast.energies import Relaxation, discrete_energy, inner_positions, relaxed_energy
from engine_fast.errors import CheckpointError, DataError
from engine_fast.models import CMLM, freeze, load_model, save_model

transformers = pytest.importorskip("transformers")

from engine_fast.models.huggingface.importing import Origin, import_huggingface  # noqa: E402
from tests.models import hf_models  # noqa: E402

FAMILIES = {
    "marian": (hf_models.marian, {}),
    "marian-many": (lambda path: hf_models.marian(path, languages=(">>deu<<", ">>eng<<")), {"target_language": "eng"}),
    "marian-apart": (hf_models.marian_apart, {}),
    "t5": (hf_models.t5, {"prompt": "translate German to English: "}),
    "mbart": (hf_models.mbart, {"source_language": "de_DE", "target_language": "en_XX"}),
    "mbart-50": (
        lambda path: hf_models.mbart(path, fifty=True), {"source_language": "de_DE", "target_language": "en_XX"}
    ),
    "nllb": (hf_models.nllb, {"source_language": "deu_Latn", "target_language": "eng_Latn"}),
    "m2m100": (hf_models.m2m100, {"source_language": "de", "target_language": "en"}),
}  # fmt: skip
SOURCES = hf_models.lines(hf_models.GERMAN, 4, seed=7)
TARGETS = hf_models.lines(hf_models.ENGLISH, 4, seed=8)


class Imported:
    """A family's directory, what was imported from it, and the original beside it."""

    def __init__(self, directory: Path, options: dict) -> None:
        self.directory, self.out, self.options = directory, directory.with_name(directory.name + "-imported"), options
        import_huggingface(Origin(str(directory), **options), self.out)
        self.loaded = load_model(self.out, kind="teacher")
        self.teacher = freeze(self.loaded.model).double()
        self.source = self._pad([self.loaded.source_vocabulary.encode(line) for line in SOURCES])
        self.target = self._pad([self.loaded.target_vocabulary.encode(line) for line in TARGETS])
        self.original = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).double().eval()
        languages = {"src_lang": options.get("source_language"), "tgt_lang": options.get("target_language")}
        many = "source_language" in options
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **(languages if many else {}))
        before = options.get("prompt", "") or (">>eng<< " if options and not many else "")
        self.theirs = self.tokenizer(
            [before + line for line in SOURCES], text_target=TARGETS, padding=True, return_tensors="pt"
        )
        self.language = self.tokenizer.convert_tokens_to_ids(options["target_language"]) if many else None
        if directory.name == "m2m100":
            self.language = self.tokenizer.get_lang_id("en")

    @staticmethod
    def _pad(rows):
        rows = [torch.tensor([*row, EOS]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def names(self, ids):
        """The pieces of the original's ids up to its end symbol; a row without one is called as our vocabulary does."""
        ids = ids[: ids.index(self.tokenizer.eos_token_id) + 1]
        found = zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True)
        unknown = self.tokenizer.unk_token
        return [
            f"<row {i}>" if name in (None, unknown) and i != self.tokenizer.unk_token_id else name for i, name in found
        ]

    def own_losses(self):
        """(B,) nats of each target, as the original gives them; a language code is not counted."""
        labels = self.theirs["labels"].masked_fill(self.theirs["labels"] == self.tokenizer.pad_token_id, -100)
        if self.directory.name == "mbart":  # its first form wraps the code from the end to the front
            inputs = self.original.prepare_decoder_input_ids_from_labels(self.theirs["labels"])
        else:
            start = self.original.config.decoder_start_token_id
            inputs = F.pad(self.theirs["labels"][:, :-1], (1, 0), value=start)
        labels = labels if self.language is None else labels.masked_fill(labels == self.language, -100)
        losses = []
        for i in range(len(labels)):
            loss = self.original(
                input_ids=self.theirs["input_ids"][i : i + 1], attention_mask=self.theirs["attention_mask"][i : i + 1],
                decoder_input_ids=inputs[i : i + 1], labels=labels[i : i + 1],
            ).loss  # fmt: skip
            losses.append(loss * (labels[i] != -100).sum())
        return torch.stack(losses)


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    made = {}

    def get(name: str) -> Imported:
        if name not in made:
            make, options = FAMILIES[name]
            made[name] = Imported(make(tmp_path_factory.mktemp("hf") / name), options)
        return made[name]

    return get


@pytest.fixture
def marian(families):
    return families("marian")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_energy_of_one_hot_words_is_the_models_own_loss(families, family):
    found = families(family)
    memory = found.teacher.encode(found.source)
    inner = inner_positions(found.target)
    one_hot = 1e4 * F.one_hot(found.target[inner], found.teacher.target_size).double()
    energies = relaxed_energy(found.teacher, memory, one_hot, found.target, Relaxation("SX", "ST"))
    with torch.no_grad():
        losses = found.own_losses()
    torch.testing.assert_close(energies, losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(discrete_energy(found.teacher, found.source, found.target), losses, rtol=0, atol=1e-6)


def test_two_lists_of_pieces_are_two_vocabularies(families):
    found = families("marian-apart")
    source, target = found.loaded.source_vocabulary, found.loaded.target_vocabulary
    assert source.fingerprint != target.fingerprint
    for vocabulary, name in ((source, "vocab.json"), (target, "target_vocab.json")):
        named = set(json.loads((found.directory / name).read_text()))
        assert named <= set(vocabulary.pieces(range(len(vocabulary)))), "no word may be taken for the other's <pad>"
    tables = found.teacher.network.get_encoder().get_input_embeddings(), found.teacher.decoder.get_input_embeddings()
    assert tables[0].weight is not tables[1].weight


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_a_student_and_no_weight(families, family):
    found = families(family)
    architecture = Architecture(width=16, ffn_width=16, heads=2, encoder_layers=1, decoder_layers=1, tie="none")
    student = CMLM(architecture, found.teacher.source_size, found.teacher.target_size).double()
    inner = inner_positions(found.target)
    z = student.logits(found.source, torch.where(found.target != PAD, MASK, PAD))[inner]
    energy = relaxed_energy(found.teacher, found.teacher.encode(found.source), z, found.target, Relaxation("SX", "ST"))
    z.retain_grad()
    energy.sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.any(-1).all()
    assert all(p.grad is not None for name, p in student.named_parameters() if "length" not in name)
    assert all(p.grad is None for p in found.teacher.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beam", [1, 3])
def test_generate_is_the_originals_own(families, family, beam):
    found = families(family)
    ours = generate(found.teacher, found.source, beam=beam, n_best=beam, length_penalty=0.7, max_length=(0.0, 7.0))
    prompt = [found.original.config.decoder_start_token_id]
    if found.language is not None:
        prompt = [found.language] if family == "mbart" else [*prompt, found.language]
    lacking = {"pad_token_id": found.tokenizer.pad_token_id, "eos_token_id": found.tokenizer.eos_token_id}
    never = [found.tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "<mask>")]
    kept = [number for number in never if number not in (None, found.tokenizer.unk_token_id)]
    rows = found.original.generate(
        **{name: found.theirs[name] for name in ("input_ids", "attention_mask")}, num_beams=beam,
        num_return_sequences=beam, length_penalty=0.7, max_length=len(prompt) + 8, do_sample=False,
        decoder_input_ids=torch.tensor([prompt] * len(SOURCES)), forced_eos_token_id=lacking["eos_token_id"],
        forced_bos_token_id=None, decoder_start_token_id=prompt[0], suppress_tokens=kept, **lacking,
    )  # fmt: skip
    theirs = [found.names(row.tolist()) for row in rows[:, len(prompt) :]]
    pieces = found.loaded.target_vocabulary.pieces
    assert [pieces(each.tokens) for hypotheses in ours for each in hypotheses] == theirs
    for row, hypotheses in enumerate(ours):
        for each in hypotheses:
            assert each.tokens[-1] == EOS
            assert not {BOS, PAD, MASK} & set(each.tokens)
            energy = discrete_energy(found.teacher, found.source[row : row + 1], torch.tensor([each.tokens]))
            assert each.log_probability == pytest.approx(-float(energy), abs=1e-6)
            assert each.score == pytest.approx(each.log_probability / len(each.tokens) ** 0.7)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_is_all_at_once(families, family):
    """The cache serves our own search too: greedy finds what generate finds, and beams may be reordered and dropped."""
    found = families(family)
    inputs = F.pad(found.target[:, :-1], (1, 0), value=found.teacher.start)
    whole = found.teacher(found.source, inputs)
    cache = found.teacher.start_cache(found.teacher.encode(found.source))
    order = torch.tensor([2, 0, 3])
    for position in range(4):
        if position == 2:
            cache.reorder(order)
        rows = torch.arange(4) if position < 2 else order
        step = found.teacher.step(inputs[rows, position], cache)
        real = found.target[rows, position] != PAD
        torch.testing.assert_close(step[real], whole[rows, position][real], rtol=1e-9, atol=1e-9)
    own = generate(found.teacher, found.source, max_length=(0.0, 9.0))
    alone = greedy(found.teacher, found.source, max_length=(0.0, 9.0), min_length=0)
    assert [h.tokens for h in alone] == [h[0].tokens for h in own]
    for row, (best, *_) in enumerate(beam_search(found.teacher, found.source, beam=4, max_length=(0.0, 9.0))):
        energy = discrete_energy(found.teacher, found.source[row : row + 1], torch.tensor([best.tokens]))
        assert best.log_probability == pytest.approx(-float(energy), abs=1e-6)


def test_the_shorter_of_a_batch_does_not_depend_on_the_longer(marian):
    together = generate(marian.teacher, marian.source, beam=2, max_length=(0.6, 1.0))
    for row, hypotheses in enumerate(together):
        words = marian.source[row][marian.source[row] != PAD][None]
        alone = generate(marian.teacher, words, beam=2, max_length=(0.6, 1.0))[0]
        assert alone[0].tokens == hypotheses[0].tokens
        assert len(alone[0].tokens) <= int(0.6 * words.shape[1] + 1.0) + 1


def test_what_the_model_forbids_stays_forbidden(marian):
    settings = marian.teacher.network.generation_config
    assert settings.bad_words_ids == [[PAD]]
    assert {BOS, PAD, MASK} <= set(settings.suppress_tokens)
    assert (settings.eos_token_id, settings.decoder_start_token_id, settings.forced_eos_token_id) == (EOS, PAD, EOS)
    assert marian.teacher.start == PAD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_symbol_that_the_model_lacks_is_impossible_and_finite(marian, dtype):
    teacher = load_model(marian.out, dtype=dtype).model
    inputs = F.pad(marian.target[:, :-1], (1, 0), value=teacher.start)
    logits = teacher(marian.source, inputs)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert not logits.float().softmax(-1)[..., [BOS, MASK]].any()
    expected = marian.teacher(marian.source, inputs)
    real = marian.target != PAD
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    ours, theirs = (x[real][:, UNK + 2 :] for x in (logits.double(), expected))
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_recomputing_blocks_changes_no_gradient(families, family):
    teacher, source = families(family).teacher, families(family).source
    gradients = []
    for recompute in (False, True):
        teacher.activation_checkpointing = recompute
        assert teacher.activation_checkpointing is recompute
        embedded = teacher.embed(source).requires_grad_()
        hidden = teacher.forward_embedded(teacher.encode(source), embedded)
        gradients.append(torch.autograd.grad(hidden.square().sum(), embedded)[0])
    teacher.activation_checkpointing = False
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_too_long_a_sentence_is_refused(marian):
    words = torch.full((1, marian.teacher.max_positions + 1), 7)
    with pytest.raises(DataError, match="max_positions = 64"):
        marian.teacher.encode(words)
    with pytest.raises(DataError, match="max_positions = 64"):
        marian.teacher.decode(marian.teacher.encode(marian.source[:1]), words)


# ---------------------------------------------------------------- directories


def test_a_model_directory_gives_the_same_network_again(marian, tmp_path):
    save_model(tmp_path / "again", marian.teacher, marian.loaded.source_vocabulary, marian.loaded.target_vocabulary)
    again = load_model(tmp_path / "again", kind="huggingface", dtype=torch.float64)
    inputs = F.pad(marian.target[:, :-1], (1, 0), value=again.model.start)
    assert torch.equal(again.model(marian.source, inputs), marian.teacher(marian.source, inputs))
    assert again.model.architecture == marian.teacher.architecture
    assert again.source_vocabulary.fingerprint == marian.loaded.source_vocabulary.fingerprint
    assert marian.loaded.card["imported_from"] == str(marian.directory)
    with pytest.raises(CheckpointError, match="holds a huggingface model, expected a student"):
        load_model(marian.out, kind="student")


WITHOUT = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
from engine_fast.errors import CheckpointError
from engine_fast.models import load_model
loaded = load_model(sys.argv[1], kind="student")
print(loaded.source_vocabulary.encode(sys.argv[3]))
try:
    load_model(sys.argv[2])
except CheckpointError as error:
    print(error)
"""


def test_a_student_reloads_without_transformers_and_the_teacher_says_what_to_install(marian, tmp_path):
    architecture = Architecture(width=16, ffn_width=16, heads=2, encoder_layers=1, decoder_layers=1, tie="all")
    student = CMLM(architecture, marian.teacher.source_size, marian.teacher.target_size)
    save_model(tmp_path / "student", student, marian.loaded.source_vocabulary, marian.loaded.target_vocabulary)
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "student"), str(marian.out), SOURCES[0]]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    ids, error = result.stdout.strip().splitlines()
    assert ids == str(marian.loaded.source_vocabulary.encode(SOURCES[0]))
    assert "pip install 'engine-fast[hf]'" in error
