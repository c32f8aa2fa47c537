"""engine-fast doctor: what is installed, compiled and usable here, and what to do about what is not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine_fast import extension
from engine_fast.errors import BuildError, EngineFastError

State = Literal["ok", "absent", "broken"]
StageOption = Literal["teacher", "cmlm", "engine"]
DeviceOption = Literal["cpu", "cuda"]
_COLOURS: dict[State, str] = {"ok": "green", "absent": "yellow", "broken": "red"}
_MIN_FREE_BYTES = 2_000_000_000
_INSTALL = "Run `make install` in the source directory."


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    group: Literal["installed", "compiled", "usable"]
    name: str
    state: State
    """absent: training works without it; broken: it does not."""
    found: str
    advice: str = ""
    """What to do about it; empty when there is nothing to do."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="CONFIG", help="Plan the memory of this run's training instead.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="--plan: processes; or several numbers to compare, 8,64,512.")] = "1",
    stage: Annotated[StageOption | None, typer.Option(help="--plan: of this stage only.")] = None,
    device_memory: Annotated[float | None, typer.Option(help="--plan: GB of a device, to see whether it fits.")] = None,
    device: Annotated[DeviceOption, typer.Option(help="--plan: the kind of device that trains.")] = "cuda",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="section.key=value", help="--plan: override one setting.")
    ] = None,
) -> None:
    """Say what is installed, compiled and usable, and what to do about the rest. Exits with 1 if training cannot.

    With --plan: say how much memory each rank needs, by formula; exits with 1 if --device-memory is too little.
    """
    if plan is not None:
        from engine_fast.cli.plan import show_plan

        fits = show_plan(
            plan, overrides or [],
            ranks=ranks, stage=stage, device=device, device_memory=device_memory, as_json=as_json,
        )  # fmt: skip
        raise typer.Exit(0 if fits else 1)
    checks = examine()
    works = all(check.state != "broken" for check in checks)
    if as_json:
        print(json.dumps({"training_works": works, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _show(checks, works, Console())
    raise typer.Exit(0 if works else 1)


def examine() -> list[Check]:
    """Every check, in the order of the report."""
    probes = (packages, compiled, operators, deepspeed_imports, processor, gpu, tools, disk, corpora)
    return [check for probe in probes for check in probe()]


def packages() -> Iterable[Check]:
    """The interpreter, and every distribution that engine-fast asks for, by its own metadata."""
    yield Check("installed", "Python", "ok", platform.python_version())
    try:
        requirements = importlib.metadata.requires("engine-fast") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("installed", "engine-fast", "broken", "not installed, only on the path", _INSTALL)
        return
    yield Check("installed", "engine-fast", "ok", importlib.metadata.version("engine-fast"))
    for requirement in requirements:
        name, extra = _requirement(requirement)
        if extra == "dev":
            continue
        try:
            yield Check("installed", name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if extra:
                yield Check(
                    "installed", name, "absent", f"optional, extra [{extra}]", f"pip install 'engine-fast[{extra}]'"
                )
            else:
                yield Check("installed", name, "broken", "not installed", _INSTALL)


def compiled() -> Iterable[Check]:
    """The record in the extension, then whether it loads here."""
    try:
        info = extension.build_info()
    except BuildError as error:
        yield Check("compiled", "engine_fast._C", "broken", "not compiled, or damaged", str(error))
        return
    try:
        extension.load()
        yield Check("compiled", "engine_fast._C", "ok", f"loads; {info['compiler']}")
    except BuildError as error:
        yield Check("compiled", "engine_fast._C", "broken", "does not load", str(error))
    yield Check("compiled", "built for torch", "ok", info["torch"])
    best = extension.best_isa()
    advice = (
        ""
        if info["isa"] == best
        else f"This processor has {best}; rebuild with ENGINE_FAST_CPU_ISA=auto for more speed."
    )
    yield Check("compiled", "instruction set", "ok" if not advice else "absent", info["isa"], advice)
    if info["cuda"]:
        yield Check("compiled", "CUDA", "ok", info["cuda"])
    else:
        yield Check(
            "compiled", "CUDA", "absent", "CPU build", "For GPUs: a CUDA torch and toolkit, then ENGINE_FAST_CUDA=1."
        )


def operators() -> Iterable[Check]:
    """Which implementation of the vocabulary-sized operators runs, and whether the fused one trains like the plain."""
    from engine_fast import ops
    from engine_fast.training.parity import STEPS, check_parity

    name = "operators"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            chosen = ops.implementation()
        except EngineFastError as error:
            yield Check("usable", name, "broken", "ENGINE_FAST_OPS cannot be met", str(error))
            return
    if chosen == "reference":
        advice = str(caught[0].message) if caught else "Unset ENGINE_FAST_OPS for the compiled ones."
        yield Check("usable", name, "absent", "plain torch definitions", advice)
        return
    runs = [check_parity("SX", "ST", "keep"), check_parity("SX", "ST", "recompute"), check_parity("GX", "SG", "keep")]
    apart = [str(run) for run in runs if not run.agrees]
    if apart:
        advice = f"Train with ENGINE_FAST_OPS=reference, and report this: {'; '.join(apart)}"
        yield Check("usable", name, "broken", "fused and plain training steps differ", advice)
        return
    worst = max(run.fused_error for run in runs)
    found = f"fused; {STEPS} training steps agree with the plain definitions, within {worst:.0e}"
    yield Check("usable", name, "ok", found)


def deepspeed_imports() -> Iterable[Check]:
    """In a process of its own: it prints on import, and whatever it breaks is not ours then."""
    code = "import deepspeed; print('version', deepspeed.__version__)"
    environment = {"DS_ACCELERATOR": "cuda" if _cuda_devices() else "cpu", **os.environ}
    try:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        yield Check(
            "usable", "DeepSpeed", "broken", "its import hangs", "Look for a stale lock in TORCH_EXTENSIONS_DIR."
        )
        return
    version = re.search(r"^version (\S+)$", run.stdout, re.MULTILINE)
    if run.returncode == 0 and version:
        yield Check("usable", "DeepSpeed", "ok", f"{version[1]} imports ({environment['DS_ACCELERATOR']})")
    else:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check("usable", "DeepSpeed", "broken", f"import fails: {reason}", _INSTALL)


def processor() -> Iterable[Check]:
    features = extension.cpu_features()
    yield Check("usable", "CPU", "ok", f"{os.cpu_count()} cores, {extension.best_isa()}")
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in features]
    if fast:
        yield Check("usable", "bf16 on the CPU", "ok", ", ".join(fast))
    else:
        yield Check("usable", "bf16 on the CPU", "absent", "emulated", "Use precision: fp32 on this processor.")


def gpu() -> Iterable[Check]:
    import torch

    devices = _cuda_devices()
    if devices:
        yield Check("usable", "GPU", "ok", ", ".join(devices))
    elif torch.version.cuda:
        found = f"torch has CUDA {torch.version.cuda} and sees no device"
        yield Check(
            "usable", "GPU", "absent", found, "If there is a GPU, look at `nvidia-smi` and CUDA_VISIBLE_DEVICES."
        )
    else:
        yield Check(
            "usable", "GPU", "absent", "torch is a CPU build", "For a GPU: install a torch with CUDA, then rebuild."
        )


def tools() -> Iterable[Check]:
    for name, purpose in (("g++", "needed to rebuild the extension"), ("nvcc", "needed to build for GPUs")):
        where = shutil.which(name)
        if where:
            yield Check("usable", name, "ok", where)
        else:
            yield Check("usable", name, "absent", "not on PATH", f"Only {purpose}.")


def disk() -> Iterable[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    if free >= _MIN_FREE_BYTES:
        yield Check("usable", "disk", "ok", found)
    else:
        yield Check(
            "usable",
            "disk",
            "broken",
            found,
            f"A run needs about {_MIN_FREE_BYTES / 1e9:.0f} GB; free some, or --out elsewhere.",
        )


def corpora() -> Iterable[Check]:
    """Which corpora of the catalog stand ready as files."""
    from engine_fast.data.catalog import CATALOG, data_directory

    directory = data_directory()
    ready = [name for name, entry in CATALOG.items() if (directory / entry.folder).is_dir()]
    if ready:
        yield Check("usable", "corpora", "ok", f"{', '.join(ready)} in {directory}")
    else:
        hint = (
            "Set ENGINE_FAST_DATA to the folder that holds them, or let `prepare` fetch what can be. `demo` needs none."
        )
        yield Check("usable", "corpora", "absent", f"none of the catalog in {directory}", hint)


def _requirement(text: str) -> tuple[str, str]:
    """(distribution, extra or "") of one line of the metadata, such as `ruff; extra == "dev"`."""
    name = re.match(r"[A-Za-z0-9._-]+", text)
    extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", text)
    assert name, text
    return name[0], extra[1] if extra else ""


def _cuda_devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _show(checks: list[Check], works: bool, console: Console) -> None:
    table = Table(show_header=True, header_style="bold", expand=False)
    for title in ("", "what", "found", "what to do"):
        table.add_column(title, overflow="fold")
    group = ""
    for check in checks:
        if check.group != group:
            table.add_section()
            group = check.group
            table.add_row("", Text(group, "bold"))
        colour = _COLOURS[check.state]
        table.add_row(Text(check.state, colour), *map(Text, (check.name, check.found, check.advice)))
    console.print(table)
    broken = [check.name for check in checks if check.state == "broken"]
    console.print("Training works here." if works else f"Training cannot work here yet: {', '.join(broken)}.")
