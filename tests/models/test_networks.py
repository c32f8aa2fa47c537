"""Transformer and CMLM: masks, caches, positions, tying, checkpointing."""

import itertools

import pytest
import torch

from engine_fast.config import Architecture
from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.errors import DataError
from engine_fast.models import CMLM, Transformer, freeze, shift_right
from engine_fast.models.dropout import dropout
from engine_fast.models.layers import sinusoidal_table

SMALL = {"width": 16, "ffn_width": 24, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "max_positions": 12}


def build(kind=Transformer, seed=0, **switches):
    torch.manual_seed(seed)
    model = kind(Architecture(**{**SMALL, "dropout": 0.0, **switches}), 20, 20)
    for name, parameter in model.named_parameters():  # biases and norms away from their neutral values
        if parameter.ndim < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
        if "length_embedding" in name:
            parameter.data.normal_()
    return model.double().eval()


SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD]])
SWITCHES = [
    dict(zip(("norm", "positions", "activation", "tie", "scale_embedding"), values, strict=True))
    for values in itertools.product(
        ("post", "pre"), ("sinusoidal", "learned"), ("relu",), ("all", "none"), (True, False)
    )
] + [{"activation": "gelu", "tie": "decoder"}]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_cached_step_equals_the_full_pass(switches):
    model = build(**switches)
    inputs = shift_right(TARGET)
    full = model(SOURCE, inputs)
    cache = model.start_cache(model.encode(SOURCE))
    for t in range(inputs.shape[1]):
        step = model.step(inputs[:, t], cache)
        torch.testing.assert_close(step, full[:, t], rtol=1e-10, atol=1e-10)


def test_a_reordered_cache_continues_the_chosen_rows():
    model = build()
    inputs = shift_right(TARGET)
    keep = torch.tensor([2, 0])
    cache = model.start_cache(model.encode(SOURCE))
    for t in range(2):
        model.step(inputs[:, t], cache)
    cache.reorder(keep)
    got = model.step(inputs[keep, 2], cache)
    torch.testing.assert_close(got, model(SOURCE, inputs)[keep, 2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_padding_changes_nothing_for_a_teacher(switches):
    model = build(**switches)
    together = model(SOURCE, shift_right(TARGET))
    alone = model(SOURCE[1:2, :3], shift_right(TARGET[1:2, :3]))
    torch.testing.assert_close(together[1, :3], alone[0], rtol=1e-10, atol=1e-10)


def test_padding_changes_nothing_for_a_cmlm():
    model = build(CMLM, positions="learned", activation="gelu", init="normal")
    tokens = TARGET.masked_fill(TARGET != PAD, MASK)

    def run(source, tokens):
        memory, lengths = model.encode(source)
        return model.decode(memory, tokens), lengths

    together, lengths = run(SOURCE, tokens)
    alone, alone_lengths = run(SOURCE[1:2, :3], tokens[1:2, :3])
    torch.testing.assert_close(together[1, :3], alone[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lengths[1], alone_lengths[0], rtol=1e-10, atol=1e-10)


def test_a_teacher_is_causal_and_a_cmlm_is_not():
    changed = TARGET.clone()
    changed[0, 3] = 13
    teacher, student = build(), build(CMLM)
    same = (teacher(SOURCE, changed) == teacher(SOURCE, TARGET)).all(-1)[0]
    assert same.tolist() == [True, True, True, False, False]
    memory, _ = student.encode(SOURCE)
    assert (student.decode(memory, changed) != student.decode(memory, TARGET)).any(-1)[0].all()


def test_forward_embedded_of_table_rows_is_the_ordinary_pass():
    model = build()
    memory = model.encode(SOURCE)
    inputs = shift_right(TARGET)
    torch.testing.assert_close(
        model.forward_embedded(memory, model.embedding_table[inputs]), model.decode(memory, inputs)
    )


def test_length_class_zero_is_impossible_and_the_rest_sum_to_one():
    log_p = build(CMLM).lengths(SOURCE)
    assert log_p.shape == (3, 12)
    assert log_p[:, 0].eq(-torch.inf).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("tie", "tables"), [("all", 1), ("decoder", 2), ("none", 3)])
def test_tying_shares_the_tables_it_names(tie, tables):
    model = build(tie=tie)
    weights = (model.encoder.embedding.weight, model.decoder.embedding.weight, model.output.weight)
    assert len({w.data_ptr() for w in weights}) == tables


def test_tying_all_needs_one_vocabulary():
    with pytest.raises(DataError, match="joint: true"):
        Transformer(Architecture(**SMALL, tie="all"), 20, 21)


def test_sinusoidal_table_first_row_has_angle_two():
    table = sinusoidal_table(3, 8)
    torch.testing.assert_close(table[0, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(table[2, 7], torch.tensor(4.0 / 10000).cos())


@pytest.mark.parametrize("kind", [Transformer, CMLM])
def test_activation_checkpointing_gives_the_same_gradients(kind):
    gradients = []
    for on in (False, True):
        model = build(kind, dropout=0.3).train()
        model.activation_checkpointing = on
        torch.manual_seed(1)
        encoded = model.encode(SOURCE)
        model.decode(encoded if kind is Transformer else encoded[0], TARGET).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bfloat16_attention_agrees_with_and_without_a_graph():
    model = build().bfloat16()
    with torch.no_grad():
        fused = model(SOURCE, shift_right(TARGET))
    torch.testing.assert_close(model(SOURCE, shift_right(TARGET)), fused, rtol=0.05, atol=0.05)


def test_a_sentence_beyond_the_positions_is_refused():
    with pytest.raises(DataError, match=r"13 tokens.*max_positions = 12"):
        build().encode(torch.full((1, 13), 7))


def test_freeze_stops_weight_gradients_and_dropout():
    model = freeze(build(dropout=0.5).train(), dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.embedding_table.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_share_and_the_mean(dtype):
    torch.manual_seed(2)
    x = torch.ones(301, 1001, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.3, True)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert y.float().mean().item() == pytest.approx(1.0, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the same mask and scale in both directions
    assert dropout(x, 0.3, False) is x
    assert dropout(x, 0.0, True) is x


def test_dropout_follows_the_seed_and_columns_are_independent():
    def draw(seed):
        torch.manual_seed(seed)
        return dropout(torch.ones(2000, 8), 0.5, True)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert (torch.corrcoef(draw(1).T) - torch.eye(8)).abs().max() < 0.1
