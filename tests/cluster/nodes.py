"""Two nodes and a head on one machine: namespaces joined by a bridge, an sshd in each node, one file system.

Each has its own network, host name, processes and mounts, so that PIDs and addresses of one mean nothing in another.
Nothing outside of the namespaces is changed: no interface, no file under /etc or ~/.ssh, no service. The head is where
a person sits: it holds the bridge and the ssh client's key, and runs the launcher.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INIT = Path(__file__).with_name("init.py")
TOOLS = ("ip", "mount", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "sshd", "pdsh")
NETWORK = "10.77.0"
_SSHD_PID = Path("/run/sshd.pid")
_SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def obstacle() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "namespaces as nodes need root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_SBIN) is None]
    if missing:
        return f"{', '.join(missing)} not found; tests/cluster/install.sh installs them on Debian"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "type", "veth"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a node."""

    pid: int
    """As the node sees it."""
    outside: int
    """As the test sees it."""
    parent: int
    """As the node sees it; 0: started from outside."""
    command: str
    state: str


class Node:
    """One machine. `start` and `power_off` as often as wanted."""

    def __init__(self, name: str, address: str, *, binds: Mapping[Path, str]) -> None:
        self.name, self.address, self._binds = name, address, binds
        self._init: subprocess.Popen[str] | None = None
        self._pid = 0

    def start(self) -> None:
        binds = [f"{source}={target}" for source, target in self._binds.items()]
        self._init = subprocess.Popen(
            ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=SIGKILL",
             sys.executable, "-S", str(INIT), self.name, *binds],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PATH": _SBIN},
        )  # fmt: skip
        assert self._init.stdout is not None
        if self._init.stdout.readline() != "ready\n":
            raise RuntimeError(f"node {self.name} did not start")
        self._pid = int(Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text())

    def power_off(self) -> None:
        """Everything that runs on the node ends at once, its network with it."""
        if self._init is not None:
            for stream in (self._init.stdin, self._init.stdout):
                if stream is not None:
                    stream.close()
            self._init.wait()
            self._init, self._pid = None, 0

    @property
    def is_on(self) -> bool:
        return self._init is not None

    @property
    def pid(self) -> int:
        """Of the node's first process, as the test sees it."""
        return self._pid

    def path(self, path: Path) -> Path:
        """A path of the node's own mounts, as the test sees it."""
        return Path(f"/proc/{self._pid}/root{path}")

    def inside(self, command: Sequence[str | Path], *, cwd: Path | None = None) -> list[str]:
        """The command line that runs `command` in the node, until the test ends: a stopped nsenter would not notice."""
        where = ["env", "-C", str(cwd)] if cwd is not None else []
        enter = ["setpriv", "--pdeathsig", "KILL", "nsenter"]
        return [*enter, "-t", str(self._pid), "-m", "-u", "-i", "-n", "-p", "--", *where, *map(str, command)]

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a short command in the node."""
        environment = {"PATH": _SBIN}
        done = subprocess.run(
            self.inside(command), capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(map(str, command))}: {done.stderr.strip()}")
        return done

    def processes(self) -> list[Process]:
        """What lives there besides init and the waiting sshd; zombies are dead."""
        if not self.is_on:
            return []
        namespace = os.readlink(f"/proc/{self._pid}/ns/pid")
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(directory / "ns/pid") != namespace or int(directory.name) == self._pid:
                    continue
                status = dict(
                    line.split(":", 1) for line in (directory / "status").read_text().splitlines() if ":" in line
                )
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (OSError, ValueError):
                continue  # it ended while it was looked at
            if status["State"].split()[0] in "ZX" or "[listener]" in command:
                continue
            found.append((directory, status, command))
        inner = {int(directory.name): int(status["NSpid"].split()[-1]) for directory, status, _ in found}
        return sorted(
            (
                Process(
                    inner[int(directory.name)],
                    int(directory.name),
                    inner.get(int(status["PPid"]), 1 if int(status["PPid"]) == self._pid else 0),
                    command or status["Name"].strip(),
                    status["State"].split()[0],
                )
                for directory, status, command in found
            ),
            key=lambda process: process.pid,
        )

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Signal a process by the PID that it has in the node."""
        for process in self.processes():
            if process.pid == pid:
                os.kill(process.outside, number)
                return
        raise ProcessLookupError(f"{self.name} has no process {pid}")

    def hide_python(self) -> None:
        """From now on the node has no virtual environment, as if nobody had installed it there."""
        empty = Path("/run/empty")
        self.run("mkdir", "-p", empty)
        self.run("mount", "--bind", empty, Path(sys.prefix, "bin"))

    def show_python(self) -> None:
        self.run("umount", Path(sys.prefix, "bin"))

    def stop_sshd(self) -> None:
        self.run("kill", self.path(_SSHD_PID).read_text().strip())
        self._wait_for_sshd(False)

    def start_sshd(self) -> None:
        self.run(shutil.which("sshd", path=_SBIN) or "sshd", "-E", "/run/sshd.log")
        self._wait_for_sshd(True)

    def _wait_for_sshd(self, there: bool) -> None:
        """It writes its PID once it listens, and removes it as the last thing."""
        limit = time.monotonic() + 20
        while self.path(_SSHD_PID).exists() != there:
            if time.monotonic() > limit:
                raise RuntimeError(f"sshd of {self.name}: {self.run('cat', '/run/sshd.log').stdout}")
            time.sleep(0.02)


class Cluster:
    """A head and `names` as nodes; a context manager. `directory` is kept private: it holds keys."""

    def __init__(self, directory: Path, names: Sequence[str] = ("engine-a", "engine-b")) -> None:
        self.directory = directory
        self.addresses = {name: f"{NETWORK}.{11 + number}" for number, name in enumerate(names)}
        self._write_files()
        ssh, nodes_ssh, hosts = directory / "client", directory / "server", directory / "hosts"
        common = {hosts: "/etc/hosts"}
        shadow = {directory / "shadow": "/etc/shadow"}
        self.head = Node("engine-head", f"{NETWORK}.1", binds={**common, ssh: "/etc/ssh", **self._no_user_ssh()})
        self.nodes = [
            Node(name, address, binds={**common, **shadow, nodes_ssh: "/etc/ssh", **self._no_user_ssh()})
            for name, address in self.addresses.items()
        ]

    def __enter__(self) -> Cluster:
        try:
            self.head.start()
            for command in (
                ("ip", "link", "add", "br0", "type", "bridge"),
                ("ip", "address", "add", f"{self.head.address}/24", "dev", "br0"),
                ("ip", "link", "set", "br0", "up"),
            ):
                self.head.run(*command)
            for node in self.nodes:
                self.power_on(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in (*self.nodes, self.head):
            node.power_off()

    def power_on(self, node: Node) -> None:
        """Start a node, plug it in, and let its sshd answer."""
        node.start()
        plug = self._plug(node)
        self.head.run("ip", "link", "delete", plug, check=False)  # of the node's last life: the kernel takes its time
        # From outside, because only there the node's PID means anything; both ends are born inside of namespaces.
        subprocess.run(
            ["nsenter", "-t", str(self.head.pid), "-n", "--",
             "ip", "link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid)],
            check=True,
        )  # fmt: skip
        self.head.run("ip", "link", "set", plug, "master", "br0", "up")
        node.run("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        node.start_sshd()

    def ready(self) -> None:
        """Bring every node back to a state in which it can be used, whatever the last test did to it."""
        for node in self.nodes:
            node.power_off()
            self.power_on(node)
        for process in self.head.processes():
            os.kill(process.outside, signal.SIGKILL)

    def cut(self, node: Node) -> None:
        """Pull the node's plug out of the switch: packets are lost, nobody is told."""
        self.head.run("ip", "link", "set", self._plug(node), "down")

    def heal(self, node: Node) -> None:
        self.head.run("ip", "link", "set", self._plug(node), "up")

    def hostfile(self, path: Path, *, slots: int = 1, by_address: bool = False) -> Path:
        """Write a hostfile of the nodes."""
        names = [node.address if by_address else node.name for node in self.nodes]
        path.write_text("".join(f"{name} slots={slots}\n" for name in names))
        return path

    def processes(self) -> dict[str, list[Process]]:
        """Of every machine, those that have any."""
        found = {node.name: node.processes() for node in (self.head, *self.nodes)}
        return {name: processes for name, processes in found.items() if processes}

    def _plug(self, node: Node) -> str:
        return f"to-{node.name}"

    def _no_user_ssh(self) -> dict[Path, str]:
        """The user's own ~/.ssh, if there is one, does not exist for the nodes."""
        own = Path("~/.ssh").expanduser()
        return {self.directory / "empty": str(own)} if own.is_dir() else {}

    def _write_files(self) -> None:
        client, server = self.directory / "client", self.directory / "server"
        for path in (client, server, self.directory / "empty"):
            path.mkdir(mode=0o700, parents=True)
        for path in (client / "key", server / "ssh_host_ed25519_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
        (server / "authorized_keys").write_text((client / "key.pub").read_text())
        host_key = " ".join((server / "ssh_host_ed25519_key.pub").read_text().split()[:2])
        lines = [f"{name},{address} {host_key}\n" for name, address in self.addresses.items()]
        (client / "known_hosts").write_text("".join(lines))
        (client / "ssh_config").write_text(
            "IdentityFile /etc/ssh/key\nIdentitiesOnly yes\nGlobalKnownHostsFile /etc/ssh/known_hosts\n"
            "UserKnownHostsFile /dev/null\nStrictHostKeyChecking yes\nBatchMode yes\n"
        )
        (server / "sshd_config").write_text(
            "HostKey /etc/ssh/ssh_host_ed25519_key\nAuthorizedKeysFile /etc/ssh/authorized_keys\nStrictModes no\n"
            "UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "UseDNS no\nPidFile /run/sshd.pid\n"
        )
        (self.directory / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        hosts = {"localhost": "127.0.0.1", "engine-head": f"{NETWORK}.1", **self.addresses}
        (self.directory / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
