"""CUDA graphs: a transformer's two stacks recorded once for each of a few shapes, then replayed with one launch.

A sentence alone keeps a GPU waiting: every small kernel costs more to launch than to run. A recorded graph launches
them together, but only for the shape, and the memory, that it was recorded with. So inputs are copied into buffers of a
slightly larger shape and the outputs cut back; what is added is masked, and changes rounding only.

B sentences, K rows for each of them, S source positions, T target positions, D width.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from engine_fast.data.symbols import EOS, PAD
from engine_fast.errors import ConfigError
from engine_fast.models.protocols import Network
from engine_fast.models.stacks import Decoder, Encoder, EncoderDecoder, Memory

Tensors = tuple[Tensor, ...]
Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensors]], tuple[Replay, Tensors]]
"""function -> (what computes it again from the same input buffers, the buffers that then hold its outputs)."""
AnyNetwork = TypeVar("AnyNetwork", bound=Network)

MAX_GRAPHS = 64
"""Of one network. Shapes that come later run as before: a graph that is dropped takes the workspace of others along."""
MAX_POSITIONS = 2048
"""Rows times positions beyond which nothing is recorded: kernels, not launches, should then take the time."""
_LENGTH_STEP = 8
_WARM_UPS = 3
"""Calls before recording, in which libraries choose their kernels."""
_ONE_AT_A_TIME = threading.Lock()
"""From filling buffers until the outputs are copied, of all networks: no two of them may record at once."""


def use_cuda_graphs(network: AnyNetwork, *, record: Record | None = None) -> AnyNetwork:
    """The network, in place, whose encoder and decoder replay CUDA graphs where no gradient is wanted.

    For decoding: after this its weights must stay where they are, so it comes after set_precision(), and the network
    cannot be copied. A shape is recorded the second time it comes. Calls in training mode, with gradients, or with more
    than MAX_POSITIONS positions run as before. Threads wait for each other, and have to use one stream.
    record: how a function is recorded; default, by torch.cuda.graph on the network's GPU.
    Raises: ConfigError for a network that is not a transformer of ours, not on a GPU, or that has graphs already.
    """
    if not isinstance(network, EncoderDecoder):
        raise ConfigError(f"cuda_graphs = True with a {network.kind} model, expected false: only transformers can.")
    if "forward" in vars(network.encoder):
        raise ConfigError("cuda_graphs = True for a network that has them, expected once. Load the model again.")
    device = next(network.parameters()).device
    if record is None:
        if device.type != "cuda":
            raise ConfigError(f"cuda_graphs = True on {device}, expected a GPU. Leave it out.")
        record = _CudaRecorder(device)
    graphs = Graphs(record)
    # By weak references: a cycle would keep a network's memory until the garbage collector comes by.
    encoder, decoder = weakref.ref(network.encoder), weakref.ref(network.decoder)
    network.encoder.forward = partial(_encode, encoder, graphs)  # type: ignore[method-assign]
    network.decoder.forward = partial(_decode, decoder, graphs)  # type: ignore[method-assign]
    return network


class Graphs:
    """The recorded functions of a network by shape, with the buffers that they read and write."""

    def __init__(self, record: Record, *, max_graphs: int = MAX_GRAPHS) -> None:
        self._record, self._max_graphs = record, max_graphs
        self._seen: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._kept: dict[Hashable, tuple[Tensors, Replay, Tensors]] = {}

    def worth(self, key: Hashable) -> bool:
        """Whether run() is to be called: the key has a graph, or has come before and there is room for one."""
        if key in self._kept:
            return True
        known = key in self._seen
        self._seen.add(key)
        return known and key not in self._failed and len(self._kept) < self._max_graphs

    def run(
        self,
        key: Hashable,
        make: Callable[[], Tensors],
        fill: Callable[..., None],
        function: Callable[..., Tensors],
    ) -> Tensors:
        """Copies of the outputs, which are as large as the buffers, of function(*buffers) after fill(*buffers).

        make() gives the buffers of a new `key`. Where that, or recording, raises, the key is not worth it any more.
        """
        # inference_mode would make buffers that nothing outside of it may write to
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad():
            if key not in self._kept:
                self._failed.add(key)  # until it is there
                buffers = make()
                fill(*buffers)
                self._kept[key] = buffers, *self._record(lambda: function(*buffers))
                self._failed.discard(key)
            buffers, replay, outputs = self._kept[key]
            fill(*buffers)
            replay()
            return tuple(output.clone() for output in outputs)


class _CudaRecorder:
    """Graphs of one GPU in one memory pool, on one stream: they run one after another, and what one leaves there is
    copied before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._renew()

    def _renew(self) -> None:
        """Both together: the products' workspace belongs to the stream and lies in the pool.

        Not torch's own stream for recordings, which all networks of all GPUs would share.
        """
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)

    def __call__(self, function: Callable[[], Tensors]) -> tuple[Replay, Tensors]:
        with torch.cuda.device(self._device):
            for _ in range(_WARM_UPS):
                function()
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # thread_local: other threads, such as a server's, may go on using the GPU meanwhile
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    outputs = function()
            except BaseException:
                self._renew()
                raise
            finally:
                torch.cuda.set_stream(before)  # torch leaves its own where a recording fails
        return graph.replay, outputs


def rounded_count(count: int) -> int:
    """The least 2^i or 3 * 2^i that is at least `count`: at most half of the rows are added."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def rounded_length(length: int) -> int:
    """The next multiple of _LENGTH_STEP."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _encode(weak: weakref.ref[Encoder], graphs: Graphs, source_BS: Tensor, prefix_D: Tensor | None = None) -> Memory:
    """Encoder.forward. An added sentence is EOS alone."""
    stack = weak()
    assert stack is not None, "a stack is alive while it is called"
    (rows, length), limit, has_prefix = source_BS.shape, stack.config.max_positions, prefix_D is not None
    shape = rounded_count(rows), min(rounded_length(length), limit)
    key = "encoder", shape, has_prefix
    if length > limit or _runs_as_before(stack, rows * length) or not graphs.worth(key):
        return Encoder.forward(stack, source_BS, prefix_D)

    def fill(buffer_BS: Tensor) -> None:
        buffer_BS.fill_(PAD)
        buffer_BS[rows:, 0] = EOS
        buffer_BS[:rows, :length] = source_BS

    def function(buffer_BS: Tensor) -> Tensors:
        memory = Encoder.forward(stack, buffer_BS, prefix_D)
        return memory.states, memory.mask

    states, mask = graphs.run(key, lambda: (source_BS.new_empty(shape),), fill, function)
    end = length + has_prefix
    return Memory(states[:rows, :end].contiguous(), mask[:rows, :end].contiguous())


def _decode(
    weak: weakref.ref[Decoder],
    graphs: Graphs,
    memory: Memory,
    embedded_NTD: Tensor,
    target_mask_NT: Tensor | None = None,
) -> Tensor:
    """Decoder.forward. Added rows and positions are zero; an added row sees its first."""
    stack = weak()
    assert stack is not None, "a stack is alive while it is called"
    (rows, length, width), limit = embedded_NTD.shape, stack.config.max_positions
    positions = max(rows * length, memory.mask.numel()) if rows * length else 0
    if length > limit or _runs_as_before(stack, positions):
        return Decoder.forward(stack, memory, embedded_NTD, target_mask_NT)
    sentences, source_length = memory.mask.shape
    all_sentences, all_source = rounded_count(sentences), rounded_length(source_length)
    all_rows, all_length = all_sentences * (rows // sentences), min(rounded_length(length), limit)
    ahead = [x for pair in memory.keys_values for x in pair]
    # With keys and values nothing reads the states, which here have one head.
    given, causal, is_ahead = ahead or [memory.states[:, None]], target_mask_NT is None, bool(ahead)
    key = "decoder", all_rows, all_length, all_sentences, all_source, causal, is_ahead
    if not graphs.worth(key):
        return Decoder.forward(stack, memory, embedded_NTD, target_mask_NT)

    def make() -> Tensors:
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

    def function(embedded: Tensor, target_mask: Tensor, source_mask: Tensor, *sources: Tensor) -> Tensors:
        keys_values = tuple(zip(sources[::2], sources[1::2], strict=True)) if is_ahead else ()
        states = sources[0] if is_ahead else sources[0][:, 0]
        memory = Memory(states, source_mask, keys_values)
        return (Decoder.forward(stack, memory, embedded, None if causal else target_mask),)

    (hidden,) = graphs.run(key, make, fill, function)
    return hidden[:rows, :length].contiguous()


def _runs_as_before(stack: Encoder | Decoder, positions: int) -> bool:
    return stack.training or torch.is_grad_enabled() or positions > MAX_POSITIONS or not positions
