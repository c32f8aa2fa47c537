"""The LSTM teacher: against a reference by hand, and against its own steps, padding, search and precision."""

import copy

import pytest
import torch
import torch.nn.functional as F

from engine_fast import ops
from engine_fast.config import LSTMArchitecture
from engine_fast.data.symbols import EOS, PAD
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.decoding import beam_search, greedy
from engine_fast.energies import Relaxation, discrete_energy, inner_positions, relaxed_energy
from engine_fast.errors import ConfigError, DataError
from engine_fast.models import Seq2Seq, freeze, load_model, save_model, shift_right

from .recurrent_reference import luong

SMALL = {"embedding_width": 6, "encoder_width": 5, "decoder_width": 7, "max_positions": 12, "dropout": 0.0}
SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD]])
LENGTHS = ((4, 5), (3, 3), (2, 1))
both_ways = pytest.mark.parametrize("feeding", [False, True], ids=["parallel", "input-feeding"])


def build(feeding=False, seed=0, **switches):
    torch.manual_seed(seed)
    model = Seq2Seq(LSTMArchitecture(**{**SMALL, "input_feeding": feeding, **switches}), 20, 20)
    for parameter in model.parameters():  # biases away from 0, all of it away from the linear range
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double().eval()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@both_ways
@pytest.mark.parametrize("layers", [(1, 2), (2, 2), (3, 1)])
def test_logits_are_those_of_the_reference(feeding, layers):
    model = build(feeding, encoder_layers=layers[0], decoder_layers=layers[1])
    inputs = shift_right(TARGET)
    got = model(SOURCE, inputs)
    for b, (s, n) in enumerate(LENGTHS):
        close(got[b, :n], luong(model, SOURCE[b, :s], inputs[b, :n]))


@both_ways
def test_the_cached_step_equals_the_full_pass(feeding):
    model = build(feeding)
    inputs = shift_right(TARGET)
    full = model(SOURCE, inputs)
    cache = model.start_cache(model.encode(SOURCE))
    for t in range(inputs.shape[1]):
        close(model.step(inputs[:, t], cache), full[:, t])


@both_ways
@pytest.mark.parametrize("keep", [[2, 0], [1, 1, 0, 2]])
def test_a_reordered_cache_continues_the_chosen_rows(feeding, keep):
    model = build(feeding)
    inputs, keep = shift_right(TARGET), torch.tensor(keep)
    cache = model.start_cache(model.encode(SOURCE))
    for t in range(2):
        model.step(inputs[:, t], cache)
    cache.reorder(keep)
    close(model.step(inputs[keep, 2], cache), model(SOURCE, inputs)[keep, 2])


@both_ways
def test_a_reordering_within_sentences_moves_the_histories_only(feeding):
    model = build(feeding)
    rows = torch.tensor([0, 0, 1, 1])
    histories = torch.tensor([[EOS, 6], [EOS, 7], [EOS, 8], [EOS, 9]])
    cache = model.start_cache(model.encode(SOURCE).select(rows))
    for t in range(2):
        model.step(histories[:, t], cache)
    swap, last = torch.tensor([1, 0, 2, 2]), torch.tensor([12, 13, 14, 15])
    cache.reorder(swap, same_sentences=True)
    whole = torch.cat([histories[swap], last[:, None]], dim=1)
    close(model.step(last, cache), model(SOURCE[rows], whole)[:, 2])


@both_ways
def test_padding_changes_nothing(feeding):
    model = build(feeding)
    wider = F.pad(SOURCE, (0, 3), value=PAD)
    together = model(wider, shift_right(F.pad(TARGET, (0, 2), value=PAD)))
    for b, (s, n) in enumerate(LENGTHS):
        alone = model(SOURCE[b : b + 1, :s], shift_right(TARGET[b : b + 1, :n]))
        close(together[b, :n], alone[0])


def test_a_position_sees_nothing_behind_it():
    model, changed = build(), TARGET.clone()
    changed[0, 3] = 13
    same = (model(SOURCE, changed) == model(SOURCE, TARGET)).all(-1)[0]
    assert same.tolist() == [True, True, True, False, False]


@both_ways
def test_gradients_reach_relaxed_inputs_of_a_frozen_network_and_are_right(feeding):
    model = freeze(build(feeding))
    memory = model.encode(SOURCE)
    embedded = model.embed(shift_right(TARGET)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.forward_embedded(memory, x), embedded)
    close(model.forward_embedded(memory, embedded), model.decode(memory, shift_right(TARGET)))


def test_layers_stay_in_training_mode_and_dropout_does_not():
    """cuDNN refuses the backward pass of an RNN in eval mode; a copy and a loaded model are no exceptions."""
    model = copy.deepcopy(build(dropout=0.5).train().eval())
    layers = [module for module in model.modules() if isinstance(module, torch.nn.LSTM)]
    assert len(layers) == 4
    assert all(layer.training and layer.dropout == 0 for layer in layers)
    assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    model.train()
    assert not torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_in_every_place_it_should_be(training, monkeypatch):
    calls = []
    for module in ("lstm", "recurrent"):
        monkeypatch.setattr(
            f"engine_fast.models.{module}.dropout", lambda x, p, on: calls.append((p, on, x.shape[-1])) or x
        )
    build(dropout=0.25).train(training)(SOURCE, TARGET)
    on = [width for p, mode, width in calls if p == 0.25 and mode is training]
    assert on == [6, 10, 6, 7, 7]  # source, between encoder layers, target, between decoder layers, attentional vectors


@both_ways
@pytest.mark.parametrize("o2", ["SX", "STL", "SG", "ST", "GX"])
@pytest.mark.parametrize("o1", ["SX", "STL", "SG", "ST", "GX"])
def test_certain_words_have_the_discrete_energy(feeding, o1, o2):
    model = freeze(build(feeding))
    z = 400.0 * F.one_hot(TARGET[inner_positions(TARGET)], 20).double()
    close(
        relaxed_energy(model, model.encode(SOURCE), z, TARGET, Relaxation(o1, o2)),
        discrete_energy(model, SOURCE, TARGET),
    )


@both_ways
@pytest.mark.parametrize(("o1", "o2"), [("SX", "ST"), ("ST", "SX"), ("SG", "STL"), ("GX", "GX"), ("STL", "SG")])
def test_relaxed_energies_and_gradients_are_those_of_the_definition(feeding, o1, o2):
    """Sentence by sentence: O1 times the table into the decoder, then -O2(z)' log p of the reference operators."""
    model = freeze(build(feeding))
    generator = torch.Generator().manual_seed(3)
    z, *noise = (torch.randn(6, 20, dtype=torch.float64, generator=generator) for _ in range(3))
    z.requires_grad_()
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    got = relaxed_energy(model, model.encode(SOURCE), z, TARGET, Relaxation(o1, o2), noise=tuple(noise))
    (got_gradient,) = torch.autograd.grad((got * weights).sum(), z)

    energies, first = [], 0
    with ops.using("reference"):
        for b, (s, n) in enumerate(LENGTHS):
            rows = slice(first, first := first + n - 1)
            start = model.decoder.embedding.weight[EOS][None]
            inputs = ops.soft_embedding(z[rows], model.decoder.embedding.weight, o1, noise=noise[0][rows])
            memory = model.encode(SOURCE[b : b + 1, :s])
            hidden = model.forward_embedded(memory, torch.cat([start, inputs])[None])[0]
            scores = hidden @ model.output.weight.t()
            words = ops.energy(z[rows], scores[:-1], o2, noise=noise[1][rows]).sum()
            energies.append(words - scores[-1].log_softmax(-1)[EOS])
    expected = torch.stack(energies)
    close(got, expected)
    close(got_gradient, torch.autograd.grad((expected * weights).sum(), z)[0])


@both_ways
def test_searching_a_batch_is_searching_one_by_one(feeding):
    model = build(feeding)
    alone = [beam_search(model, SOURCE[b : b + 1, :s], beam=3, n_best=3)[0] for b, (s, _) in enumerate(LENGTHS)]
    for together, single in zip(beam_search(model, SOURCE, beam=3, n_best=3), alone, strict=True):
        assert [h.tokens for h in together] == [h.tokens for h in single]
        assert [h.score for h in together] == pytest.approx([h.score for h in single], rel=1e-10)
    best = greedy(model, SOURCE)
    for b, (hypothesis, (s, _)) in enumerate(zip(best, LENGTHS, strict=True)):
        target = torch.tensor([hypothesis.tokens])
        energy = discrete_energy(model, SOURCE[b : b + 1, :s], target)
        assert hypothesis.log_probability == pytest.approx(-energy.item(), rel=1e-10)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_agree_and_pass_gradients(feeding, dtype):
    exact = freeze(build(feeding))
    model = freeze(build(feeding), dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    results = []
    for network in (exact, model):
        embedded = network.embed(shift_right(TARGET)).requires_grad_()
        logits = network.project(network.forward_embedded(network.encode(SOURCE), embedded))
        logits[TARGET != PAD].square().sum().backward()
        results.append((logits.double()[TARGET != PAD], embedded.grad.double()))
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm()


@both_ways
def test_activation_checkpointing_gives_the_same_gradients(feeding):
    gradients = []
    for on in (False, True):
        model = build(feeding, dropout=0.3).train()
        model.activation_checkpointing = on
        assert model.activation_checkpointing is on
        torch.manual_seed(1)
        model(SOURCE, TARGET).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@both_ways
def test_a_directory_gives_back_the_model(tmp_path, feeding):
    source, target = DictionaryVocabulary(["a", "b"]), DictionaryVocabulary(["x", "y", "z"])
    model = Seq2Seq(LSTMArchitecture(**{**SMALL, "input_feeding": feeding}), len(source), len(target))
    save_model(tmp_path / "model", model, source, target)
    for kind in (None, "lstm", "teacher"):
        loaded = load_model(tmp_path / "model", kind=kind).model
        assert type(loaded) is Seq2Seq
        assert loaded.architecture == model.architecture
        ids = torch.tensor([[5, 6, EOS]])
        assert torch.equal(loaded(ids, ids), model.eval()(ids, ids))


def test_a_sentence_beyond_the_positions_is_refused():
    model, long = build(max_positions=4), torch.full((1, 5), 7)
    memory = model.encode(SOURCE)
    with pytest.raises(DataError, match=r"5 tokens.*max_positions = 4"):
        model.encode(long)
    with pytest.raises(DataError, match=r"5 tokens.*max_positions = 4"):
        model.decode(memory, long)
    cache = model.start_cache(memory)
    for _ in range(4):
        model.step(SOURCE[:, 0], cache)
    with pytest.raises(DataError, match=r"5 tokens.*max_positions = 4"):
        model.step(SOURCE[:, 0], cache)


def test_compiling_is_refused():
    with pytest.raises(ConfigError, match=r"compile = true with architecture.kind = 'lstm'.*teacher_compile"):
        build().compile_stacks()
