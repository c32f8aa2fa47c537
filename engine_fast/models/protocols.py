"""What a network must offer to be a teacher or a student. Any teacher goes with any student of its vocabularies.

Weights are used inside of the module that owns them, for only there are they whole under ZeRO-3.

B sentences, S source positions, T target positions, N rows, V vocabulary, L length classes, D hidden width,
E width of the embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine_fast.data.symbols import EOS

Through = Callable[[Tensor, Tensor, Tensor | None], Any]
"""(hidden (N, D), the head's weight (V, D), its bias (V,) or None) -> anything."""


class Network(nn.Module, ABC):
    """What teachers and students have in common."""

    kind: str
    """Names it in a model directory."""
    architecture: Any
    """The section of the configuration that describes it."""
    source_size: int
    target_size: int
    activation_checkpointing: bool
    """Whether blocks are recomputed in the backward pass."""
    shardable: bool = True
    """Whether every batch calls the same modules equally often, whatever its lengths: under ZeRO-3 each call gathers
    weights on all ranks together."""

    @property
    def max_positions(self) -> int:
        """Longest side, end symbol included."""
        return int(self.architecture.max_positions)

    def share(self, memory: Any, count: int) -> Any:
        """What decode() takes beside `count` adjacent rows for each sentence of the memory: here, each sentence as
        often. A network whose decoder can tell from the rows' number returns the memory as it is."""
        if count == 1:
            return memory
        sentences_B = torch.arange(memory.mask.shape[0], device=memory.mask.device)
        return memory.select(sentences_B.repeat_interleave(count))

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) logits."""

    @abstractmethod
    def project_through(self, hidden: Tensor, through: Through) -> Any:
        """through(hidden, weight, bias) of the head, where it is whole."""

    @abstractmethod
    def compile_stacks(self) -> None:
        """torch.compile the parts that cost most, in place."""


class Teacher(Network):
    """An autoregressive network: p(y_t | y_0 .. y_{t-1}, x) of words, or of mixtures of words."""

    start: int = EOS
    """The id that its decoder reads first."""
    right_to_left: bool = False
    """Whether it was trained on targets from the last word to the first; the end symbol stays last."""

    @abstractmethod
    def encode(self, source_BS: Tensor) -> Any:
        """What the decoder attends to, for ids that end in EOS, right padded with PAD; an object with `.mask` (B, S),
        and `.select(indices_B)`, the same for rows that may repeat or drop sentences."""

    @abstractmethod
    def decode(self, memory: Any, decoder_input_BT: Tensor) -> Tensor:
        """(B, T, D) hidden states; position t has read decoder_input[0..t]."""

    @abstractmethod
    def forward_embedded(self, memory: Any, embedded_BTE: Tensor) -> Tensor:
        """decode() of rows of the input table, or mixtures of them, (B, T, D).

        Gradients reach embedded_BTE also when the weights are frozen and the network is in eval mode.
        """

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """(...,) target ids -> (..., E) rows of the input table, as forward_embedded takes them."""

    @abstractmethod
    def embed_through(self, x: Tensor, through: Callable[[Tensor, Tensor], Any]) -> Any:
        """through(x, the (V, E) input table), where it is whole."""

    @abstractmethod
    def start_cache(self, memory: Any) -> Any:
        """The decoder's state before its first position; `.reorder(indices_B, same_sentences=False)` keeps rows of it,
        same_sentences saying that each new row continues a hypothesis of the sentence that stood there."""

    @abstractmethod
    def step(self, tokens_B: Tensor, cache: Any) -> Tensor:
        """(B, V) logits of the token after `tokens_B`; the cache grows by one."""


class Student(Network):
    """A non-autoregressive network: logits of all target positions in one pass, once their number is known."""

    refines: bool
    """Whether it reads the words that other slots hold, so that further mask-predict passes can improve them."""

    @abstractmethod
    def encode(self, source_BS: Tensor) -> tuple[Any, Tensor]:
        """(memory as a teacher's with `.states`, (B, L) length logits); class n stands for n target tokens, end symbol
        included, and class 0 is -inf."""

    def prepare(self, memory: Any) -> Any:
        """The memory with whatever several passes of decode() over it would each compute again."""
        return memory

    @abstractmethod
    def decode(self, memory: Any, tokens_BT: Tensor) -> Tensor:
        """(B, T, D) hidden states of the slots, which are where tokens_BT is not PAD."""

    def logits(self, source_BS: Tensor, tokens_BT: Tensor) -> Tensor:
        """(B, T, V) of all slots; MASK stands where a word is asked for."""
        return self.project(self.decode(self.encode(source_BS)[0], tokens_BT))

    def lengths(self, source_BS: Tensor) -> Tensor:
        """(B, L) float32 log-probabilities of the target length, end symbol included."""
        _, logits_BL = self.encode(source_BS)
        return logits_BL.log_softmax(-1) if logits_BL.dtype == torch.float64 else logits_BL.float().log_softmax(-1)
