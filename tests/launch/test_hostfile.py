"""Hostfiles: what is read, and what is refused with file, line, what came and what was wanted."""

from __future__ import annotations

import pytest

from engine_fast.distributed.launch.hostfile import Host, read_hostfile
from engine_fast.errors import ConfigError


def test_hosts_in_order(tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(b"# cluster\nnode-1 slots=8\r\n\n  10.0.0.7\tslots=2  # old\nA_b.example.org slots=1024")
    assert read_hostfile(path) == [Host("node-1", 8), Host("10.0.0.7", 2), Host("A_b.example.org", 1024)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "names no host"),
        (b"# nothing\n\n", "names no host"),
        (b"n1 slots=2\nn2 slots=1\nn1 slots=1\n", r"line 3: n1 stands on line 1 already"),
        (b"n1 slots=0", r"line 1: slots = '0', expected a number from 1 to 1024"),
        (b"n1 slots=-1", "slots = '-1'"),
        (b"n1 slots=1x", "slots = '1x'"),
        (b"n1 slots=1.5", "slots = '1.5'"),
        (b"n1 slots=", "slots = ''"),
        (b"n1 slots=1025", "slots = '1025'"),
        (b"n1 slots=99999999999999999999", "slots = '9999"),
        ("n1 slots=\u0663".encode(), "slots = "),
        (b"\nn1", "line 2: got 'nothing' after n1, expected slots=N"),
        (b"n1 8", "got '8' after n1"),
        (b"n1 slots=1 junk", "got 'slots=1 junk' after n1"),
        (b"n1 slots=1 slots=2", "got 'slots=1 slots=2'"),
        (b"n1 slots = 1", "got 'slots = 1'"),
        (b"n1 SLOTS=1", "got 'SLOTS=1'"),
        (b"user@n1 slots=1", r"line 1: 'user@n1' is not a host name.*~/.ssh/config"),
        (b"n1:22 slots=1", "'n1:22' is not a host name"),
        (b"-oProxyCommand=id slots=1", "is not a host name"),
        (b"n[1-4] slots=1", "is not a host name"),
        (b"n1,n2 slots=1", "is not a host name"),
        (b"$(id) slots=1", "is not a host name"),
        (b"`id` slots=1", "is not a host name"),
        (b"n1;id slots=1", "is not a host name"),
        (b"^hosts slots=1", "is not a host name"),
        ("kn\u00f6ten slots=1".encode(), "is not a host name"),
        (b"\xff\xfen1 slots=1", "byte 0 is not UTF-8"),
    ],
)
def test_refused(tmp_path, text, says):
    path = tmp_path / "my hosts"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"hostfile {path}")


def test_missing_or_a_directory(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_hostfile(path)
