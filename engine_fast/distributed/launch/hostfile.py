"""Hostfiles, read strictly: DeepSpeed takes `slots=1x` for 1 and runs locally when the file is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine_fast.errors import ConfigError

_NAME = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?)")
_ADDRESS_6 = re.compile(r"[0-9A-Fa-f:]*:[0-9A-Fa-f:.]+")
_MAX_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Host:
    """A host and the number of ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of `name slots=N` lines, in their order; `#` starts a comment.

    Raises ConfigError naming file and line: unreadable, not UTF-8, empty, a name that is none, bad slots, a duplicate.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"hostfile {path}: byte {error.start} is not UTF-8. Save it as plain text.") from error
    except OSError as error:
        raise ConfigError(
            f"hostfile {path}: cannot be read ({error.strerror}). Give a file of lines like `node1 slots=8`."
        ) from error
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"hostfile {path}, line {number}"
        host = _host(words, where)
        if host.name in hosts:
            raise ConfigError(
                f"{where}: {host.name} stands on line {lines[host.name]} already. One line a host; add up its slots."
            )
        hosts[host.name], lines[host.name] = host, number
    if not hosts:
        raise ConfigError(f"hostfile {path}: names no host. Give lines like `node1 slots=8`.")
    return list(hosts.values())


def is_host_name(name: str) -> bool:
    """Whether it is a host name or an address."""
    return bool(_NAME.fullmatch(name) or _ADDRESS_6.fullmatch(name))


def _host(words: list[str], where: str) -> Host:
    name, *rest = words
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} is not a host name, expected letters, digits, dots and hyphens. "
            "A user name or port belongs into ~/.ssh/config, an IPv6 address into /etc/hosts."
        )
    if len(rest) != 1 or not rest[0].startswith("slots="):
        got = " ".join(rest) or "nothing"
        raise ConfigError(f"{where}: got {got!r} after {name}, expected slots=N and nothing else.")
    count = rest[0].removeprefix("slots=")
    if not (count.isascii() and count.isdecimal() and 1 <= int(count[:9]) <= _MAX_SLOTS and len(count) <= 9):
        raise ConfigError(
            f"{where}: slots = {count!r}, expected a number from 1 to {_MAX_SLOTS}: the ranks that {name} takes."
        )
    return Host(name, int(count))
