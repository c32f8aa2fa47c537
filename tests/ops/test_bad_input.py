"""Wrong arguments of the facade: the message names the operator, the argument, what came and what was wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine_fast import ops
from engine_fast.errors import ConfigError
from tests.ops.cases import CASES, draw

N, V = 3, 7
Change = Callable[[dict[str, Any]], dict[str, Any]]


def put(**changes: Any) -> Change:
    return lambda given: {**given, **changes}


def on(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda given: {**given, name: change(given[name])}


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(*shape, **options)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x[0]


def narrow(x: torch.Tensor) -> torch.Tensor:
    return x[:, :-1]


def short(x: torch.Tensor) -> torch.Tensor:
    return x[:-1]


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


WRONG: list[tuple[str, Change, tuple[str, ...]]] = [
    ("energy", on("z", flat), ("energy: z (7,), s (3, 7)", "(N, V)")),
    ("energy", on("s", narrow), ("energy: z (3, 7), s (3, 6)", "two equal")),
    ("energy", on("z", torch.Tensor.int), ("energy: z is torch.int32", "float32, float64, bfloat16 or float16")),
    ("energy", on("s", torch.Tensor.double), ("energy: z is torch.float32 and s torch.float64", "one dtype")),
    ("energy", on("s", elsewhere), ("energy: s is on meta, expected cpu as z",)),
    (
        "energy",
        lambda given: {key: x.half() for key, x in given.items()},
        ("energy: z is float16 on a CPU", "bfloat16"),
    ),
    ("energy", lambda given: {key: x[:, :0] for key, x in given.items()}, ("energy: V = 0", "at least one word")),
    ("energy", put(weight=ones(N, 1)), ("energy: weight (3, 1), expected (3,)",)),
    ("energy", put(weight=ones(N, requires_grad=True)), ("energy: weight requires a gradient", "Multiply")),
    ("energy", put(weight=ones(N, device="meta")), ("energy: weight is on meta, expected cpu",)),
    ("energy", put(ignore=ones(N)), ("energy: ignore is torch.float32, expected torch.bool",)),
    ("energy", put(ignore=ones(N + 1, dtype=torch.bool)), ("energy: ignore (4,), expected (3,)",)),
    ("energy", put(operator="SY"), ("'SY', expected one of SX, STL, SG, ST, GX",)),
    ("soft_embedding", on("table", short), ("soft_embedding: z (3, 7), table (6, 5)", "(V, D)")),
    ("soft_embedding", on("table", flat), ("soft_embedding: z (3, 7), table (5,)",)),
    ("soft_embedding", on("table", elsewhere), ("soft_embedding: table is on meta, expected cpu as z",)),
    ("soft_embedding", on("table", torch.Tensor.long), ("soft_embedding: table is torch.int64", "float32")),
    ("linear_energy", on("h_student", flat), ("linear_energy: h_student (8,), w_student (7, 8)", "(N, D) and (V, D)")),
    ("linear_energy", on("w_student", narrow), ("linear_energy: h_student (3, 8), w_student (7, 7)",)),
    ("linear_energy", put(w_teacher=ones(0)), ("linear_energy", "w_teacher (0,)", "ZeRO-3")),
    ("linear_energy", on("h_teacher", short), ("linear_energy: h_teacher", "2", "expected", "3", "h_student")),
    (
        "linear_energy",
        put(w_teacher=ones(V + 1, 9), bias_teacher=None),
        ("linear_energy: w_teacher", "8", "7", "one target vocabulary"),
    ),
    ("linear_energy", on("w_student", torch.Tensor.bfloat16), ("w_student is torch.bfloat16, expected torch.float32",)),
    ("linear_energy", on("bias_student", short), ("linear_energy: bias_student (6,), expected (7,)",)),
    ("linear_energy", on("bias_teacher", elsewhere), ("linear_energy: bias_teacher is on meta", "cpu as h_teacher")),
    ("linear_energy", on("bias_teacher", torch.Tensor.double), ("bias_teacher is torch.float64",)),
    ("linear_energy", put(reduction="mean"), ("linear_energy: reduction = 'mean', expected 'none' or 'sum'",)),
    ("teacher_energy", on("z", narrow), ("teacher_energy: z (3, 6), expected (3, 7)", "one target vocabulary")),
    ("teacher_energy", on("z", short), ("teacher_energy: z (2, 7), expected (3, 7)",)),
    ("teacher_energy", on("h_teacher", narrow), ("teacher_energy: h_teacher (3, 8), w_teacher (7, 9)",)),
    ("linear_soft_embedding", on("table", short), ("table (6, 5), expected (7, D)", "w_student (7, 8)")),
    ("linear_soft_embedding", on("table", flat), ("linear_soft_embedding: table (5,), expected (7, D)",)),
    ("linear_soft_embedding", on("table", torch.Tensor.double), ("h is torch.float32 and table torch.float64",)),
    ("linear_soft_embedding", on("h", narrow), ("linear_soft_embedding: h (3, 7), w_student (7, 8)",)),
    *(
        (name, put(noise=ones(N, V), seed=1), (f"{function}: noise and seed are both given",))
        for name, function in {**{name: name for name in CASES if "_and_" not in name and "sum" not in name}}.items()
    ),
    *(
        (name, put(operator="GX", noise=ones(N, 1)), (f"{name}: noise (3, 1), expected (3, 7)",))
        for name in ("energy", "soft_embedding", "linear_energy", "teacher_energy", "linear_soft_embedding")
    ),
    ("energy", put(operator="GX", noise=ones(N, V, device="meta")), ("energy: noise is on meta, expected cpu",)),
    ("energy", put(operator="GX", seed=torch.tensor(1.0)), ("energy: seed torch.float32 (), expected one int64",)),
    ("energy", put(operator="GX", seed=torch.tensor([1, 2])), ("energy: seed torch.int64 (2,), expected one int64",)),
]


@pytest.mark.parametrize(("name", "change", "parts"), WRONG, ids=[f"{case[0]}-{case[2][0]}"[:60] for case in WRONG])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_the_message_says_all_of_it(implementation: str, name: str, change: Change, parts: tuple[str, ...]):
    case = CASES[name]
    given = draw(case, (N, V), dtypes=(torch.float32, torch.float32))
    if implementation == "reference" and "float16 on a CPU" in parts[0]:
        return  # which the definition can do
    with ops.using(implementation), pytest.raises(ConfigError) as caught:  # type: ignore[arg-type]
        getattr(ops, case.function)(**{**case.fixed, **change(given)})
    for part in parts:
        assert part in str(caught.value)


TEMPERATURES = [0.0, -1.0, float("nan"), float("inf")]


@pytest.mark.parametrize("temperature", TEMPERATURES[:3])
@pytest.mark.parametrize("name", CASES)
def test_a_temperature_that_is_not_positive_is_refused_by_the_kernels(name: str, temperature: float):
    given = draw(CASES[name], (N, V), dtypes=(torch.float32, torch.float32))
    with pytest.raises((ConfigError, ValueError), match=r"temperature = .*expected a positive number"):
        getattr(ops, CASES[name].function)(**given, temperature=temperature, **CASES[name].fixed)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_temperature_that_is_not_positive_is_a_config_error(implementation: str, temperature: float):
    given = draw(CASES["energy"], (N, V))
    with ops.using(implementation), pytest.raises(ConfigError, match="energy: temperature"):  # type: ignore[arg-type]
        ops.energy(**given, operator="SX", temperature=temperature)


def test_noise_that_requires_a_gradient_is_refused():
    given = draw(CASES["energy"], (N, V))
    with pytest.raises(ConfigError, match="noise"):
        ops.energy(**given, operator="GX", noise=torch.zeros(N, V, requires_grad=True))


@pytest.mark.parametrize("seed", [1.5, 2**63])
def test_a_seed_that_is_no_int64_is_refused(seed: Any):
    with pytest.raises(ConfigError, match="seed"):
        ops.energy(**draw(CASES["energy"], (N, V)), operator="GX", seed=seed)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("linear_energy", "w_student"),
        ("linear_energy", "w_teacher"),
        ("linear_energy", "bias_student"),
        ("linear_energy", "bias_teacher"),
        ("teacher_energy", "w_teacher"),
        ("linear_soft_embedding", "w_student"),
        ("linear_soft_embedding", "table"),
        ("soft_embedding", "table"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_checked_where_asked(name: str, bad: str, value: float, device: str):
    given = draw(CASES[name], (N, V), device=device)
    getattr(ops, name)(**given)
    first = (5,) if given[bad].ndim == 1 else (5, 2)
    given[bad][first] = value
    getattr(ops, name)(**given)  # nobody asked
    with ops.using(check_finite=True), pytest.raises(ConfigError) as caught:
        getattr(ops, name)(**given)
    for part in (f"{name}: {bad}", "holds 1 values that are not finite", str(first), str(value)):
        assert part in str(caught.value)


def test_check_finite_passes_finite_weights(device: str):
    given = draw(CASES["linear_energy"], (N, V), device=device)
    with ops.using(check_finite=True):
        assert ops.linear_energy(**given).isfinite().all()
