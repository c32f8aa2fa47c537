"""An encoder-decoder of Hugging Face that speaks our ids, behind the interface of every teacher.

B sentences, S source positions, T target positions, V vocabulary, E embedding width, D width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine_fast.config.base import Section
from engine_fast.data.symbols import EOS, PAD
from engine_fast.errors import CheckpointError, DataError
from engine_fast.models.protocols import Teacher, Through
from engine_fast.models.stacks import Memory

Generated = list[tuple[list[int], float, float]]
"""The hypotheses of a sentence, best first: ids that end in EOS, score, log-probability in nats."""


class HuggingFaceArchitecture(Section):
    """What rebuilds the network, and how our sentences become its own. All ids are ours."""

    kind: Literal["huggingface"] = "huggingface"
    """Which of the architectures this is."""
    network: dict[str, Any]
    """transformers' configuration."""
    generation: dict[str, Any]
    """transformers' generation configuration."""
    source_prefix: list[int] = []
    """Put in front of every source: a language code, a prompt."""
    source_suffix: list[int] = [EOS]
    """Takes the place of the source's end symbol."""
    target_prefix: list[int] = []
    """Read by the decoder before `start`, and never scored: the start symbol where a language code follows it."""
    start: int
    """What the decoder reads before the first word."""
    embedding_scale: float = 1.0
    """The decoder multiplies its rows by this only when it is given ids."""
    hidden_scale: float = 1.0
    """Of the decoder's outputs before the head."""
    max_positions: int
    """Longest side, end symbol included, without what is put around it."""


def require_transformers() -> Any:
    """The package. Raises CheckpointError that says how to get it."""
    try:
        import transformers

        return transformers
    except ImportError as error:
        raise CheckpointError(
            f"a Hugging Face model needs transformers, which cannot be imported ({error}). "
            "Run pip install 'engine-fast[hf]'."
        ) from error


class HuggingFaceTeacher(Teacher):
    """Any encoder-decoder that passes engine_fast.models.huggingface.contract.

    Sources and targets are ids that end in EOS, right padded with PAD; prefixes, codes and scales are added in here.
    """

    kind = "huggingface"

    def __init__(
        self, architecture: HuggingFaceArchitecture, source_size: int, target_size: int, network: Any = None
    ) -> None:
        """network: one that is loaded and renumbered; None builds it from the architecture, with random weights."""
        super().__init__()
        self.architecture, self.source_size, self.target_size = architecture, source_size, target_size
        self.start = architecture.start
        self.network = _build(architecture) if network is None else network
        self.decoder = self.network.get_decoder()
        # The same parameters once more, as modules of their own: under ZeRO-3 they are whole only inside of a forward.
        self.table = Rows(self.decoder.get_input_embeddings().weight)
        self.head = Projection(self.network)
        self._cache_name = (
            "cache" if "cache" in inspect.signature(self.decoder.forward).parameters else "past_key_values"
        )
        self._checkpointing = False

    def encode(self, source_BS: Tensor) -> Memory:
        """Memory of prefix, words and suffix: it has more positions than the source."""
        framed = self.frame(source_BS)
        self._check_length(source_BS.shape[1])
        mask = framed != PAD
        states = self.network.get_encoder()(input_ids=framed, attention_mask=mask.long()).last_hidden_state
        return Memory(states, mask)

    def frame(self, source_BS: Tensor) -> Tensor:
        """`words EOS PAD ..` -> `prefix words suffix PAD ..`."""
        prefix, suffix = (
            source_BS.new_tensor(ids) for ids in (self.architecture.source_prefix, self.architecture.source_suffix)
        )
        words_B1 = (source_BS != PAD).sum(1, keepdim=True).clamp(min=1) - 1
        framed = F.pad(source_BS, (len(prefix), max(len(suffix) - 1, 0)), value=PAD)
        framed[:, : len(prefix)] = prefix
        slots = words_B1 + len(prefix) + torch.arange(max(len(suffix), 1), device=source_BS.device)
        ends = suffix if len(suffix) else source_BS.new_full((1,), PAD)
        return framed.scatter(1, slots, ends.expand(len(source_BS), -1))

    def decode(self, memory: Memory, decoder_input_BT: Tensor) -> Tensor:
        """(B, T, D) hidden states; position t has read decoder_input[0..t], which begins with `start`."""
        return self.forward_embedded(memory, self.embed(decoder_input_BT))

    def forward_embedded(self, memory: Memory, embedded_BTE: Tensor) -> Tensor:
        """decode() of relaxed inputs: rows of the input embeddings, or mixtures of them, unscaled.

        Gradients reach embedded_BTE also when the weights are frozen.
        """
        self._check_length(embedded_BTE.shape[1])
        prefix = self.architecture.target_prefix
        if prefix:
            before = self.embed(torch.tensor(prefix, device=embedded_BTE.device)).to(embedded_BTE.dtype)
            embedded_BTE = torch.cat([before.expand(len(embedded_BTE), -1, -1), embedded_BTE], dim=1)
        return self._hidden(memory, embedded_BTE, use_cache=False)[:, len(prefix) :]

    def forward(self, source_BS: Tensor, decoder_input_BT: Tensor) -> Tensor:
        """(B, T, V) logits under teacher forcing."""
        return self.project(self.decode(self.encode(source_BS), decoder_input_BT))

    def embed(self, ids: Tensor) -> Tensor:
        return self.table(ids)  # type: ignore[no-any-return]

    def embed_through(self, x: Tensor, through: Callable[[Tensor, Tensor], Any]) -> Any:
        """through(x, the decoder's (V, E) input embeddings), where these are whole."""
        return self.table(x, through)

    def project(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)  # type: ignore[no-any-return]

    def project_through(self, hidden: Tensor, through: Through) -> Any:
        """through(hidden, the head's (V, D) weight, its (V,) bias), where these are whole."""
        return self.head(hidden, through)

    def start_cache(self, memory: Memory) -> HuggingFaceCache:
        transformers = require_transformers()
        return HuggingFaceCache(
            memory, transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        )

    def step(self, tokens_B: Tensor, cache: HuggingFaceCache) -> Tensor:
        """(B, V) logits of the next token after `tokens_B`; the cache grows by one."""
        embedded = self.embed(tokens_B[:, None])
        if not cache.length and self.architecture.target_prefix:
            before = self.embed(torch.tensor(self.architecture.target_prefix, device=tokens_B.device))
            embedded = torch.cat([before.expand(len(tokens_B), -1, -1), embedded], dim=1)
        cache.length += 1
        self._check_length(cache.length)
        hidden = self._hidden(cache.memory, embedded, use_cache=True, **{self._cache_name: cache.past})
        return self.project(hidden[:, -1])

    @torch.no_grad()
    def generate(
        self,
        source_BS: Tensor,
        *,
        beam: int,
        n_best: int,
        length_penalty: float,
        max_length: tuple[float, float],
    ) -> list[Generated]:
        """The network's own search, with the words that it forbids and forces, in the order it ranks them.

        max_length: (a, b): EOS is forced behind a * S + b words, S counting the source's EOS. Scores are the network's
        own log p / length ** length_penalty, whatever its generation configuration adds to them while searching.
        """
        if not len(source_BS):
            return []
        transformers = require_transformers()
        limits_B = ((source_BS != PAD).sum(1) * max_length[0] + max_length[1]).long().clamp(0, self.max_positions - 1)
        prompt = source_BS.new_tensor([*self.architecture.target_prefix, self.start])
        settings = copy.deepcopy(self.network.generation_config)
        settings.update(
            num_beams=beam,
            num_return_sequences=n_best,
            length_penalty=length_penalty,
            do_sample=False,
            max_length=len(prompt) + int(limits_B.max()) + 1,
            max_new_tokens=None,
        )
        framed = self.frame(source_BS)
        limit = _EndAt(limits_B.repeat_interleave(beam) + len(prompt))
        rows = self.network.generate(
            input_ids=framed,
            attention_mask=(framed != PAD).long(),
            decoder_input_ids=prompt.expand(len(source_BS), -1),
            generation_config=settings,
            logits_processor=transformers.LogitsProcessorList([limit]),
        )[:, len(prompt) :]
        ends = (rows == EOS).long().argmax(1)
        tokens = [row[: end + 1] for row, end in zip(rows.tolist(), ends.tolist(), strict=True)]
        log_probabilities = self._log_probabilities(source_BS.repeat_interleave(n_best, 0), rows, ends)
        found = [
            (row, total / len(row) ** length_penalty, total)
            for row, total in zip(tokens, log_probabilities, strict=True)
        ]
        return [found[start : start + n_best] for start in range(0, len(found), n_best)]

    @property
    def activation_checkpointing(self) -> bool:
        """Whether every block is recomputed in the backward pass."""
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        # transformers' own works in training mode alone, and a teacher is in eval mode.
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in self.network.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.__dict__.pop("forward", None)
                if on:
                    layer.forward = partial(_recomputed, layer.forward)
        self._checkpointing = on

    def compile_stacks(self) -> None:
        """torch.compile encoder and decoder, for shapes that change; their calls alone, so that names stay."""
        for stack in (self.network.get_encoder(), self.decoder):
            stack.compile(dynamic=True)

    def _hidden(self, memory: Memory, embedded_BTE: Tensor, **options: Any) -> Tensor:
        output = self.decoder(
            inputs_embeds=embedded_BTE * self.architecture.embedding_scale,
            encoder_hidden_states=memory.states,
            encoder_attention_mask=memory.mask.long(),
            **options,
        )
        return output.last_hidden_state * self.architecture.hidden_scale  # type: ignore[no-any-return]

    def _log_probabilities(self, source_BS: Tensor, rows_BT: Tensor, ends_B: Tensor) -> list[float]:
        real_BT = torch.arange(rows_BT.shape[1], device=rows_BT.device) <= ends_B[:, None]
        target_BT = rows_BT.masked_fill(~real_BT, PAD)
        inputs_BT = F.pad(target_BT[:, :-1], (1, 0), value=self.start)
        logits_NV = self.project(self.decode(self.encode(source_BS), inputs_BT)[real_BT])
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        losses_N = F.cross_entropy(logits_NV, target_BT[real_BT], reduction="none")
        return (-losses_N.new_zeros(target_BT.shape).masked_scatter(real_BT, losses_N).sum(-1)).tolist()

    def _check_length(self, length: int) -> None:
        if length > self.max_positions:
            raise DataError(
                f"a sentence of {length} tokens, end symbol included, exceeds the model's max_positions = "
                f"{self.max_positions}. Filter or truncate it."
            )


class Rows(nn.Module):
    """The decoder's input embeddings, (V, E), unscaled."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, through: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """(...,) ids -> (..., E); or whatever through(x, weight) makes of them."""
        return F.embedding(x, self.weight) if through is None else through(x, self.weight)


class Projection(nn.Module):
    """The head: (V, D) weight, and the (V,) sum of its bias and the network's final_logits_bias."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        output = network.get_output_embeddings()
        self.weight, self.bias = output.weight, output.bias
        self._network = (network,)  # a tuple is not a submodule

    def forward(self, hidden: Tensor, through: Through | None = None) -> Any:
        bias, final_1V = self.bias, getattr(self._network[0], "final_logits_bias", None)
        if final_1V is not None:
            final_V = final_1V[0].to(self.weight.dtype)  # DeepSpeed casts no buffers
            bias = final_V if bias is None else bias + final_V
        return F.linear(hidden, self.weight, bias) if through is None else through(hidden, self.weight, bias)


@dataclass(slots=True)
class HuggingFaceCache:
    """transformers' keys and values, and the source they belong to."""

    memory: Memory
    past: Any
    length: int = 0

    def reorder(self, indices_B: Tensor, *, same_sentences: bool = False) -> None:
        """Keep the rows `indices_B` (may repeat or drop rows); same_sentences: the source's rows stay as they are."""
        if same_sentences:
            self.past.self_attention_cache.reorder_cache(indices_B)
        else:
            self.past.reorder_cache(indices_B)
            self.memory = self.memory.select(indices_B)


class _EndAt:
    """A logits processor: EOS for sure once a row has its number of ids, as transformers forces it at max_length."""

    def __init__(self, lengths_N: Tensor) -> None:
        self._lengths_N = lengths_N

    def __call__(self, input_ids: Tensor, scores_NV: Tensor) -> Tensor:
        full_N = input_ids.shape[1] >= self._lengths_N
        scores_NV = scores_NV.masked_fill(full_N[:, None], float("-inf"))
        scores_NV[full_N, EOS] = 0.0
        return scores_NV


def head_bias(network: Any, size: int) -> None:
    """Give the head a bias of zeros where the network has none anywhere, so that a word can be made impossible."""
    output = network.get_output_embeddings()
    if output.bias is None and getattr(network, "final_logits_bias", None) is None:
        output.bias = nn.Parameter(output.weight.new_zeros(size))


def _build(architecture: HuggingFaceArchitecture) -> Any:
    transformers = require_transformers()
    try:
        settings = {**architecture.network}
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        network = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        network.generation_config = transformers.GenerationConfig.from_dict(architecture.generation)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"this transformers {transformers.__version__} cannot build the network "
            f"({architecture.network.get('model_type')}: {error}). Use the version that it was imported with."
        ) from error
    head_bias(network, network.get_output_embeddings().weight.shape[0])
    return network


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)
