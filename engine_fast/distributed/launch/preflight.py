"""Ask every host, over the transport that will start the ranks, whether it can take part; name each that cannot."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_fast.distributed.launch import probe, processes
from engine_fast.distributed.launch.commands import helper, remote_command
from engine_fast.distributed.launch.hostfile import Host

TIMEOUT = 60.0
_CLOCK_SECONDS = 5.0
_MIN_FREE_BYTES = 100_000_000
_AT_ONCE = 64
_ADVICE = {
    "permission denied": "`ssh {host}` must work without a password: copy your public key there.",
    "host key verification failed": "Log in once by `ssh {host}`, so that its key is known.",
    "connection refused": "Start sshd there, or give its port in ~/.ssh/config.",
    "could not resolve hostname": "Correct the name in the hostfile, or add it to /etc/hosts.",
    "no module named": "Install engine_fast there as it is here, at the same path.",
    "no such file or directory": "Python must stand at the same path on every host.",
    "command not found": "Python, or the transport's own program, is missing there or here.",
    "not found": "Python must stand at the same path on every host.",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What preflight found."""

    hosts: tuple[Host, ...]
    """Those that can take part."""
    failures: Mapping[str, str]
    """Host -> why not, and what to do."""
    master_addr: str
    port: int
    versions: Mapping[str, str]


Ask = Callable[[str, Sequence[str]], tuple[int, str, str]]
"""(host, argv) -> (exit code, standard output, standard error); code -1: no answer in time."""


def check_hosts(
    hosts: Sequence[Host], root: Path, *, ask: Ask, python: str, cwd: str, master: str, port: int, gpus: bool = True
) -> Report:
    """Probe all hosts at once. The first that can take part holds the master port.

    root: OUT/launch, on the shared file system. master: "" = the name of that host, or its address if others do not
    know the name. gpus: the ranks use them where there are any, one each.
    """
    nonce = f".nonce-{secrets.token_hex(8)}"
    (root / nonce).write_text(nonce, encoding="utf-8")
    try:
        here = probe.versions()

        def one(host: Host, name: str, wanted: int) -> tuple[dict[str, Any], str]:
            question = {"root": str(root), "nonce": nonce, "cwd": cwd, "port": wanted, "master": name}
            started = time.time()
            code, said, complaint = ask(host.name, helper(python, "probe", probe.pack(question)))
            answer = probe.find_answer(said)
            if answer is None:
                return {}, _unreachable(host.name, code, said, complaint)
            return answer, unfit(answer, nonce=nonce, here=here, started=started, ended=time.time(), root=root, cwd=cwd)

        name = master or hosts[0].name
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(lambda host: one(host, name, port if host is hosts[0] else 0), hosts))
    finally:
        (root / nonce).unlink(missing_ok=True)
    anywhere = any(answer.get("gpus") for answer, _ in found)
    answers, failures = dict[str, dict[str, Any]](), dict[str, str]()
    for host, (answer, failure) in zip(hosts, found, strict=True):
        if gpus and not failure:
            failure = short_of_gpus(answer["gpus"], host.slots, anywhere=anywhere)
        if failure:
            failures[host.name] = failure
        else:
            answers[host.name] = answer
    first = answers.get(hosts[0].name)
    if first is not None and not first["port_free"]:
        del answers[hosts[0].name]
        failures[hosts[0].name] = f"port {port} is in use. Choose another --port, or 0 for a free one."
    able = tuple(host for host in hosts if host.name in answers)
    if not able:
        return Report((), failures, "", 0, here)
    address = _master_of(able, answers, name=name, given=bool(master), changed=able[0] is not hosts[0])
    if not address:
        failures[able[0].name] = "the other hosts cannot find it by name, and it names no address. Give --master."
        return Report((), failures, "", 0, here)
    return Report(able, failures, address, int(answers[able[0].name]["port"]), here)


def describe(failures: Mapping[str, str], total: int) -> str:
    """One line a host."""
    lines = "".join(f"\n  {host}: {failure}" for host, failure in failures.items())
    return f"{len(failures)} of {total} hosts cannot take part:{lines}"


def asking(launcher: str, environ: Mapping[str, str], forwarded: Mapping[str, str], given_up: threading.Event) -> Ask:
    """Over this transport. Once `given_up` is set, every question in hand ends."""

    def ask(host: str, argv: Sequence[str]) -> tuple[int, str, str]:
        command = remote_command(launcher, host, argv, environ, forwarded)
        try:
            return processes.run(
                command.argv, environment=command.environment, cwd=command.cwd, timeout=TIMEOUT, given_up=given_up
            )
        except OSError as error:
            return 127, "", f"{command.argv[0]}: {error.strerror}"

    return ask


def _unreachable(host: str, code: int, said: str, complaint: str) -> str:
    if code == -1:
        return f"no answer within {TIMEOUT:g} s. Look whether it is up, and whether `ssh {host} true` returns."
    lines = [line.strip() for line in (complaint or said).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("pdsh@")] or lines
    reason = lines[-1][:200] if lines else f"exit code {code} without a word"
    known = [advice for sign, advice in _ADVICE.items() if sign in " ".join(lines).lower()]
    advice = known[0] if known else f"Try `ssh {host} true`."
    return f"{reason.rstrip('.')}. {advice.format(host=host)}"


def unfit(
    answer: Mapping[str, Any],
    *,
    nonce: str,
    here: Mapping[str, str],
    started: float,
    ended: float,
    root: Path,
    cwd: str,
) -> str:
    """Why a host that answered cannot take part; empty if it can."""
    if answer["nonce"] != nonce:
        return f"does not see the files in {root}. --out must be on a file system that all hosts share."
    if not answer["writable"]:
        return f"cannot write into {root}. Give this user the right to, on that host too."
    if answer["free_bytes"] < _MIN_FREE_BYTES:
        return f"{root} has {answer['free_bytes'] / 1e6:.0f} MB free, {_MIN_FREE_BYTES / 1e6:.0f} MB are needed."
    if not answer["cwd"]:
        return f"has no directory {cwd}. Start from one that every host has."
    theirs = answer["versions"]
    apart = [f"{name} {theirs.get(name)} (here {ours})" for name, ours in here.items() if theirs.get(name) != ours]
    if apart:
        return f"differs: {', '.join(apart)}. Install and compile the same there as here."
    offset = max(started - answer["time"], answer["time"] - ended)
    if offset > _CLOCK_SECONDS:
        return f"its clock is {offset:.0f} s off. Let both hosts set their clocks (chrony, ntpd)."
    return ""


def short_of_gpus(gpus: int, ranks: int, *, anywhere: bool) -> str:
    """Why a host with so many GPUs cannot have so many ranks; empty if it can. anywhere: another host has some."""
    if gpus >= ranks or not (gpus or anywhere):
        return ""
    return (
        f"has {gpus} GPUs for {ranks} ranks. Start as many ranks as GPUs, "
        "or set runtime.device = cpu, or hide the GPUs: "
        "`CUDA_VISIBLE_DEVICES= engine-fast launch --forward CUDA_VISIBLE_DEVICES ...`."
    )


def _master_of(
    able: Sequence[Host], answers: Mapping[str, Mapping[str, Any]], *, name: str, given: bool, changed: bool
) -> str:
    """The name of the first host if every other one can resolve it to something but loopback, else its address."""
    if given and not changed:
        return name
    others = [answers[host.name]["resolves"] for host in able[1:]]
    far = all(any(not address.startswith("127.") and address != "::1" for address in found) for found in others)
    if not changed and far and answers[able[0].name]["resolves"]:
        return name
    addresses = answers[able[0].name]["addresses"]
    return str(addresses[0]) if addresses else ""
