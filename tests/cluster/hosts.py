"""Hosts made of Linux namespaces: each with its own name, address, processes, /dev/shm and sshd on port 22.

They hang on one switch, a bridge in a namespace of its own, so the machine's network is never touched; they
share its file system, as the hosts of a cluster share theirs. Nothing has a name outside: all of it ends with
the process that made it, however that ends (PR_SET_PDEATHSIG), and there is nothing to clean up but a folder.

A host needs its own process namespace: DeepSpeed's launcher ends a failed job by ``pkill -f`` on every host.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NETWORK = "10.77.0"
_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_SSHD = """Port 22
HostKey /etc/ssh/hostkey
AuthorizedKeysFile {folder}/id.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
PrintMotd no
MaxStartups 100
"""
_SSH = """Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  LogLevel ERROR
"""


def why_not() -> str | None:
    """Return why hosts cannot be made here, None if they can."""
    if os.geteuid() != 0:
        return "needs root: it makes network namespaces"
    programs = {"sshd": "openssh-server", "pdsh": "pdsh", "ip": "iproute2", "ethtool": "ethtool"}
    for program, package in programs.items():
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            return f"needs {program}: apt-get install {package} (all: docker/apt-cluster.txt)"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return f"unshare: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """``node1`` to ``nodeN``, connected and answering to ssh when the constructor returns."""

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder = folder
        self.names = [f"node{i + 1}" for i in range(num_hosts)]
        self._outer: dict[str, subprocess.Popen[bytes]] = {}
        self._wires: list[subprocess.Popen[bytes]] = []
        try:
            self._keys()
            self._switch = subprocess.Popen([*_DIE_WITH_US, "unshare", "--net", "sleep", "infinity"])
            _wait_until(lambda: _has_own_network(self._switch.pid), "the switch")
            self._on_switch("ip", "link", "add", "br0", "type", "bridge")
            self._on_switch("ip", "link", "set", "br0", "up")
            for name in self.names:
                self._start(name)
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def command(self, name: str, *command: str | Path) -> list[str]:
        """Return a command that runs ``command`` on a host, in the present working directory."""
        inside = ("nsenter", "--target", str(self._init(name)), "--all", f"--wd={Path.cwd()}", *command)
        return [str(part) for part in (*_DIE_WITH_US, *inside)]

    def run(self, name: str, *command: str | Path) -> str:
        done = subprocess.run(self.command(name, *command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{name}: {command}: {done.stderr}"
        return done.stdout

    def python_processes(self, name: str) -> list[tuple[int, str]]:
        """Return (pid on the host, command line) of every Python process there; none if it is off."""
        if self._outer[name].poll() is not None:
            return []
        lines = [
            line.split(None, 1) for line in self.run(name, "ps", "-ww", "-eo", "pid=,args=").splitlines()
        ]
        return [(int(pid), args) for pid, args in lines if "python" in args]

    def rank_processes(self, name: str) -> list[int]:
        """Return the pids of the ranks on a host: the trainer without its data workers and launchers."""
        found = [pid for pid, args in self.python_processes(name) if "-u launch/" in args]
        parents = dict(
            (int(pid), int(parent))
            for pid, parent in (
                line.split() for line in self.run(name, "ps", "-eo", "pid=,ppid=").splitlines()
            )
        )
        return [pid for pid in found if parents.get(pid) not in found]

    def cut(self, name: str) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        self._on_switch("ip", "link", "set", self._port(name), "down")

    def plug(self, name: str) -> None:
        """Put the cable back."""
        self._on_switch("ip", "link", "set", self._port(name), "up")

    def power_off(self, name: str) -> None:
        """End a host as a power cut does: no connection is closed any more, no process goes on."""
        self.cut(name)
        self._outer[name].kill()
        self._outer[name].wait()

    def limit(self, name: str, rate: str, latency: str = "400ms") -> None:
        """Make the way to and from a host slow: ``rate`` as tc writes it, such as 20mbit."""
        shape = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", latency)
        self._on_switch("tc", "qdisc", "replace", "dev", self._port(name), *shape)
        self.run(name, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def disturb(self, name: str, delay_ms: float, loss: float) -> None:
        """Add delay and loss both ways, by tc's netem or, where the kernel has none, by a wire."""
        port, shape = self._port(name), ("netem", "delay", f"{delay_ms}ms", "loss", f"{100 * loss}%")
        try:
            self._on_switch("tc", "qdisc", "replace", "dev", port, "root", *shape)
            self.run(name, "tc", "qdisc", "replace", "dev", "eth0", "root", *shape)
        except subprocess.CalledProcessError:
            self._put_wire_before(port, delay_ms / 1e3, loss)

    def connecting_seconds(self, name: str, other: str) -> float:
        """Return how long a TCP connection from one host to another's sshd takes: one round trip or more."""
        code = "import socket, sys, time; began = time.perf_counter(); "
        code += "socket.create_connection((sys.argv[1], 22)).close(); print(time.perf_counter() - began)"
        return float(self.run(name, sys.executable, "-c", code, self.address(other)))

    def overlay(self, name: str, path: Path, content: str) -> None:
        """Let one host see another content of a file."""
        other = self.folder / name / "overlay"
        other.write_text(content)
        self.run(name, "mount", "--bind", other, path)

    def remove_overlay(self, name: str, path: Path) -> None:
        self.run(name, "umount", path)

    def close(self) -> None:
        switch = [self._switch] if hasattr(self, "_switch") else []
        for process in [*self._wires, *self._outer.values(), *switch]:
            process.kill()
            process.wait()

    def _start(self, name: str) -> None:
        spaces = ("--net", "--pid", "--mount", "--uts", "--ipc", "--mount-proc", "--fork", "--kill-child")
        node = ("bash", Path(__file__).with_name("node.sh"), name, self.folder)
        with (self.folder / name / "log").open("w") as log:
            outer = subprocess.Popen(
                [*_DIE_WITH_US, "unshare", *spaces, *map(str, node)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._outer[name] = outer
        _wait_until(lambda: _has_own_network(outer.pid), name)
        port, switch = self._port(name), str(self._switch.pid)
        ends = ("peer", "name", "eth0", "netns", str(outer.pid))
        _call("ip", "link", "add", port, "netns", switch, "type", "veth", *ends)
        self._on_switch("ip", "link", "set", port, "master", "br0", "up")
        inside = ("nsenter", "--target", str(outer.pid), "--net", "ip")
        _call(*inside, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _call(*inside, "link", "set", "eth0", "up")
        probe = ("ssh", name, "true")
        _wait_until(
            lambda: (
                bool(_children(outer.pid))
                and subprocess.run(self.command(name, *probe), capture_output=True).returncode == 0
            ),
            f"sshd of {name}",
        )

    def _put_wire_before(self, port: str, delay_seconds: float, loss: float) -> None:
        """Unplug ``port`` from the switch and connect it again by a slow wire."""
        for name in self.names:  # the wire carries whole frames
            self.run(name, "ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off", "gro", "off")
        near, far = f"{port}near", f"{port}far"
        self._on_switch("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        self._on_switch("ip", "link", "set", near, "up")
        self._on_switch("ip", "link", "set", far, "master", "br0", "up")
        wire = (sys.executable, Path(__file__).with_name("wire.py"), port, near, delay_seconds, loss)
        inside = ("nsenter", "--target", self._switch.pid, "--net", *wire)
        self._wires.append(subprocess.Popen([str(part) for part in (*_DIE_WITH_US, *inside)]))
        self._on_switch("ip", "link", "set", port, "nomaster")

    def _keys(self) -> None:
        """Write a key of the user, one of every host, and who knows whom."""
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "id"))
        hosts = "127.0.0.1 localhost\n" + "".join(f"{self.address(n)} {n}\n" for n in self.names)
        known = []
        for name in self.names:
            ssh = self.folder / name / "ssh"
            ssh.mkdir(parents=True)
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "hostkey"))
            known.append(f"{name},{self.address(name)} {(ssh / 'hostkey.pub').read_text()}")
            (ssh / "sshd_config").write_text(_SSHD.format(folder=self.folder))
            (ssh / "ssh_config").write_text(_SSH.format(folder=self.folder))
            (self.folder / name / "hosts").write_text(hosts)
            (self.folder / name / "hostname").write_text(name + "\n")
            (self.folder / name / "resolv.conf").write_text("")
        (self.folder / "known_hosts").write_text("".join(known))

    def _init(self, name: str) -> int:
        """Return the pid, seen from outside, of a host's PID 1."""
        return _children(self._outer[name].pid)[0]

    def _port(self, name: str) -> str:
        return f"port{self.names.index(name) + 1}"

    def _on_switch(self, *command: str) -> None:
        _call("nsenter", "--target", str(self._switch.pid), "--net", *command)


@contextmanager
def hosts_up(folder: Path, num_hosts: int) -> Iterator[Hosts]:
    """Yield so many hosts; they are gone afterwards."""
    hosts = Hosts(folder, num_hosts)
    try:
        yield hosts
    finally:
        hosts.close()


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _has_own_network(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _wait_until(is_there: "object", what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_there():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} did not come up in {seconds:g} s"
        time.sleep(0.05)
