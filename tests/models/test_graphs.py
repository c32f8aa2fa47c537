"""Stacks that replay what they recorded: the same results, whatever was there before, from few recordings."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_fast.config import Architecture, TaggerArchitecture
from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding import generate, mask_predict_n_best
from engine_fast.energies import discrete_energy
from engine_fast.errors import ConfigError, DataError
from engine_fast.models import CMLM, Memory, Network, Precision, Tagger, Transformer, set_precision, use_cuda_graphs
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


def decoded(network: Network, source: Tensor, **how: Any) -> tuple[list[list[list[int]]], Tensor]:
    """Tokens and scores of all candidates."""
    found = mask_predict_n_best(network, source, length_beam=3, **how)
    scores = [h.score for each in found for h in each]
    return [[h.tokens for h in each] for each in found], torch.tensor(scores)


def assert_same(network: Network, plain: Network, source: Tensor, **how: Any) -> None:
    (tokens, scores), (expected, wanted) = (decoded(each, source, **how) for each in (network, plain))
    assert tokens == expected
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("iterations", [1, 4])
def test_a_student_decodes_as_before(device: str, norm: str, iterations: int) -> None:
    """Large and small batches in turns, so that buffers hold what other sentences left."""
    plain = make(CMLM, device, norm=norm)
    recorded, recorder = graphed(plain, device)
    for seed, (rows, length) in enumerate([(5, 20), (1, 3), (3, 17), (1, 9), (5, 19), (2, 21)] * 3):
        assert_same(recorded, plain, sources(rows, length, seed % 7).to(device), iterations=iterations)
    assert device == "cuda" or recorder.replayed > 2 * 6 * iterations


@pytest.mark.parametrize("device", DEVICES)
def test_a_teacher_judges_and_searches_as_before(device: str) -> None:
    plain = make(Transformer, device)
    recorded, recorder = graphed(plain, device)
    source, target = sources(3, 12, 1).to(device), sources(6, 9, 2).to(device)
    for _ in range(2):
        with torch.no_grad():
            energies = [discrete_energy(network, source, target) for network in (recorded, plain)]
        torch.testing.assert_close(*energies)
        found = [[hypotheses[0].tokens for hypotheses in generate(network, source)] for network in (recorded, plain)]
        assert found[0] == found[1]
    # The search goes step by step, so that of its parts the encoder alone is replayed.
    assert device == "cuda" or recorder.replayed == 1 + 3


def test_a_shape_is_recorded_when_it_comes_again_and_shapes_nearby_share() -> None:
    network, recorder = graphed(make(CMLM))
    with torch.no_grad():
        for rows, length, recorded, replayed in [
            (1, 9, 0, 0), (1, 16, 1, 1), (1, 10, 1, 2), (5, 12, 1, 2), (6, 12, 2, 3), (2, 17, 2, 3),
            (2, 21, 3, 4),  # 17 and 21 would be rounded to 24, but there are 21 positions
        ]:  # fmt: skip
            network.encode(sources(rows, length, 0))
            assert (recorder.recorded, recorder.replayed) == (recorded, replayed), (rows, length)


def test_what_was_not_finite_does_not_stay() -> None:
    plain = make(CMLM)
    network, recorder = graphed(plain)
    tokens, source = torch.full((1, 6), 4), sources(1, 6, 3)
    with torch.no_grad():
        memory, _ = plain.encode(source)
        broken = Memory(torch.full((1, 8, 32), float("nan")), torch.ones(1, 8, dtype=torch.bool))
        for _ in range(2):
            network.decode(broken, tokens)
        torch.testing.assert_close(network.decode(memory, tokens), plain.decode(memory, tokens))
    assert recorder.replayed == 2


def test_an_output_outlives_the_next_call() -> None:
    network, recorder = graphed(make(CMLM))
    with torch.no_grad():
        for seed in range(4):
            memory, _ = network.encode(sources(1, 8, seed))
            states, hidden = memory.states.clone(), network.decode(memory, torch.full((1, 6), 4))
            kept = hidden.clone()
            other, _ = network.encode(sources(1, 8, seed + 10))
            network.decode(other, torch.full((1, 6), 4))
            assert torch.equal(memory.states, states)
            assert torch.equal(hidden, kept)
    assert recorder.replayed == 14


def test_what_comes_when_all_places_are_taken_is_not_recorded() -> None:
    graphs = Graphs(Recorder(), max_graphs=2)
    worth = []
    for key in (1, 2, 1, 3, 2, 3, 3, 1):
        worth.append(graphs.worth(key))
        if worth[-1]:
            (doubled,) = graphs.run(key, lambda: (torch.zeros(1),), lambda x, key=key: x.fill_(key), lambda x: (2 * x,))
            assert doubled.item() == 2 * key
    assert worth == [False, False, True, False, True, False, False, True]


def test_a_recording_that_fails_leaves_nothing() -> None:
    recorder, failures = Recorder(), iter([True, False])

    def record(function: Callable[[], tuple[Tensor, ...]]) -> Any:
        if next(failures):
            raise RuntimeError("out of memory")
        return recorder(function)

    plain = make(CMLM)
    network, source = use_cuda_graphs(copy.deepcopy(plain), record=record), sources(2, 8, 0)
    with torch.no_grad():
        network.encode(source)
        with pytest.raises(RuntimeError, match="out of memory"):
            network.encode(source)
        torch.testing.assert_close(network.encode(source)[1], plain.encode(source)[1])  # as before, from now on
        for _ in range(2):
            network.encode(sources(3, 8, 0))  # another shape
    assert recorder.replayed == 1


def test_buffers_made_in_inference_mode_serve_outside_of_it() -> None:
    network, recorder = graphed(make(CMLM))
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad):
        with mode():
            network.encode(sources(1, 8, 0))
    assert recorder.replayed == 2


def test_networks_record_one_at_a_time() -> None:
    """As two models of a service do, each in a thread of its own."""
    inside, most, lock = [0], [0], threading.Lock()

    class Watched(Recorder):
        def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> Any:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            found = super().__call__(function)
            with lock:
                inside[0] -= 1
            return found

    plain = make(CMLM)
    networks = [use_cuda_graphs(copy.deepcopy(plain), record=Watched()) for _ in range(3)]
    source = sources(2, 9, 0)
    wanted = decoded(plain, source)[0]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for tokens, _ in pool.map(decoded, networks, [source] * 3):
                assert tokens == wanted
    assert most[0] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_outlive_those_of_another_network(precision: Precision) -> None:
    """A dropped network must take along no memory that the other's graphs point to."""
    plain = set_precision(make(CMLM, "cuda"), precision)
    networks = [use_cuda_graphs(copy.deepcopy(plain)) for _ in range(2)]
    batches = [sources(rows, length, 0).cuda() for rows, length in [(1, 9), (3, 20), (5, 12)]]
    with torch.no_grad():
        wanted = [plain.encode(source)[1] for source in batches]
        while networks:
            for _ in range(3):
                for source, logits in zip(batches, wanted, strict=True):
                    for network in networks:
                        torch.testing.assert_close(network.encode(source)[1], logits)
            del network
            networks.pop()
            torch.cuda.empty_cache()
            torch.empty(1 << 26, device="cuda").fill_(float("nan"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_recording_goes_on_after_one_that_failed() -> None:
    network = use_cuda_graphs(make(CMLM, "cuda"))
    plain, source = make(CMLM, "cuda"), sources(2, 9, 0).cuda()
    stream = torch.cuda.current_stream()
    with torch.no_grad():
        network.encode(source)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network.encoder.layers[1], "forward", lambda x, mask: x * x.sum().item())  # a synchronisation
            with pytest.raises(RuntimeError):
                network.encode(source)
        assert torch.cuda.current_stream() == stream
        for _ in range(2):
            torch.testing.assert_close(network.encode(source)[1], plain.encode(source)[1])


def test_nothing_keeps_a_network_that_is_dropped() -> None:
    def record(function: Callable[[], tuple[Tensor, ...]]) -> Any:
        outputs = function()
        return (lambda: None), outputs  # a graph, which keeps no function

    network = use_cuda_graphs(make(CMLM), record=record)
    with torch.no_grad():
        for _ in range(3):
            network.encode(sources(1, 8, 0))
    gone = weakref.ref(network.encoder)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()


def test_gradients_training_and_large_batches_run_as_before() -> None:
    network, recorder = graphed(make(CMLM, max_positions=64))
    network.requires_grad_(True)
    for _ in range(2):
        memory, _ = network.encode(sources(2, 8, 0))
        assert memory.states.requires_grad
    with torch.no_grad():
        for rows, recorded in ((MAX_POSITIONS // 64 + 1, 0), (MAX_POSITIONS // 64, 1)):
            network.train()
            for _ in range(2):
                network.encode(sources(rows, 64, 0))
            network.eval()
            for _ in range(2):
                memory, _ = network.encode(sources(rows, 64, 0))
            assert recorder.recorded == recorded
        long = Memory(memory.states.repeat(2, 1, 1), memory.mask.repeat(2, 1))  # few slots, but many keys
        for _ in range(2):
            network.decode(long, torch.full((2 * rows, 4), 4))
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
    with pytest.raises(ConfigError, match="for a network that has them, expected once"):
        use_cuda_graphs(graphed(make(CMLM))[0])
