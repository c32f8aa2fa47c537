"""What a network has to have and to do before it may teach: said once here, and checked at every import.

B sentences, S source positions, T target positions, V vocabulary, E embedding width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_fast.data.symbols import EOS, PAD
from engine_fast.errors import CheckpointError
from engine_fast.models.huggingface.network import HuggingFaceTeacher

_LOSS_TOLERANCE = 1e-6
_TOLERANCE = 1e-5
"""Of logits, relative to the largest."""


def check_interface(network: Any, origin: str) -> None:
    """Raises CheckpointError that names the first method, or argument of one, which the network lacks."""
    for name in ("get_encoder", "get_decoder", "get_output_embeddings", "generate"):
        if not callable(getattr(network, name, None)):
            raise CheckpointError(lacking(origin, type(network).__name__, f"{name}()"))
    decoder = network.get_decoder()
    for stack, name, arguments in (
        (network.get_encoder(), "encoder", ("input_ids", "attention_mask")),
        (decoder, "decoder", ("inputs_embeds", "encoder_hidden_states", "encoder_attention_mask")),
    ):
        if stack is None or not callable(getattr(stack, "get_input_embeddings", None)):
            raise CheckpointError(lacking(origin, type(network).__name__, f"get_{name}().get_input_embeddings()"))
        known = inspect.signature(stack.forward).parameters
        for argument in arguments:
            if argument not in known:
                raise CheckpointError(lacking(origin, type(stack).__name__, f"forward({argument}=)"))
    if not isinstance(network.get_output_embeddings(), nn.Linear):
        raise CheckpointError(lacking(origin, type(network).__name__, "get_output_embeddings() -> nn.Linear"))


def lacking(origin: str, network: str, what: str) -> str:
    """The one wording of a part that is not there."""
    return f"{origin}: {network} has no {what}, which a teacher needs. Give an encoder-decoder, such as a Marian model."


def reference_logits(network: Any, source_BS: Tensor, inputs_BT: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, T, V) logits of the network itself, ids in its numbering."""
    with torch.no_grad():
        return network(  # type: ignore[no-any-return]
            input_ids=source_BS, attention_mask=mask_BS.long(), decoder_input_ids=inputs_BT, use_cache=False
        ).logits


def find_scales(network: Any, source_BS: Tensor, inputs_BT: Tensor) -> tuple[float, float]:
    """(embedding_scale, hidden_scale): what the network multiplies by between rows and decoder, and before its head.

    inputs_BT: ids, all real. Raises CheckpointError where no constant makes inputs_embeds equal to ids.
    """
    decoder, output = network.get_decoder(), network.get_output_embeddings()
    table = decoder.get_input_embeddings()
    width = table.weight.shape[1]
    with torch.no_grad():
        whole = network(input_ids=source_BS, decoder_input_ids=inputs_BT, use_cache=False)
        states = whole.encoder_last_hidden_state
        hidden = decoder(input_ids=inputs_BT, encoder_hidden_states=states, use_cache=False).last_hidden_state
        rows = F.embedding(inputs_BT, table.weight)
        for scale in (1.0, width**0.5):
            tried = decoder(inputs_embeds=rows * scale, encoder_hidden_states=states, use_cache=False)
            if _close(tried.last_hidden_state, hidden):
                break
        else:
            raise CheckpointError(
                f"{type(decoder).__name__}: forward(inputs_embeds=) of a table's rows differs from "
                "forward(input_ids=) at every scale that is tried (1, sqrt(width)). It cannot read relaxed words."
            )
        final = getattr(network, "final_logits_bias", 0.0)
        for hidden_scale in (1.0, hidden.shape[-1] ** -0.5):
            if _close(output(hidden * hidden_scale) + final, whole.logits):
                return scale, hidden_scale
    raise CheckpointError(
        f"{type(network).__name__}: its logits are not get_output_embeddings() of its decoder's states, at any scale "
        "that is tried (1, 1 / sqrt(width)). Its words cannot be scored."
    )


def check_contract(
    teacher: HuggingFaceTeacher,
    source_BS: Tensor,
    target_BT: Tensor,
    expected_BTV: Tensor,
    origin: str,
) -> None:
    """Compare a teacher with what its network gave, and gives, for the same ids. Weights are float64, frozen.

    Args: source_BS, target_BT: ours, ending in EOS, right padded. expected_BTV: the original's logits, before it was
        renumbered, in the order of our ids; NaN for a symbol that it lacks.
    Raises CheckpointError naming what differs and by how much.
    """
    inputs_BT = F.pad(target_BT[:, :-1], (1, 0), value=teacher.start)
    memory = teacher.encode(source_BS)
    embedded = teacher.embed(inputs_BT).requires_grad_()
    logits = teacher.project(teacher.forward_embedded(memory, embedded))
    real_BT = target_BT != PAD

    lacked_V = expected_BTV[0, 0].isnan()
    _require(logits[..., ~lacked_V][real_BT], expected_BTV[..., ~lacked_V][real_BT], "logits, once renumbered,", origin)
    if logits[real_BT].softmax(-1)[:, lacked_V].any():
        raise CheckpointError(f"{origin}: a symbol that the model lacks got a probability above 0.")

    one_hot = F.one_hot(target_BT, teacher.target_size).to(logits.dtype)
    mixed = teacher.embed_through(one_hot, lambda rows, table: rows @ table)
    shifted = torch.cat([teacher.embed(inputs_BT[:, :1]), mixed[:, :-1]], dim=1)
    scores = teacher.project(teacher.forward_embedded(memory, shifted)).log_softmax(-1)
    energy = float(-(one_hot * scores).sum(-1)[real_BT].mean().detach())
    loss = float(_own_loss(teacher, source_BS, inputs_BT, target_BT))
    if not abs(energy - loss) <= _LOSS_TOLERANCE:
        raise CheckpointError(
            f"{origin}: the energy of one-hot words is {energy:.8f} nats a token, its own loss {loss:.8f}; expected "
            "the same. It does something between inputs and loss that is unknown here."
        )

    gradient = None
    if logits.requires_grad:
        weight = torch.linspace(-1, 1, logits[real_BT].numel(), dtype=logits.dtype).view_as(logits[real_BT])
        (gradient,) = torch.autograd.grad((logits[real_BT] * weight).sum(), embedded, allow_unused=True)
    if gradient is None or not gradient[real_BT].isfinite().all() or not gradient[real_BT].any(-1).all():
        raise CheckpointError(
            f"{origin}: no gradient reaches forward(inputs_embeds=) while the weights are frozen, so no student could "
            "learn from it."
        )


def _own_loss(teacher: HuggingFaceTeacher, source_BS: Tensor, inputs_BT: Tensor, target_BT: Tensor) -> Tensor:
    """The network's cross-entropy, a mean over real tokens."""
    prefix = teacher.architecture.target_prefix
    framed = teacher.frame(source_BS)
    inputs_BT = torch.cat([inputs_BT.new_tensor(prefix).expand(len(inputs_BT), -1), inputs_BT], dim=1)
    labels_BT = F.pad(target_BT.masked_fill(target_BT == PAD, -100), (len(prefix), 0), value=-100)
    with torch.no_grad():
        return teacher.network(  # type: ignore[no-any-return]
            input_ids=framed, attention_mask=(framed != PAD).long(), decoder_input_ids=inputs_BT, labels=labels_BT
        ).loss


def _require(got: Tensor, wanted: Tensor, what: str, origin: str) -> None:
    if not _close(got, wanted):
        raise CheckpointError(
            f"{origin}: {what} differ by {float((got - wanted).abs().max()):.2e}, expected at most {_TOLERANCE:g} of "
            f"{float(wanted.abs().max()):.2e}. This kind of model cannot be carried over."
        )


def _close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= _TOLERANCE * wanted.abs().max().clamp(min=1e-30))


def probe_ids(words: list[int], *, longest: int = 9, sentences: int = 3) -> Tensor:
    """(B, T) sentences of different lengths out of `words`, ending in EOS; the same for the same words."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.full((sentences, longest + 1), PAD)
    for number in range(sentences):
        length = max(1, longest - 3 * number)
        rows[number, :length] = torch.tensor(words)[torch.randint(len(words), (length,), generator=generator)]
        rows[number, length] = EOS
    return rows
