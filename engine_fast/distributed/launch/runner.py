"""DeepSpeed's own runner with its quoting mended: `python -m engine_fast.distributed.launch.runner ARGUMENTS OF IT`.

It joins the interpreter's path and the exported values into a line for a remote shell: unquoted the one, and in double
quotes, inside which $(...) is run, the other. For mpirun, which needs no quotes, it adds them nevertheless.
"""

from __future__ import annotations

import shlex
import sys

from engine_fast.distributed.launch.environment import EARLY

_THEIR_OWN = ("UCX_TLS",)
"""Set by DeepSpeed itself for mpirun."""


def mend(launcher: str) -> None:
    """Change, in this process, what DeepSpeed exports (EARLY alone) and how."""
    from deepspeed.launcher import multinode_runner, runner

    over_shell = launcher == "pdsh"

    def add_export(self: multinode_runner.MultiNodeRunner, key: str, var: str) -> None:
        # It asks for all that only begins with one of these names, and pastes names as they are.
        if key not in (*EARLY, *_THEIR_OWN):
            return
        self.exports[key] = _for_pdsh(var) if over_shell else var

    multinode_runner.MultiNodeRunner.add_export = add_export
    runner.EXPORT_ENVS[:] = EARLY
    if over_shell:
        sys.executable = _for_pdsh(sys.executable)


def _for_pdsh(value: str) -> str:
    """Quoted for the remote shell, and so that pdsh takes no % as its own."""
    return shlex.quote(value).replace("%", "%%")


def main(argv: list[str]) -> None:
    from deepspeed.launcher import runner

    given = [argument.removeprefix("--launcher=") for argument in argv if argument.startswith("--launcher=")]
    mend(given[0])
    runner.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
