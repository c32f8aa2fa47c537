"""What a model computes in when it decodes: close to float32, replaced in place, refused where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from engine_fast.config import Architecture, TaggerArchitecture
from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding import generate, mask_predict_n_best
from engine_fast.errors import ConfigError
from engine_fast.models import CMLM, Tagger, Transformer
from engine_fast.models.precision import Int8Linear, PackedLinear, set_precision

SHAPE = {"width": 64, "ffn_width": 96, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "max_positions": 24}
SOURCE = torch.tensor([[5, 6, 7, 8, 9, 10, EOS], [9, 12, EOS, PAD, PAD, PAD, PAD]])
TARGET = torch.tensor([[4, 4, 4, 4, EOS], [4, 4, EOS, PAD, PAD]])
PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
QUANTISES = "onednn" in torch.backends.quantized.supported_engines
needs_int8 = pytest.mark.skipif(not QUANTISES, reason="this torch has no oneDNN quantisation")


def make(kind: str) -> CMLM | Transformer:
    torch.manual_seed(3)
    return {"cmlm": CMLM, "transformer": Transformer}[kind](Architecture(**SHAPE), 40, 40).eval()


def logits(model: CMLM | Transformer) -> Tensor:
    with torch.no_grad():
        memory = model.encode(SOURCE)
        memory = memory[0] if isinstance(memory, tuple) else memory
        return model.project(model.decode(memory, TARGET))[TARGET != PAD]


@pytest.mark.parametrize("kind", ["cmlm", "transformer"])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("int8", marks=needs_int8)])
def test_logits_stay_close(kind: str, precision: str) -> None:
    """Two layers of int8 or bfloat16 move logits by a few hundredths of their spread, not by nothing."""
    model = make(kind)
    wanted = logits(model)
    found = logits(set_precision(copy.deepcopy(model), precision))
    assert found.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    error = (found.float() - wanted).norm() / wanted.norm()
    assert 1e-4 < error < 0.04, error


@pytest.mark.skipif(not PACKS, reason="oneDNN has no bfloat16 products on this CPU")
@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 7), (130, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_the_plain_one(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(7, 11, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(shape).bfloat16()
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=2**-7, atol=2**-7)


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_errs_by_its_roundings(bias: bool) -> None:
    """Half a step of the inputs and half one of the weights, each row's own; a row does not depend on the others."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 9, bias=bias).requires_grad_(False)
    linear.weight *= torch.logspace(-3, 3, 9)[:, None]
    x = torch.randn(4, 5, 64) * torch.logspace(-2, 2, 5)[:, None]
    x[1, 2] = 0
    layer = Int8Linear(linear)
    found, wanted = layer(x), linear(x)
    step_x = x.abs().amax(-1, keepdim=True) / 127
    step_w = linear.weight.abs().amax(1) / 127
    allowed = 0.5 * (step_x * linear.weight.abs().sum(1) + step_w * x.abs().sum(-1, keepdim=True)) * 1.1 + 1e-6
    assert ((found - wanted).abs() <= allowed).all()
    assert not torch.equal(found, wanted)
    assert torch.equal(layer(x[2:3, 1:2]), found[2:3, 1:2])


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("int8", marks=needs_int8)])
def test_student_and_teacher_decode(precision: str) -> None:
    student, teacher = (set_precision(make(kind), precision) for kind in ("cmlm", "transformer"))
    ranked = mask_predict_n_best(student, SOURCE, iterations=2, length_beam=3)
    assert [len(hypotheses) for hypotheses in ranked] == [3, 3]
    assert all(h.tokens[-1] == EOS for hypotheses in ranked for h in hypotheses)
    for beam in (1, 3):
        assert len(generate(teacher, SOURCE, beam=beam)) == 2


@needs_int8
def test_only_plain_linear_layers_are_replaced() -> None:
    model = make("cmlm")
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    set_precision(model, "int8")
    assert [name for name, module in model.named_modules() if isinstance(module, Int8Linear)] == linears
    assert linears
    assert model.output.weight is model.decoder.embedding.weight
    assert model.output.weight.dtype == torch.float32
    tagger = Tagger(TaggerArchitecture(embedding_width=8, width=8), 40, 40).eval()
    assert set_precision(tagger, "bf16").output.weight.dtype == torch.bfloat16


def test_another_precision_and_another_device_are_refused() -> None:
    with pytest.raises(ConfigError, match="precision = 'fp16', expected one of fp32, bf16, int8"):
        set_precision(make("cmlm"), "fp16")
    with pytest.raises(ConfigError, match="precision = 'int8' on meta, expected a CPU"):
        set_precision(make("cmlm").to("meta"), "int8")
