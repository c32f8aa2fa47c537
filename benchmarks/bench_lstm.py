"""The energy step of the LSTM teacher against the same computation written directly with torch.nn.LSTM.

    python -m benchmarks.bench_lstm [--quick] [--device cpu|cuda] [--threads N] [--rounds N]

A step is what ENGINE does with its teacher for one micro-batch: the decoder reads O1 = SX of the student's logits, the
relaxed energy scores them with O2 = ST, and the backward pass goes through the frozen teacher to the logits. The
student's network and the teacher's encoder, which runs once and without a graph, are outside. Sizes are the paper's
(section 4.2), with V = 10000 and 1024 target positions.

ours            models.lstm.Seq2Seq and energies.relaxed_energy
direct          one function of plain torch around one nn.LSTM, on the same weights
.._feeding      both with input feeding: a loop over positions

--quick shrinks everything, judges no floor and writes nothing. Writes benchmarks/results/lstm.json, on a GPU
results/gpu/lstm.json; exits with 1 beyond a limit of benchmarks/floors.toml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import bench_step, harness
from engine_fast.config import LSTMArchitecture
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, PAD
from engine_fast.energies import Relaxation, inner_positions, relaxed_energy
from engine_fast.models import Seq2Seq, freeze
from engine_fast.models.lstm import LSTMMemory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROVIDERS = ("ours-fp32", "direct-fp32", "ours-bf16", "direct-bf16", "ours_feeding-fp32", "direct_feeding-fp32")
PAPER = LSTMArchitecture(dropout=0.0)
QUICK = LSTMArchitecture(embedding_width=32, encoder_width=32, decoder_width=48, dropout=0.0)


@dataclass(frozen=True)
class Step:
    """One way to compute the energy of a batch's logits, and their gradient."""

    energy: Callable[[Tensor], Tensor]
    z_MV: Tensor

    def run(self) -> Tensor:
        self.z_MV.grad = None
        energy = self.energy(self.z_MV)
        energy.backward()
        return energy.detach()


def make_step(provider: str, architecture: LSTMArchitecture, vocabulary: int, batch: Batch, device: str) -> Step:
    """Weights and logits come from one seed, so that every provider computes the same energy."""
    way, dtype = provider.split("-")
    torch.manual_seed(5)
    architecture = architecture.model_copy(update={"input_feeding": way.endswith("feeding")})
    teacher = freeze(Seq2Seq(architecture, vocabulary, vocabulary).to(device), dtype=DTYPES[dtype])
    rows = int(inner_positions(batch.target).sum())
    z_MV = (3 * torch.randn(rows, vocabulary)).to(device, DTYPES[dtype]).requires_grad_()
    with torch.no_grad():
        memory = teacher.encode(batch.source)
    if way.startswith("ours"):
        relaxation = Relaxation("SX", "ST")
        return Step(lambda z: relaxed_energy(teacher, memory, z, batch.target, relaxation, reduction="sum"), z_MV)
    lstm = joined(teacher)
    return Step(lambda z: direct_energy(teacher, lstm, memory, z, batch.target), z_MV)


def joined(teacher: Seq2Seq) -> nn.LSTM:
    """The decoder's layers as one torch.nn.LSTM."""
    config, layers = teacher.architecture, teacher.decoder.layers
    first = cast(nn.LSTM, layers[0])
    lstm = nn.LSTM(first.input_size, config.decoder_width, config.decoder_layers, batch_first=True)
    state = {
        name.replace("_l0", f"_l{i}"): value
        for i, layer in enumerate(layers)
        for name, value in layer.state_dict().items()
    }
    lstm.load_state_dict(state)
    weight = teacher.output.weight
    return lstm.to(weight.device, weight.dtype).requires_grad_(False)


def direct_energy(teacher: Seq2Seq, lstm: nn.LSTM, memory: LSTMMemory, z_MV: Tensor, target_BT: Tensor) -> Tensor:
    """The summed energy, SX and ST, as one would write it down."""
    table_VE, head_VD = teacher.decoder.embedding.weight, teacher.output.weight
    combine = teacher.decoder.attention.combine.weight
    real_BT = target_BT != PAD
    inner_BT = F.pad(real_BT[:, 1:], (0, 1))
    soft_MV = z_MV.float().softmax(-1)
    x_ME = soft_MV.to(z_MV.dtype) @ table_VE
    x_BTE = table_VE[EOS].expand(*target_BT.shape, -1).clone()
    x_BTE[:, 1:] = x_BTE[:, 1:].masked_scatter(inner_BT[:, :-1, None], x_ME)

    def attend(h_BTD: Tensor) -> Tensor:
        scores_BTS = h_BTD @ memory.keys.transpose(1, 2)
        weights_BTS = scores_BTS.masked_fill(~memory.mask[:, None], float("-inf")).softmax(-1)
        return torch.tanh(torch.cat([weights_BTS @ memory.states, h_BTD], dim=-1) @ combine.t())

    state = memory.hidden, memory.cell
    if teacher.architecture.input_feeding:
        fed_B1D = memory.hidden.new_zeros(len(target_BT), 1, lstm.hidden_size)
        outputs = []
        for t in range(target_BT.shape[1]):
            h_B1D, state = lstm(torch.cat([x_BTE[:, t : t + 1], fed_B1D], dim=-1), state)
            outputs.append(fed_B1D := attend(h_B1D))
        hidden_BTD = torch.cat(outputs, dim=1)
    else:
        hidden_BTD = attend(lstm(x_BTE, state)[0])
    log_p_MV = (hidden_BTD[inner_BT] @ head_VD.t()).float().log_softmax(-1)
    hard_MV = F.one_hot(z_MV.argmax(-1), z_MV.shape[1]).float()
    words = -((hard_MV + soft_MV - soft_MV.detach()) * log_p_MV).sum()
    end_BV = (hidden_BTD[real_BT & ~inner_BT] @ head_VD.t()).float()
    return words + F.cross_entropy(end_BV, target_BT.new_full((len(end_BV),), EOS), reduction="sum")


def measure(architecture: LSTMArchitecture, size: bench_step.Size, device: str) -> dict[str, dict[str, float]]:
    """provider -> target positions a second, seconds of a step, the largest spread over the batches."""
    rows = {name: {"seconds": 0.0, "cpu_seconds": 0.0, "spread": 0.0} for name in PROVIDERS}
    tokens = 0
    batches = bench_step.make_batches(size, device)
    for batch in batches:
        tokens += batch.target.numel()
        steps = {name: make_step(name, architecture, size.vocabulary, batch, device).run for name in PROVIDERS}
        for name, timed in harness.interleave(steps, rounds=size.rounds, device=device).items():
            rows[name]["seconds"] += timed["seconds"]
            rows[name]["cpu_seconds"] += timed["cpu_seconds"]
            rows[name]["spread"] = max(rows[name]["spread"], timed["spread"])
    return {
        name: {
            "tokens_per_second": tokens / row["seconds"],
            "seconds_per_step": row["seconds"] / len(batches),
            "cpu_seconds_per_step": row["cpu_seconds"] / len(batches),
            "spread": row["spread"],
        }
        for name, row in rows.items()
    }


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Our time over the direct one's, medians of the same run."""
    figures = {}
    for name in (name for name in rows if name.startswith("ours")):
        peer = rows[name.replace("ours", "direct")]
        label = name.removeprefix("ours").replace("-", "_").lstrip("_")
        figures[f"{label}_time"] = rows[name]["seconds_per_step"] / peer["seconds_per_step"]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_lstm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small models; no limit is judged, nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each provider on each batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = bench_step.size_of("engine", quick=options.quick, rounds=options.rounds)
    architecture = QUICK if options.quick else PAPER
    rows = measure(architecture, size, options.device)
    for name, row in rows.items():
        print(
            f"{name:20} {row['tokens_per_second']:8.0f} tokens/s  {row['seconds_per_step'] * 1e3:8.1f} ms a step  "
            f"spread {row['spread']:4.0%}"
        )
    figures = ratios(rows)
    for name, value in figures.items():
        print(f"{name}: {value:.2f} of the direct computation's")
    if options.quick:
        return 0
    problems = harness.judge(figures, harness.floors("lstm"))
    sizes = {"architecture": architecture.model_dump(), "vocabulary": size.vocabulary, "lengths": size.lengths}
    content = {"sizes": sizes | {"tokens": size.tokens, "rounds": size.rounds}, "steps": rows, "figures": figures}
    path = harness.write_results("lstm", {**content, "beyond_limit": problems}, device=options.device)
    print(f"written: {path.relative_to(harness.RESULTS.parent.parent)}")
    for problem in problems:
        print(f"beyond the limit: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
