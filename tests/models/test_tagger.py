"""The BiLSTM tagger: which source word a slot copies, and what its logits and lengths depend on."""

import pytest
import torch
import torch.nn.functional as F

from engine_fast.config import TaggerArchitecture
from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.decoding import mask_predict
from engine_fast.errors import CheckpointError, ConfigError, DataError
from engine_fast.models import Tagger, load_model, save_model
from engine_fast.models.tagger import stretch

from .recurrent_reference import bilstm

SMALL = {"embedding_width": 6, "width": 5, "max_positions": 12, "dropout": 0.0}
SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD]])
LENGTHS = ((4, 5), (3, 3), (2, 1))


def build(seed=0, **switches):
    torch.manual_seed(seed)
    model = Tagger(TaggerArchitecture(**{**SMALL, **switches}), 20, 20)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double().eval()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def positions(s, n, num_slots=None):
    return stretch(torch.tensor([s]), torch.tensor([n]), num_slots or n)[0].tolist()


@pytest.mark.parametrize(
    ("s", "n", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),
        (4, 5, [0, 1, 2, 2, 3]),  # 0, 0.75, 1.5, 2.25, 3: the half goes up
        (5, 3, [0, 2, 4]),
        (7, 1, [6]),  # the only slot is the end symbol
        (1, 4, [0, 0, 0, 0]),
        (2, 9, [0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (101, 3, [0, 50, 100]),
    ],
)
def test_slots_copy_the_words_that_the_docstring_names(s, n, expected):
    assert positions(s, n) == expected


def test_copies_are_in_order_even_and_end_with_the_end():
    for s in range(1, 30):
        for n in range(2, 30):
            got = positions(s, n, num_slots=30)
            assert got[0] == 0
            assert got[n - 1] == s - 1
            assert got[n:] == [0] * (30 - n)
            exact = [t * (s - 1) / (n - 1) for t in range(n)]
            assert all(abs(a - b) <= 0.5 for a, b in zip(got[:n], exact, strict=True))


def test_slots_are_read_by_a_bilstm_and_a_linear_layer():
    model = build()
    got = model.logits(SOURCE, TARGET.masked_fill(TARGET != PAD, MASK))
    assert got.shape == (3, 5, 20)
    for b, (s, n) in enumerate(LENGTHS):
        copied = SOURCE[b][positions(s, n)]
        states, _, _ = bilstm(model.layers, model.embedding.weight[copied])
        close(got[b, :n], states @ model.output.weight.t() + model.output.bias)


def test_only_the_number_of_slots_is_read():
    model = build()
    memory, _ = model.encode(SOURCE)
    close(model.decode(memory, TARGET), model.decode(memory, TARGET.masked_fill(TARGET != PAD, MASK)))


def test_padding_changes_nothing():
    model = build()
    memory, lengths = model.encode(F.pad(SOURCE, (0, 4), value=PAD))
    together = model.decode(memory, F.pad(TARGET, (0, 3), value=PAD))
    for b, (s, n) in enumerate(LENGTHS):
        memory, alone = model.encode(SOURCE[b : b + 1, :s])
        close(together[b, :n], model.decode(memory, TARGET[b : b + 1, :n])[0])
        close(lengths[b], alone[0])


def test_chosen_memories_keep_their_sentences():
    model = build()
    memory, _ = model.encode(SOURCE)
    rows = torch.tensor([2, 0, 0])
    close(model.decode(memory.select(rows), TARGET[rows]), model.decode(memory, TARGET)[rows])


def test_lengths_are_a_distribution_over_the_mean_word_and_the_source_length():
    model = build()
    log_p = model.lengths(SOURCE)
    assert log_p.shape == (3, 12)
    assert log_p[:, 0].eq(-torch.inf).all()
    close(log_p.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    for b, (s, _) in enumerate(LENGTHS):
        guess = model.embedding.weight[SOURCE[b, :s]].mean(0) + model.source_length.weight[s]
        close(log_p[b, 1:], (model.length_embedding.weight[1:] @ guess).log_softmax(-1))


def test_every_parameter_and_dropout_take_part():
    model = build(dropout=0.3).train()
    memory, lengths = model.encode(SOURCE)
    hidden = model.decode(memory, TARGET)
    (model.project(hidden).square().sum() + lengths[:, 1:].square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not torch.equal(hidden, model.decode(memory, TARGET))
    model.eval()
    assert torch.equal(model.decode(memory, TARGET), model.decode(memory, TARGET))


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for on in (False, True):
        model = build(dropout=0.3).train()
        model.activation_checkpointing = on
        assert model.activation_checkpointing is on
        torch.manual_seed(1)
        model.logits(SOURCE, TARGET).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bfloat16_agrees():
    exact = build().logits(SOURCE, TARGET)
    got = build().bfloat16().logits(SOURCE, TARGET).double()
    assert (got - exact).norm() <= 0.05 * exact.norm()


def test_one_pass_of_mask_predict_fills_the_slots_and_more_are_refused():
    model = build()
    for hypothesis, words in zip(mask_predict(model, SOURCE, lengths=torch.tensor([5, 3, 2])), (5, 3, 2), strict=True):
        assert len(hypothesis.tokens) == words
        assert hypothesis.tokens[-1] == EOS
    with pytest.raises(ConfigError, match=r"iterations = 4, expected 1.*tagger"):
        mask_predict(model, SOURCE, iterations=4)


def test_a_directory_gives_back_the_model(tmp_path):
    source, target = DictionaryVocabulary(["a", "b"]), DictionaryVocabulary(["x", "y", "z"])
    model = Tagger(TaggerArchitecture(**SMALL), len(source), len(target))
    save_model(tmp_path / "model", model, source, target)
    for kind in (None, "tagger", "student"):
        loaded = load_model(tmp_path / "model", kind=kind).model
        assert type(loaded) is Tagger
        assert loaded.architecture == model.architecture
        ids = torch.tensor([[5, 6, EOS]])
        assert torch.equal(loaded.logits(ids, ids), model.eval().logits(ids, ids))
    with pytest.raises(CheckpointError, match="holds a tagger model, expected a teacher"):
        load_model(tmp_path / "model", kind="teacher")


def test_a_sentence_beyond_the_positions_is_refused():
    model = build()
    with pytest.raises(DataError, match=r"13 tokens.*max_positions = 12"):
        model.encode(torch.full((1, 13), 7))
    with pytest.raises(DataError, match=r"13 tokens.*max_positions = 12"):
        model.decode(model.encode(SOURCE)[0], torch.full((3, 13), 7))


def test_compiling_is_refused():
    with pytest.raises(ConfigError, match=r"compile = true with architecture.kind = 'bilstm'"):
        build().compile_stacks()
