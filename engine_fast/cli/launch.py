"""`engine-fast launch`: a command on many ranks, watched and restarted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from engine_fast.errors import ConfigError


def launch(
    words: Annotated[
        list[str], typer.Argument(metavar="CONFIG | -- COMMAND ...", help="A recipe, or another command and its flags.")
    ],
    out: Annotated[
        Path, typer.Option(help="Run directory, on a file system that all hosts share.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="section.key=value", help="Override one setting; repeatable.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="On this host; default: its GPUs, or 1.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Lines of `name slots=N`.")] = None,
    nodes: Annotated[
        int | None, typer.Option(help="The same command is started on so many nodes, without ssh.")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
    master: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Of node 0.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="On the nodes of the SLURM allocation around.")] = False,
    launcher: Annotated[
        Literal["pdsh", "openmpi", "slurm", "torchrun"] | None, typer.Option(help="What starts the ranks.")
    ] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Instead of a node's GPUs or slots.")] = None,
    max_restarts: Annotated[int, typer.Option(help="From the last whole checkpoint.")] = 0,
    backoff: Annotated[
        float, typer.Option(help="Seconds before the first restart; doubled for each further one.")
    ] = 5.0,
    elastic: Annotated[bool, typer.Option("--elastic", help="Restart without hosts that no longer answer.")] = False,
    hang_seconds: Annotated[float, typer.Option(help="A rank without progress for so long has failed.")] = 600.0,
    grace_seconds: Annotated[float, typer.Option(help="For saving, when stopped.")] = 60.0,
    port: Annotated[int, typer.Option(help="For the ranks to meet; 0 = a free one.")] = 0,
    forward: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A further variable for the ranks.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started.")] = False,
    preflight: Annotated[bool, typer.Option(help="Look at every host first.")] = True,
) -> None:
    """Run a recipe on many ranks: start them, watch them, clean up, restart. The same command continues a run.

    Exit codes: 0 every rank finished; 130 interrupted, with the state saved; 2 a mistake or failure, explained.
    """
    from engine_fast.distributed.launch.launcher import Launch
    from engine_fast.distributed.launch.plan import Flags, make_plan

    arguments, gpus = _arguments(words, out, overrides or [])
    flags = Flags(
        out=out, arguments=arguments, gpus=gpus, hostfile=hostfile, nodes=nodes, node_rank=node_rank,
        master=master, slurm=slurm, launcher=launcher, ranks=ranks, ranks_per_node=ranks_per_node,
        max_restarts=max_restarts, backoff=backoff, elastic=elastic, hang_seconds=hang_seconds,
        grace_seconds=grace_seconds, port=port, forward=tuple(forward or ()), preflight=preflight,
    )  # fmt: skip
    started = Launch(make_plan(flags), _say, dict(os.environ))
    if dry_run:
        print(started.dry_run())
        return
    if flags.node_rank:
        from engine_fast.distributed.launch.follow import Follower

        raise typer.Exit(Follower(started).run())
    raise typer.Exit(started.run())


def _say(text: str) -> None:
    try:
        print(f"launch: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # the terminal is gone; the ranks are still to be brought to an end


def _arguments(words: list[str], out: Path, overrides: list[str]) -> tuple[tuple[str, ...], bool]:
    """(of engine-fast on each rank, whether it may want GPUs); with --out, where the command has one and it is missing.

    Raises ConfigError or a click.UsageError for a line that no rank could read.
    """
    from engine_fast.cli.main import COMMANDS

    if len(words) == 1 and words[0] not in COMMANDS:
        from engine_fast.config import find_config, load_config

        settings = load_config(
            find_config(Path(words[0])), overrides
        )  # a mistake is told once, here, and not by every rank
        options = [part for override in overrides for part in ("--set", override)]
        return ("run", words[0], "--out", str(out), *options), settings.runtime.device != "cpu"
    if words[0] not in COMMANDS or words[0] == "launch":
        raise ConfigError(f"{words[0]!r} is no command to launch. Give a CONFIG alone, or `-- train CONFIG ...`.")
    if overrides:
        raise ConfigError(f"--set {overrides[0]}: belongs to the command. Write it after `-- {words[0]}`.")
    from engine_fast.cli.main import load_command

    command = load_command(words[0])
    # Not for a command without it, nor for report, whose --out is a file and may be left out.
    takes_out = any(known.name == "out" and (known.required or known.default is not None) for known in command.params)
    has_out = any(word == "--out" or word.startswith("--out=") for word in words)
    line = words if has_out or not takes_out else [*words, "--out", str(out)]
    command.make_context(words[0], list(line[1:]))  # likewise
    return tuple(line), True
