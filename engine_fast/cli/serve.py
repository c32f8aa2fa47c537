"""`engine-fast serve`: translation over HTTP, with a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine_fast.cli.translate import CudaGraphs, DecodingPrecision, Device, plain_warnings

GPU_BATCH_TOKENS = 16384


def serve(
    model: Annotated[Path, typer.Option(help="Model directory that answers by default: a student, or a teacher.")],
    teacher: Annotated[
        Path | None, typer.Option(help="Teacher directory: offered too, gives energies, reranks when asked.")
    ] = None,
    cmlm: Annotated[Path | None, typer.Option(help="A second student to compare with.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    precision: Annotated[DecodingPrecision, typer.Option(help="Of the models; int8 on a CPU.")] = "fp32",
    device: Annotated[Device, typer.Option(help="auto = cuda where there is one.")] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Source tokens, times candidates or beam, per batch. [1024; 16384 on a GPU]"),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=256, help="Sentences that may wait for one model.")] = 4096,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request is given up.")] = 30.0,
    cuda_graphs: CudaGraphs = False,
) -> None:
    """Serve translations over HTTP (POST /translate, GET /health, GET /metrics), and a page that explains them."""
    from engine_fast.inference.serving import Limits, create_app, load_systems, run

    with plain_warnings():
        how: dict[str, Any] = {"device": device, "precision": precision, "cuda_graphs": cuda_graphs}
        systems = load_systems(model, teacher=teacher, cmlm=cmlm, **how)
        on_gpu = any(system.on_gpu for system in systems.values())
        tokens = batch_tokens or (GPU_BATCH_TOKENS if on_gpu else Limits().batch_tokens)
        limits = Limits(batch_tokens=tokens, max_queue=max_queue, timeout_seconds=timeout)
        run(create_app(systems, limits), limits, host=host, port=port, say=typer.echo)
