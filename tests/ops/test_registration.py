"""What torch knows of the compiled operators: schemas, fakes, gradients. Every operator, with its real arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine_fast import ops
from engine_fast.operators import OPERATORS
from tests.ops.cases import CASES, clear_noise, draw, raw, row_options

N, V = 5, 19


def arguments(device: str, operator: str, *, noise: bool, grad: bool) -> dict[str, tuple[Any, ...]]:
    """Of every compiled operator; the forward ones' matrices require a gradient where `grad`."""
    op = OPERATORS[operator]

    def matrices(name: str, needing: bool = grad) -> list[Tensor]:
        drawn = draw(CASES[name], (N, V), dtypes=(torch.float32, torch.float32), device=device)
        return [drawn[key].requires_grad_(needing) for key in CASES[name].inputs]

    z, s = matrices("energy")
    seed = None if noise or not op.gumbel else torch.tensor(-5, device=device)
    g = clear_noise({"z": z.detach()}) if noise else None
    weight, ignore = row_options(CASES["energy"], N, device)["weight"], torch.arange(N, device=device) == 2
    relaxation = (op.hard, op.jacobian == "identity", 0.7)
    weighted, plain = (g, seed, weight, ignore, *relaxation), (g, seed, ignore, *relaxation)
    u, v = torch.linspace(-1, 2, N, device=device), torch.randn(N, 5, device=device)

    _, table = matrices("soft_embedding")
    heads = matrices("linear_energy")
    _, h_teacher, w_teacher, b_teacher = matrices("teacher_energy")
    frozen = (w_teacher.detach(), b_teacher.detach())
    h, w, b, _ = matrices("linear_soft_embedding")

    def still(*tensors: Tensor) -> list[Tensor]:
        return [tensor.detach() for tensor in tensors]

    stats = raw("energy")(*still(z, s), *weighted, False)[1]
    soft_stats = raw("soft_embedding")(*still(z, table), *plain)[1]
    needs = [grad] * 6
    return {
        "energy": (z, s, *weighted, False),
        "energy_backward": (u, *still(z, s), stats, *weighted, True, True),
        "energy_backward_": (u, *still(z, s), stats, *weighted, torch.empty_like(z), torch.empty_like(s)),
        "soft_embedding": (z, table, *plain),
        "soft_embedding_backward": (v, *still(z, table), soft_stats, *plain, True, True),
        "linear_energy": (*heads, *weighted),
        "linear_energy_gradients": (u, *still(*heads), *weighted, [True, False, True, True, True, False]),
        "linear_energy_sum": (*heads, *weighted, needs, False),
        "teacher_energy": (z, h_teacher, *frozen, *weighted, True, grad, False),
        "linear_soft_embedding": (h, w, b, table, *plain, True),
        "linear_soft_embedding_backward": (
            v, torch.randn(N, V, device=device), *still(h, w, b, table), z.detach(), *plain,
            [True, True, False, True],
        ),
        "linear_argmax": (*still(h, w, b), [0, 3, 1]),
    }  # fmt: skip


NAMES = list(arguments("cpu", "SX", noise=False, grad=False))


def test_every_operator_is_listed_here():
    registered = {name for name in dir(torch.ops.engine_fast) if not name.startswith("_")}
    schemas = {schema.name.removeprefix("engine_fast::") for schema in torch._C._jit_get_all_schemas()
               if schema.name.startswith("engine_fast::")}  # fmt: skip
    assert schemas == set(NAMES), registered


@pytest.mark.parametrize(("operator", "noise"), [("SX", False), ("STL", False), ("GX", True), ("SG", False)])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, operator: str, noise: bool, device: str):
    grad = not name.endswith(("backward", "backward_", "gradients"))
    given = arguments(device, operator, noise=noise, grad=grad)[name]
    torch.library.opcheck(raw(name), given)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_without_rows(name: str, device: str):
    """N = 0: a batch of nothing but padding that was packed away."""
    given = arguments(device, "ST", noise=False, grad=False)[name]
    rowless = tuple(
        value[:0] if isinstance(value, Tensor) and value.ndim and value.shape[0] == N else value for value in given
    )
    torch.library.opcheck(raw(name), rowless, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["linear_energy_sum", "linear_energy_gradients"])
def test_what_is_not_needed_is_not_made(name: str, device: str):
    needs = [True, False, False, False, True, False]
    given = [
        needs if isinstance(value, list) else value for value in arguments(device, "SX", noise=False, grad=False)[name]
    ]
    sizes = [tensor.numel() for tensor in raw(name)(*given)[1:]]
    heads = [tensor.numel() for tensor in given if isinstance(tensor, Tensor)][int("gradients" in name) :][:6]
    assert sizes == [size if need else 0 for size, need in zip(heads, needs, strict=True)]


@pytest.mark.parametrize("operator", ["SX", "GX"])
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str, operator: str, device: str):
    """Only soft operators: a hard one's gradient is by definition not that of its value (straight through), so finite
    differences know nothing of it. Those are compared with their definition in test_agreement.
    """
    case = CASES[name]
    tensors = draw(case, (3, 7), device=device)
    noise = clear_noise(tensors) if operator == "GX" else None
    options = {"temperature": 1.3, **row_options(case, 3, device), **case.fixed}
    tensors = {key: tensor / 2 for key, tensor in tensors.items()}  # flat enough for finite differences
    trained = case.trained

    def function(*leaves: Tensor) -> Any:
        given = {**tensors, **dict(zip(trained, leaves, strict=True))}
        return getattr(ops, case.function)(**given, operator=operator, noise=noise, **options)

    leaves = [tensors[key].detach().requires_grad_() for key in trained]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("operator", ["SX", "STL"])
@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused(name: str, operator: str, device: str):
    """Nothing silently wrong where someone asks for the gradient of a gradient."""
    case = CASES[name]
    drawn = draw(case, (3, 7), device=device)
    leaves = {key: tensor.requires_grad_(key in case.trained) for key, tensor in drawn.items()}
    returned = getattr(ops, case.function)(**leaves, operator=operator, **case.fixed)
    value = returned[0] if isinstance(returned, tuple) else returned

    def twice() -> None:
        first = torch.autograd.grad((value**2).sum(), leaves[case.inputs[0]], create_graph=True)[0]
        (first**2).sum().backward()

    with pytest.raises(RuntimeError):
        twice()


def test_the_profiler_sees_them(device: str):
    activity = torch.profiler.ProfilerActivity.CPU
    tensors = draw(CASES["linear_energy"], (N, V), device=device)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    with torch.profiler.profile(activities=[activity]) as profile:
        ops.linear_energy(**leaves).sum().backward()
        ops.energy(*draw(CASES["energy"], (N, V), device=device).values())
    seen = {event.key for event in profile.key_averages()}
    assert {"engine_fast::linear_energy", "engine_fast::linear_energy_gradients", "engine_fast::energy"} <= seen
