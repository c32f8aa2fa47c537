"""CUDA graphs: a transformer's two stacks recorded once for each of a few shapes, then replayed with one launch.

A sentence alone keeps a GPU waiting: every small kernel costs more to launch than to run. A recorded graph launches
them together, but only for the shape, and the memory, that it was recorded with. So inputs are copied into buffers of a
slightly larger shape and the outputs cut back; what is added is masked, and changes rounding only.

B sentences, K rows for each of them, S source positions, T target positions, D width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from engine_fast.data.symbols import EOS, PAD
from engine_fast.errors import ConfigError
from engine_fast.models.protocols import Network
from engine_fast.models.stacks import Decoder, Encoder, EncoderDecoder, Memory

Replay = Callable[[], None]
Record = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Replay, tuple[Tensor, ...]]]
"""function -> (what computes it again from the same input buffers, the buffers that then hold its outputs)."""
AnyNetwork = TypeVar("AnyNetwork", bound=Network)

MAX_GRAPHS = 64
"""Of one network; the one that was not used for the longest time goes first."""
MAX_POSITIONS = 2048
"""Rows times positions beyond which nothing is recorded: kernels, not launches, should then take the time."""
_LENGTH_STEP = 8
_WARM_UPS = 3
"""Calls before recording, in which libraries choose their kernels and get their workspaces."""


def use_cuda_graphs(network: AnyNetwork, *, record: Record | None = None) -> AnyNetwork:
    """The network, in place, whose encoder and decoder replay CUDA graphs where no gradient is wanted.

    For decoding: after this its weights must stay where they are, so it comes after set_precision(). Calls in training
    mode, with gradients, or with more than MAX_POSITIONS positions run as before. Calls of several threads wait for
    each other. record: how a function is recorded; default, by torch.cuda.graph on the network's GPU.
    Raises: ConfigError for a network that is not a transformer of ours, or not on a GPU.
    """
    if not isinstance(network, EncoderDecoder):
        raise ConfigError(f"cuda_graphs = True with a {network.kind} model, expected false: only transformers can.")
    device = next(network.parameters()).device
    if record is None:
        if device.type != "cuda":
            raise ConfigError(f"cuda_graphs = True on {device}, expected a GPU. Leave it out.")
        record = _CudaRecorder(device)
    graphs = Graphs(record)
    encoder, decoder = network.encoder, network.decoder
    encoder.forward = partial(_encode, encoder.forward, graphs, encoder)  # type: ignore[method-assign]
    decoder.forward = partial(_decode, decoder.forward, graphs, decoder)  # type: ignore[method-assign]
    return network


class Graphs:
    """The recorded functions of a network by shape, with the buffers that they read and write."""

    def __init__(self, record: Record, *, max_graphs: int = MAX_GRAPHS) -> None:
        self._record, self._max_graphs = record, max_graphs
        self._kept: OrderedDict[Hashable, tuple[tuple[Tensor, ...], Replay, tuple[Tensor, ...]]] = OrderedDict()
        self.lock = threading.Lock()
        """Held from filling the buffers until the outputs are copied."""

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        key: Hashable,
        make: Callable[[], tuple[Tensor, ...]],
        fill: Callable[..., None],
        function: Callable[..., tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """function(*buffers) after fill(*buffers); make() gives the buffers of a new `key`. The outputs are buffers."""
        if key not in self._kept:
            buffers = make()
            fill(*buffers)
            self._kept[key] = buffers, *self._record(lambda: function(*buffers))
            if len(self._kept) > self._max_graphs:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        buffers, replay, outputs = self._kept[key]
        fill(*buffers)
        replay()
        return outputs


class _CudaRecorder:
    """Graphs of one GPU in one memory pool: they are replayed one after another, and their outputs stay referenced."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, such as a server's, may go on using the GPU meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = function()
        return graph.replay, outputs


def rounded_count(count: int) -> int:
    """The least 2^i or 3 * 2^i that is at least `count`: at most half of the rows are added."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def rounded_length(length: int) -> int:
    """The next multiple of _LENGTH_STEP."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _encode(
    forward: Callable[..., Memory], graphs: Graphs, stack: Encoder, source_BS: Tensor, prefix_D: Tensor | None = None
) -> Memory:
    """Encoder.forward. An added sentence is EOS alone."""
    (rows, length), limit = source_BS.shape, stack.config.max_positions
    if length > limit or _runs_as_before(stack, rows * length):
        return forward(source_BS, prefix_D)
    shape = rounded_count(rows), min(rounded_length(length), limit)

    def fill(buffer_BS: Tensor) -> None:
        buffer_BS.fill_(PAD)
        buffer_BS[rows:, 0] = EOS
        buffer_BS[:rows, :length] = source_BS

    def function(buffer_BS: Tensor) -> tuple[Tensor, ...]:
        memory = forward(buffer_BS, prefix_D)
        return memory.states, memory.mask

    has_prefix = prefix_D is not None
    with graphs.lock:
        states, mask = graphs.run(("encoder", shape, has_prefix), lambda: (source_BS.new_empty(shape),), fill, function)
        end = length + has_prefix
        return Memory(states[:rows, :end].clone(), mask[:rows, :end].clone())


def _decode(
    forward: Callable[..., Tensor],
    graphs: Graphs,
    stack: Decoder,
    memory: Memory,
    embedded_NTD: Tensor,
    target_mask_NT: Tensor | None = None,
) -> Tensor:
    """Decoder.forward. Added rows and positions are zero; an added row sees its first."""
    (rows, length, width), limit = embedded_NTD.shape, stack.config.max_positions
    if length > limit or _runs_as_before(stack, rows * length):
        return forward(memory, embedded_NTD, target_mask_NT)
    sentences, source_length = memory.mask.shape
    all_sentences, all_source = rounded_count(sentences), rounded_length(source_length)
    all_rows, all_length = all_sentences * (rows // sentences), min(rounded_length(length), limit)
    ahead = [x for pair in memory.keys_values for x in pair]
    # With keys and values nothing reads the states, which here have one head.
    given, causal, is_ahead = ahead or [memory.states[:, None]], target_mask_NT is None, bool(ahead)

    def make() -> tuple[Tensor, ...]:
        sources = (x.new_empty(all_sentences, x.shape[1], all_source, x.shape[3]) for x in given)
        masks = (all_rows, all_length), (all_sentences, all_source)
        made = (memory.mask.new_empty(shape) for shape in masks)
        return embedded_NTD.new_empty(all_rows, all_length, width), *made, *sources

    def fill(embedded: Tensor, target_mask: Tensor, source_mask: Tensor, *sources: Tensor) -> None:
        # All of it: a zero weight times what an earlier call left there is not zero if that was not finite.
        torch._foreach_zero_([embedded, *sources])
        target_mask.zero_()
        source_mask.zero_()
        target_mask[rows:, 0] = source_mask[sentences:, 0] = True
        embedded[:rows, :length] = embedded_NTD
        source_mask[:sentences, :source_length] = memory.mask
        if target_mask_NT is not None:
            target_mask[:rows, :length] = target_mask_NT
        torch._foreach_copy_([buffer[:sentences, :, :source_length] for buffer in sources], given)

    def function(embedded: Tensor, target_mask: Tensor, source_mask: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        keys_values = tuple(zip(sources[::2], sources[1::2], strict=True)) if is_ahead else ()
        states = sources[0] if is_ahead else sources[0][:, 0]
        return (forward(Memory(states, source_mask, keys_values), embedded, None if causal else target_mask),)

    key = "decoder", all_rows, all_length, all_sentences, all_source, causal, is_ahead
    with graphs.lock:
        (hidden,) = graphs.run(key, make, fill, function)
        return hidden[:rows, :length].clone()


def _runs_as_before(stack: Encoder | Decoder, positions: int) -> bool:
    return stack.training or torch.is_grad_enabled() or positions > MAX_POSITIONS or not positions
