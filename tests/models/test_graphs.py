"""Stacks that replay what they recorded: the same results, whatever was there before, from few recordings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_fast.config import Architecture, TaggerArchitecture
from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding import generate, mask_predict_n_best
from engine_fast.energies import discrete_energy
from engine_fast.errors import ConfigError, DataError
from engine_fast.models import CMLM, Memory, Network, Tagger, Transformer, set_precision, use_cuda_graphs
from engine_fast.models.graphs import MAX_POSITIONS, Graphs, rounded_count, rounded_length

SHAPE = {"width": 32, "ffn_width": 48, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "max_positions": 21}
VOCABULARY = 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


class Recorder:
    """What a CUDA graph is, on a CPU: it knows its buffers alone, and leaves its outputs where they were."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.recorded += 1
        outputs = tuple(x.clone() for x in function())

        def replay() -> None:
            self.replayed += 1
            for output, x in zip(outputs, function(), strict=True):
                output.copy_(x)

        for output in outputs:  # a recording computes nothing
            output.fill_(float("nan") if output.is_floating_point() else 0)
        return replay, outputs


def make(kind: type[CMLM] | type[Transformer], device: str = "cpu", **changes: Any) -> CMLM | Transformer:
    torch.manual_seed(5)
    return set_precision(kind(Architecture(**{**SHAPE, **changes}), VOCABULARY, VOCABULARY).eval().to(device), "fp32")


def graphed(network: Network, device: str = "cpu") -> tuple[Any, Recorder]:
    recorder = Recorder()
    return use_cuda_graphs(copy.deepcopy(network), record=recorder if device == "cpu" else None), recorder


def sources(rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) ids of sentences of 2 to `length` tokens, one of them that long."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=draw)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=draw)
    lengths[0] = length
    slots = torch.arange(length)
    return ids.masked_fill(slots == lengths - 1, EOS).masked_fill(slots >= lengths, PAD)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("iterations", [1, 4])
def test_a_student_decodes_as_before(device: str, norm: str, iterations: int) -> None:
    """Large and small batches in turns, so that buffers hold what other sentences left."""
    plain = make(CMLM, device, norm=norm)
    recorded, recorder = graphed(plain, device)
    for seed, (rows, length) in enumerate([(5, 20), (1, 3), (3, 17), (1, 9), (5, 19), (2, 21)]):
        source = sources(rows, length, seed).to(device)
        wanted = mask_predict_n_best(plain, source, iterations=iterations, length_beam=3)
        found = mask_predict_n_best(recorded, source, iterations=iterations, length_beam=3)
        assert [[h.tokens for h in each] for each in found] == [[h.tokens for h in each] for each in wanted]
        scores = [torch.tensor([h.score for each in every for h in each]) for every in (found, wanted)]
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    if device == "cpu":
        assert recorder.replayed == 6 * (1 + iterations)


@pytest.mark.parametrize("device", DEVICES)
def test_a_teacher_judges_and_searches_as_before(device: str) -> None:
    plain = make(Transformer, device)
    recorded, recorder = graphed(plain, device)
    source, target = sources(3, 12, 1).to(device), sources(6, 9, 2).to(device)
    with torch.no_grad():
        energies = [discrete_energy(network, source, target) for network in (recorded, plain)]
    torch.testing.assert_close(*energies)
    ways = [[found[0].tokens for found in generate(network, source)] for network in (recorded, plain)]
    assert ways[0] == ways[1]
    assert device == "cuda" or recorder.replayed == 3  # the search goes step by step, its encoder alone is recorded


def test_shapes_nearby_share_a_recording() -> None:
    network, recorder = graphed(make(CMLM))
    with torch.no_grad():
        for rows, length in [(1, 9), (1, 16), (1, 10)]:
            network.encode(sources(rows, length, 0))
        assert (recorder.recorded, recorder.replayed) == (1, 3)
        for rows in (5, 6):
            network.encode(sources(rows, 12, 0))
        assert recorder.recorded == 2
        network.encode(sources(2, 21, 0))  # rounded to 24, there are but 21 positions
        assert recorder.recorded == 3


def test_what_was_not_finite_does_not_stay() -> None:
    plain = make(CMLM)
    network, _ = graphed(plain)
    tokens, source = torch.full((1, 6), 4), sources(1, 6, 3)
    with torch.no_grad():
        memory, _ = plain.encode(source)
        network.decode(Memory(torch.full((1, 8, 32), float("nan")), torch.ones(1, 8, dtype=torch.bool)), tokens)
        torch.testing.assert_close(network.decode(memory, tokens), plain.decode(memory, tokens))


def test_an_output_outlives_the_next_call() -> None:
    network, _ = graphed(make(CMLM))
    with torch.no_grad():
        memory, _ = network.encode(sources(1, 8, 0))
        states, hidden = memory.states.clone(), network.decode(memory, torch.full((1, 6), 4))
        kept = hidden.clone()
        other, _ = network.encode(sources(1, 8, 1))
        network.decode(other, torch.full((1, 6), 4))
    assert torch.equal(memory.states, states)
    assert torch.equal(hidden, kept)


def test_the_oldest_recording_goes() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder, max_graphs=2)

    def double(key: int) -> float:
        made = graphs.run(key, lambda: (torch.zeros(1),), lambda x: x.fill_(key), lambda x: (2 * x,))
        return made[0].item()

    assert [double(key) for key in (1, 2, 1, 3, 1, 2)] == [2, 4, 2, 6, 2, 4]
    assert len(graphs) == 2
    assert recorder.recorded == 4  # the 2 was gone


def test_gradients_training_and_large_batches_run_as_before() -> None:
    network, recorder = graphed(make(CMLM, max_positions=64))
    network.requires_grad_(True)
    memory, _ = network.encode(sources(2, 8, 0))
    assert memory.states.requires_grad
    with torch.no_grad():
        network.train()
        network.encode(sources(2, 8, 0))
        network.eval()
        network.encode(sources(MAX_POSITIONS // 64 + 1, 64, 0))
        assert recorder.recorded == 0
        network.encode(sources(MAX_POSITIONS // 64, 64, 0))
        assert recorder.recorded == 1


def test_too_many_positions_are_still_refused() -> None:
    network, _ = graphed(make(CMLM))
    with torch.no_grad(), pytest.raises(DataError, match="max_positions = 21"):
        network.encode(sources(1, 22, 0))


def test_roundings() -> None:
    assert [rounded_count(n) for n in (1, 2, 3, 4, 5, 7, 9, 12, 13, 25)] == [1, 2, 3, 4, 6, 8, 12, 12, 16, 32]
    assert [rounded_length(n) for n in (1, 8, 9)] == [8, 8, 16]


def test_what_cannot_be_recorded_is_said() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs = True on cpu, expected a GPU"):
        use_cuda_graphs(make(CMLM))
    tagger = Tagger(TaggerArchitecture(embedding_width=8, width=8), VOCABULARY, VOCABULARY)
    with pytest.raises(ConfigError, match="cuda_graphs = True with a tagger model"):
        use_cuda_graphs(tagger)
