"""The `engine-fast` program: a table of commands, each loaded only when it is called, and one way to fail.

Exit codes: 0 done; 2 a mistake that the message explains (ours to name, the user's to mend); 130 interrupted, with the
state saved; 143 ended because another rank did; 1 a bug, with its traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from engine_fast.distributed import presence
from engine_fast.errors import EngineFastError, PeerError

# name -> (sibling module, help). The function in the module bears the module's name. `import` is a keyword of Python.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Generate a corpus, train teacher, CMLM and ENGINE on it, write results.json and report.html."),
    "run": ("run", "Run a whole recipe from a configuration file, resumable stage by stage."),
    "prepare": ("prepare", "Clean a parallel corpus, train its vocabulary and write id shards."),
    "train": ("train", "Train one stage: teacher, cmlm or engine."),
    "distill": ("distill", "Translate the training sources with the teacher's beam search."),
    "translate": ("translate", "Translate lines from standard input to standard output."),
    "serve": ("serve", "Serve translations over HTTP, with a page that shows how they come about."),
    "score": ("score", "Energy of each translation under a teacher, in nats, one per line."),
    "evaluate": ("evaluate", "Measure every system of a run again: BLEU, chrF, energy, repetition, speed."),
    "report": ("report", "Write a run's report.html from its results."),
    "launch": ("launch", "Run a recipe or a command on many ranks: hosts, SLURM, torchrun; watched and restarted."),
    "export": ("export", "Turn a checkpoint of a stage, finished or not, into a model directory."),
    "import": ("import_", "Turn a fairseq checkpoint, or a Hugging Face model, into a model directory."),
    "doctor": ("doctor", "Say what is installed, compiled and usable, and what to do about the rest."),
}

_DISK = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}


class LazyGroup(TyperGroup):
    """Lists commands from COMMANDS and imports a command's module when that command is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A placeholder that carries the help line; what runs comes from resolve_command."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else placeholder, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PeerError as error:
            _fail(str(error), 143)
        except EngineFastError as error:
            _fail(str(error), 2)
        except KeyboardInterrupt as error:
            _fail(str(error) or "interrupted. What was finished is kept; the same command continues.", 130)
        except OSError as error:
            if error.errno in _DISK:
                _fail(f"{error.filename or 'disk'}: {error.strerror}. Free some space; the same command continues.", 2)
            if error.errno in _DENIED:
                _fail(f"{error.filename}: {error.strerror}. Choose a directory that you may write to.", 2)
            raise


def load_command(name: str) -> Any:
    """The runnable command `name`. Its module is imported now, and with it whatever it needs."""
    stem, help_line = COMMANDS[name]
    module = importlib.import_module(f"engine_fast.cli.{stem}")
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=getattr(module, stem).__doc__ or help_line)(getattr(module, stem))
    command = typer.main.get_command(single)
    command.name = name
    return command


def _fail(message: str, code: int) -> NoReturn:
    presence.explain({130: "interrupted", 143: "ended"}.get(code, "mistake"), message)
    try:
        print(f"engine-fast: {message}", file=sys.stderr)
    except OSError:
        pass  # a launched rank's standard error is a file, perhaps on the disk that is full
    raise typer.Exit(code)


app = typer.Typer(
    name="engine-fast",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Non-autoregressive translators trained on a teacher's energy (ENGINE).",
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True),  # what `deepspeed` adds; LOCAL_RANK says the same
) -> None:
    if version:
        from engine_fast import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    presence.attach()
    try:
        app()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        presence.finished(code)
        _leave(code)
        raise
    except BaseException as error:
        text = traceback.format_exc()
        presence.explain("exception", f"{type(error).__name__}: {error}", traceback=text)
        if presence.is_watched():
            print(text, file=sys.stderr, flush=True)
            presence.finished(1)
            _leave(1)
        raise


def _leave(code: int) -> None:
    if "torch.distributed" in sys.modules and "RANK" in os.environ:
        from engine_fast.distributed.runtime import leave

        leave(code)


if __name__ == "__main__":
    main()
