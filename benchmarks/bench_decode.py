"""One mask-predict pass of the student in each precision, beside our own cached greedy teacher.

    python -m benchmarks.bench_decode [--quick] [--threads N] [--rounds N]

Random weights of the paper's size (configs/iwslt14_de_en.yaml: 6+6 layers, width 512, V = 10000), sources of 26 tokens,
targets of 27 slots (their length is given, K = 3: with one slot fewer and more), ids to ids. bench_translate has
what a user waits for, and other engines. Seconds are CPU seconds of all threads, which a busy machine distorts least.

fp32, bf16, int8   models.set_precision
unpacked           bf16 with F.linear
reference_ops      bf16 with the plain definition of ops.linear_argmax
teacher            bf16, greedy with cached states, for batch 1 only

--quick shrinks everything, judges no floor and writes nothing. Writes benchmarks/results/decode.json; exits with 1
below a floor of benchmarks/floors.toml.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch

from benchmarks import harness
from engine_fast import ops
from engine_fast.config import Architecture
from engine_fast.data.symbols import EOS, NUM_SPECIAL
from engine_fast.decoding import Hypothesis, generate, mask_predict
from engine_fast.models import CMLM, Transformer, set_precision

SHAPES = ((1, 1), (1, 3), (16, 1), (32, 1), (32, 3))
"""(sentences, length candidates)."""
SOURCE_LENGTH, TARGET_LENGTH = 26, 27
STUDENT = Architecture(positions="learned", activation="gelu", norm_epsilon=1e-12, scale_embedding=False, init="normal")
SMALL = {"width": 32, "ffn_width": 48, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
Run = Callable[[], list[Hypothesis]]


def make_runs(batch: int, width: int, student: CMLM, teacher: Transformer, vocabulary: int) -> dict[str, Run]:
    """Every provider on one batch."""
    generator = torch.Generator().manual_seed(batch)
    source_BS = torch.randint(NUM_SPECIAL, vocabulary, (batch, SOURCE_LENGTH), generator=generator)
    source_BS[:, -1] = EOS
    lengths_B = torch.full((batch,), TARGET_LENGTH)

    def one_pass(model: CMLM) -> Run:
        return lambda: mask_predict(model, source_BS, lengths=lengths_B, length_beam=width)

    unpacked = copy.deepcopy(student).bfloat16()
    models = {name: set_precision(copy.deepcopy(student), name) for name in ("fp32", "bf16", "int8")}
    runs = {**{name: one_pass(model) for name, model in models.items()}, "unpacked": one_pass(unpacked)}

    def reference_ops() -> list[Hypothesis]:
        with ops.using("reference"):
            return runs["bf16"]()

    runs["reference_ops"] = reference_ops
    if batch == 1:
        judge = set_precision(copy.deepcopy(teacher), "bf16")
        # Random weights end no sentence early: the limit does.
        runs["teacher"] = lambda: [
            found[0] for found in generate(judge, source_BS, max_length=(0.0, TARGET_LENGTH - 1.0))
        ]
    return runs


def figures_of(seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Times over that of bf16, for each shape."""
    return {
        (f"fp32_time_over_bf16_{shape}" if name == "fp32" else f"{name}_time_over_{shape}"): value / row["bf16"]
        for shape, row in seconds.items()
        for name, value in row.items()
        if name != "bf16"
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small models; no floor is judged, nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vocabulary = 200 if options.quick else 10000
    small = SMALL if options.quick else {}
    student = CMLM(STUDENT.model_copy(update=small), vocabulary, vocabulary).eval().requires_grad_(False)
    teacher = Transformer(Architecture(**small), vocabulary, vocabulary).eval().requires_grad_(False)
    seconds: dict[str, dict[str, float]] = {}
    for batch, width in SHAPES[:3] if options.quick else SHAPES:
        runs = make_runs(batch, width, student, teacher, vocabulary)
        timed = harness.interleave(runs, rounds=options.rounds)
        shape = f"b{batch}_k{width}"
        seconds[shape] = {name: row["cpu_seconds"] for name, row in timed.items()}
        for name, value in seconds[shape].items():
            print(f"{shape:8} {name:14} {value * 1e3:8.1f} ms  {batch / value:7.1f} sentences/CPU-s")
    figures = figures_of(seconds)
    if options.quick:
        return 0
    problems = harness.judge(figures, harness.floors("decode"))
    path = harness.write_results("decode", {"cpu_seconds": seconds, "figures": figures, "below_floor": problems})
    print(f"written: {path.relative_to(harness.RESULTS.parent.parent)}")
    for problem in problems:
        print(f"below the floor: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
