"""Every function of engine_fast.ops as data, and how to run one of them. N rows, V words, D widths."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine_fast import ops
from engine_fast.extension import build_info
from engine_fast.operators import gumbel_noise

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and build_info()["cuda"] else [])]
SHAPES = [(0, 5), (1, 1), (3, 7), (4, 15), (4, 17), (41, 1271), (2, 32000)]
STUDENT_WIDTH, TEACHER_WIDTH, TABLE_WIDTH = 8, 9, 5
_STUDENT_SIDE = {"z", "h", "h_student", "w_student", "bias_student"}


@dataclass(frozen=True)
class Case:
    """One function of the facade."""

    function: str
    inputs: tuple[str, ...]
    """Its matrices and biases; all of them can receive a gradient."""
    subsets: tuple[tuple[str, ...], ...]
    """Which of them are trained where it matters, besides `trained`."""
    weighted: bool = True
    frozen: tuple[str, ...] = ()
    """What must be frozen for the fused path to be taken."""
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[str, ...]:
        """All that can be trained on the fused path."""
        return tuple(name for name in self.inputs if name not in self.frozen)


_HEADS = ("h_student", "w_student", "bias_student", "h_teacher", "w_teacher", "bias_teacher")
_EMBED = ("h", "w_student", "bias_student", "table")
_OF_HEADS = (_HEADS[:4], _HEADS[:3], ("h_student",), ("w_student",), ("bias_student",), ("h_teacher",), _HEADS[4:])
_OF_EMBED = (_EMBED[:3], ("h",), ("w_student",), ("bias_student",), ("table",))

CASES: dict[str, Case] = {
    "energy": Case("energy", ("z", "s"), (("z",), ("s",))),
    "soft_embedding": Case("soft_embedding", ("z", "table"), (("z",), ("table",)), weighted=False),
    "linear_energy": Case("linear_energy", _HEADS, _OF_HEADS),
    "linear_energy_sum": Case("linear_energy", _HEADS, _OF_HEADS, fixed={"reduction": "sum"}),
    "teacher_energy": Case(
        "teacher_energy",
        ("z", "h_teacher", "w_teacher", "bias_teacher"),
        (("z",), ("h_teacher",), ("bias_teacher",), ("z", "h_teacher", "w_teacher", "bias_teacher")),
        frozen=("w_teacher", "bias_teacher"),
    ),
    "linear_soft_embedding": Case("linear_soft_embedding", _EMBED, _OF_EMBED, weighted=False),
    "linear_soft_embedding_and_logits": Case("linear_soft_embedding_and_logits", _EMBED, _OF_EMBED, weighted=False),
}


def draw(
    case: Case,
    shape: tuple[int, int],
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64),
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs whose logits spread over about +-6 and, made by a head, have one clear winner a row.

    A winner, because rounding to half precision must not decide what a hard operator returns. dtypes: of the student's
    side and of the teacher's.
    """
    num_rows, num_words = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    made: dict[str, Tensor] = {}
    for name in case.inputs:
        if name in ("z", "s"):
            made[name] = 3.0 * normal(num_rows, num_words)
        elif name == "table":
            made[name] = normal(num_words, TABLE_WIDTH)
        elif name.startswith("bias"):
            made[name] = 0.1 * normal(num_words)
        elif name.startswith("h"):  # the head follows at once: see the order of the cases
            width = TEACHER_WIDTH if "teacher" in name else STUDENT_WIDTH
            head = normal(num_words, width)
            head /= head.norm(dim=1, keepdim=True)
            winners = torch.randint(num_words, (num_rows,), generator=generator)
            made[name] = 6.0 * head[winners] + 0.2 * normal(num_rows, width)
            made["w_" + ("teacher" if "teacher" in name else "student")] = head
    return {name: made[name].to(dtypes[0] if name in _STUDENT_SIDE else dtypes[1]).to(device) for name in case.inputs}


def logits(tensors: dict[str, Tensor]) -> Tensor:
    """The student's logits (N, V) in float64."""
    if "z" in tensors:
        return tensors["z"].double()
    hidden = tensors["h" if "h" in tensors else "h_student"]
    z = hidden.double() @ tensors["w_student"].double().T
    return z + tensors["bias_student"].double() if "bias_student" in tensors else z


def clear_noise(tensors: dict[str, Tensor], seed: int = 0) -> Tensor:
    """(N, V) float32 Gumbel noise, raised where z + noise is largest: a clear winner a row again."""
    z = logits(tensors)
    noise = gumbel_noise(z.shape, seed=seed, device=z.device)
    best = (z + noise).argmax(-1, keepdim=True)
    return noise.scatter_add(1, best, torch.ones_like(best, dtype=noise.dtype))


def row_options(case: Case, num_rows: int, device: str = "cpu") -> dict[str, Tensor]:
    """weight and ignore for a case that takes them; both exact in every dtype."""
    rows = torch.arange(num_rows, device=device)
    options = {"ignore": rows % 4 == 2}
    return {**options, "weight": (rows % 5 + 1) / 4.0} if case.weighted else options


def ramp(like: Tensor) -> Tensor:
    """An upstream gradient of -1.25 .. 1.75 without a 0 or a 1, exact in every dtype."""
    steps = torch.arange(like.numel(), device=like.device) % 7
    return ((steps - 2.5) / 2).reshape(like.shape).to(like.dtype)


def call(module: ModuleType, case: Case, tensors: dict[str, Tensor], operator: str, **options: Any) -> list[Tensor]:
    """What the case's function in `module` (ops or ops.reference) returns, as a list."""
    returned = getattr(module, case.function)(**tensors, operator=operator, **case.fixed, **options)
    return list(returned) if isinstance(returned, tuple) else [returned]


def run(
    module: ModuleType,
    case: Case,
    tensors: dict[str, Tensor],
    operator: str,
    *,
    trained: tuple[str, ...] | None = None,
    **options: Any,
) -> dict[str, Tensor | None]:
    """Values as "out0", .. and, under their names, the gradients of <ramp, values>; None for what got none.

    trained: the inputs that require a gradient; default: case.trained.
    """
    trained = case.trained if trained is None else trained
    leaves = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in tensors.items()}
    outputs = call(module, case, leaves, operator, **options)
    needing = [output for output in outputs if output.requires_grad]
    torch.autograd.backward(needing, [ramp(output) for output in needing])
    result: dict[str, Tensor | None] = {f"out{index}": output.detach() for index, output in enumerate(outputs)}
    return {**result, **{name: leaf.grad for name, leaf in leaves.items()}}


def assert_same(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float = 1e-11) -> None:
    """Equal where finite to `tolerance` of the largest entry and of each entry's own size; NaN and infinities alike."""
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        value = got[name]
        assert (value is None) == (want is None), f"{name}: got {value}, wanted {want}"
        if value is None or want is None:
            continue
        assert value.dtype == want.dtype, name
        finite = want[want.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(
            value,
            want,
            rtol=tolerance,
            atol=tolerance * max(largest, 1.0),
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_identical(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    """Bitwise equal."""
    for name, want in wanted.items():
        value = got[name]
        assert (value is None) == (want is None), name
        if value is not None and want is not None:
            assert value.dtype == want.dtype, name
            assert torch.equal(value, want), f"{name} differs in {int((value != want).sum())} places"


def errors(case: Case, tensors: dict[str, Tensor], operator: str, **options: Any) -> dict[str, tuple[float, ...]]:
    """By name, the largest errors of the fused and of the plain result, and the largest entry, against float64."""
    truth = run(ops.reference, case, {name: t.double() for name, t in tensors.items()}, operator, **options)
    plain = run(ops.reference, case, tensors, operator, **options)
    fused = run(ops, case, tensors, operator, **options)
    found = {}
    for name, exact in truth.items():
        value, simple = fused[name], plain[name]
        if value is None or simple is None or exact is None:
            assert value is None, name
            assert simple is None, name
            continue
        assert value.dtype == simple.dtype, name
        assert value.shape == exact.shape, name
        distances = ((value.double() - exact).abs(), (simple.double() - exact).abs(), exact.abs())
        found[name] = tuple(distance.max().item() for distance in distances)
    return found


def assert_as_good_as_plain(
    found: list[dict[str, tuple[float, ...]]], factor: float = 2.0, floor: float = 1e-6
) -> None:
    """STYLE.md 12: at most `factor` times as wrong as plain torch in the same dtypes, plus a tiny floor.

    found: `errors` of several draws, summed: on one small draw plain torch is right by luck.
    """
    for name in found[0]:
        error, plain, largest = (sum(column) for column in zip(*(one[name] for one in found), strict=True))
        allowed = factor * plain + floor * largest
        assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"


def raw(name: str) -> Any:
    """The compiled operator engine_fast::name."""
    return getattr(torch.ops.engine_fast, name).default


def kernel_noise(shape: tuple[int, int], seed: int | Tensor, device: str = "cpu") -> Tensor:
    """(N, V) float64: the noise that the kernels make, read back out of the teacher's gradient.

    With z = s = 0 and GX, ds = 1 / V - softmax(noise); the saved scalars hold the maximum and the sum.
    """
    z = torch.zeros(shape, dtype=torch.float64, device=device)
    key = torch.as_tensor(seed, dtype=torch.int64, device=device)
    options = (None, key, None, None, False, False, 1.0)
    _, stats = raw("energy")(z, z, *options, False)
    _, ds = raw("energy_backward")(z.new_ones(shape[0]), z, z, stats, *options, False, True)
    return ((1.0 / shape[1] - ds) * stats[:, 1:2]).log() + stats[:, :1]
