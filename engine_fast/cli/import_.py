"""`engine-fast import`: a checkpoint of another toolkit becomes a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from engine_fast.errors import CheckpointError, ConfigError


def import_(
    model: Annotated[
        str,
        typer.Argument(
            help="fairseq: the .pt file of a transformer, or of an ENGINE or Mask-Predict CMLM. "
            "Hugging Face: a directory, or a name on the hub."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "--to", help="Model directory to write.")],
    format_: Annotated[
        Literal["auto", "fairseq", "huggingface"], typer.Option("--format", help="auto: a file is fairseq's.")
    ] = "auto",
    source_dict: Annotated[Path | None, typer.Option(help="fairseq: the source side's dict.txt.")] = None,
    target_dict: Annotated[Path | None, typer.Option(help="fairseq: the target side's dict.txt.")] = None,
    kind: Annotated[
        Literal["auto", "transformer", "cmlm"], typer.Option(help="fairseq: auto is a CMLM if it has length classes.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Hugging Face: branch, tag or commit on the hub.")] = None,
    source_language: Annotated[
        str | None, typer.Option(help="Hugging Face: the tokenizer's code, where the model knows many languages.")
    ] = None,
    target_language: Annotated[str | None, typer.Option(help="Hugging Face: likewise.")] = None,
    prompt: Annotated[str, typer.Option(help="Hugging Face: text in front of every source.")] = "",
) -> None:
    """Turn a fairseq checkpoint, or an encoder-decoder of Hugging Face, into a model directory."""
    from engine_fast.models.store import is_model_directory

    if is_model_directory(Path(model)):
        raise ConfigError(f"{model}: is a model directory already. Use it as it is.")
    if out.exists() and not is_model_directory(out) and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists, and is not a model directory. Choose another --out.")
    chosen = format_ if format_ != "auto" else "fairseq" if _is_file(model) else "huggingface"
    of_fairseq = {"--source-dict": source_dict, "--target-dict": target_dict, "--kind": kind != "auto" or None}
    of_hub = {
        "--revision": revision,
        "--source-language": source_language,
        "--target-language": target_language,
        "--prompt": prompt or None,
    }
    others = of_hub if chosen == "fairseq" else of_fairseq
    if wrong := [name for name, value in others.items() if value is not None]:
        raise ConfigError(f"{', '.join(wrong)} without effect on a {chosen} model: leave it out, or set --format.")
    if chosen == "fairseq":
        _import_fairseq(Path(model), source_dict, target_dict, out, None if kind == "auto" else kind)
        return
    from engine_fast.models.huggingface.importing import Origin, import_huggingface

    network = import_huggingface(Origin(model, revision, source_language, target_language, prompt), out)
    typer.echo(
        f"{out}: {network.network['model_type']}, passes the contract; its ids are ours, its decoder reads "
        f"{[*network.target_prefix, network.start]} first, longest side {network.max_positions}"
    )


def _import_fairseq(
    checkpoint: Path,
    source_dict: Path | None,
    target_dict: Path | None,
    out: Path,
    kind: Literal["transformer", "cmlm"] | None,
) -> None:
    from engine_fast.models.fairseq import import_fairseq

    if source_dict is None or target_dict is None:
        raise ConfigError(f"{checkpoint}: a fairseq checkpoint needs --source-dict and --target-dict, its dict.txt.")
    architecture = import_fairseq(checkpoint, source_dict, target_dict, out, kind)
    typer.echo(
        f"{out}: {architecture.encoder_layers}+{architecture.decoder_layers} layers, width {architecture.width}, "
        f"{architecture.heads} heads, {architecture.positions} positions, embeddings tied: {architecture.tie}"
    )


def _is_file(model: str) -> bool:
    return Path(model).is_file() or model.endswith(".pt")
