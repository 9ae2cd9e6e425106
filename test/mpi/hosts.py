"""Several hosts on one machine, made of Linux namespaces.

A host has a network, a name, processes, shared memory and mounts of its own. Hosts are joined by a
bridge (`Cluster`) or by a hub that delays and drops frames (`lossy_wire.py`). For Open MPI and for
Zigzag ranks on two of them run on two machines: there is no shared memory, no process id in common
and no other way than the network.

Everything lies inside one more set of namespaces that `enter_laboratory()` makes. When the script
ends, in whatever way, the kernel ends every process in there and takes the networks away with them;
the machine's own network is never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

SKIPPED = 77  # the exit code that ctest takes for a skipped test
_INSIDE = "ZIGZAG_TEST_LABORATORY"
_TOOLS = ("unshare", "nsenter", "ip", "mount", "mpirun")
_NEW_SPACES = ("--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child")


def enter_laboratory() -> None:
    """Runs this script once more in namespaces of its own and exits with its code.

    Returns at once when called inside. Where namespaces are not permitted it says so and exits
    with SKIPPED.
    """
    if _INSIDE in os.environ:
        _settle()
        return
    missing = [tool for tool in _TOOLS if _which(tool) is None]
    if missing:
        _skip(f"{', '.join(missing)} not found (Debian: iproute2, util-linux, openmpi-bin)")
    with tempfile.TemporaryDirectory(prefix="zz") as folder:
        unshare = _working_unshare()
        child = subprocess.Popen(
            [*unshare, sys.executable, *sys.argv],
            env={**os.environ, _INSIDE: folder},
            preexec_fn=_die_with_parent,
        )
        # unshare ignores both; its end is the end of all that runs inside.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: child.kill())
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.kill()
            child.wait()
            code = 130
    sys.exit(code if code >= 0 else 1)


def _skip(reason: str) -> None:
    print(f"SKIPPED: several hosts cannot be made here: {reason}")
    sys.exit(SKIPPED)


def _which(tool: str) -> str | None:
    folders = [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin"]
    return next((f"{f}/{tool}" for f in folders if os.access(f"{f}/{tool}", os.X_OK)), None)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _working_unshare() -> list[str]:
    """The way to make namespaces here: as root, or as a user who becomes root of his own."""
    reasons = []
    probe = "ip link add one type veth peer name two && ip link add hub type bridge"
    for more in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *more, *_NEW_SPACES, "--mount-proc"]
        tried = subprocess.run(
            [*command, "sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin; {probe}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if tried.returncode == 0:
            return command
        reasons.append((tried.stderr.strip() or "no reason given").splitlines()[-1])
    _skip(f"as root: {reasons[0]}; with a user namespace: {reasons[1]}")
    raise AssertionError


def _settle() -> None:
    """First steps inside, as process 1: it must end on a signal, which needs a handler there."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    # In memory, so that nothing is left when this process is killed.
    run("mount", "-t", "tmpfs", "tmpfs", os.environ[_INSIDE])
    run("ip", "link", "set", "lo", "up")


def scratch() -> Path:
    """A folder that all hosts see, gone at the end."""
    return Path(os.environ[_INSIDE])


def run(*command: object) -> str:
    """Runs a command that must succeed; its output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """Namespaces with a name and an address, kept alive by one sleeping process."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        # What a machine has of its own: a name, and shared memory in /dev/shm.
        setup = f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && echo up"
        self._keeper = subprocess.Popen(
            [
                "unshare",
                *_NEW_SPACES,
                "--mount-proc",
                "sh",
                "-c",
                f"{setup} && exec sleep infinity",
            ],
            stdout=subprocess.PIPE,
            preexec_fn=_die_with_parent,
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"up\n":
            raise RuntimeError(f"host {name} did not come up")
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children").read_text()
        self.pid = int(children.split()[0])

    def inside(self, *command: object) -> list[str]:
        """The command line that runs a command on this host, in the caller's working folder."""
        spaces = ["--net", "--uts", "--ipc", "--pid", "--mount"]
        enter = ["nsenter", "-t", str(self.pid), *spaces, f"--wd={os.getcwd()}"]
        return [*enter, *map(str, command)]

    def processes(self) -> list[str]:
        """What runs here besides the keeper: "PID NAME", zombies left out."""
        found: list[str] = []
        try:
            mine = os.readlink(f"/proc/{self.pid}/ns/pid")
        except OSError:
            return found  # the host has lost its power
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                name = (entry / "comm").read_text().strip()
                if state != "Z" and os.readlink(entry / "ns/pid") == mine:
                    found.append(f"{entry.name} {name}")
            except OSError:
                continue  # it has just ended
        return found

    def clear(self) -> None:
        """Kills every process but the keeper."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.split()[0]), signal.SIGKILL)

    def end(self) -> None:
        """Power off: every process is killed at once and the network is gone."""
        self._keeper.kill()
        self._keeper.wait()
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()


class Door:
    """Stands for ssh: `agent HOST COMMAND...`, called on any host, runs the command on another.

    A process cannot enter the process ids of a sister namespace; this script, above all of them,
    can. The agent hands it the command and its own standard streams through a socket. As with ssh
    the command gets a fresh environment.
    """

    def __init__(self, hosts: dict[str, Host]) -> None:
        self._hosts = hosts
        path = scratch() / "door"
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self.agent = scratch() / "agent"
        self.agent.write_text(
            f"#!{sys.executable} -IS\n"
            "import socket, sys\n"
            "door = socket.socket(socket.AF_UNIX)\n"
            f"door.connect('{path}')\n"
            "socket.send_fds(door, ['\\0'.join(sys.argv[1:]).encode()], [0, 1, 2])\n"
            "sys.exit(int(door.recv(16) or 255))\n"
        )
        self.agent.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._answer, args=self._socket.accept()[:1]).start()

    def _answer(self, caller: socket.socket) -> None:
        with caller:
            words, streams, _, _ = socket.recv_fds(caller, 1 << 16, 3)
            name, *command = words.decode().split("\0")
            fresh = ["env", "-i", f"PATH={os.environ['PATH']}", "HOME=/", "sh", "-c"]
            line = self._hosts[name].inside(*fresh, " ".join(command))
            stdin, stdout, stderr = streams
            code = subprocess.call(line, stdin=stdin, stdout=stdout, stderr=stderr)
            for stream in streams:
                os.close(stream)
            with contextlib.suppress(OSError):  # the caller is gone
                caller.send(str(code if code >= 0 else 255).encode())

    def close(self) -> None:
        """No more callers."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Cluster:
    """Hosts on one bridge. A context manager; `mpirun` starts ranks from the first host."""

    def __init__(self, *names: str) -> None:
        self.hosts = {n: Host(n, f"10.99.0.{i + 1}") for i, n in enumerate(names)}
        self._door = Door(self.hosts)
        try:
            self.connect()
            names_file = scratch() / "hosts"
            lines = [f"{h.address} {h.name}" for h in self.hosts.values()]
            names_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
            for host in self.hosts.values():
                run(*host.inside("mount", "--bind", names_file, "/etc/hosts"))
        except BaseException:
            self.__exit__()
            raise

    def connect(self) -> None:
        """Plugs every host into the bridge."""
        run("ip", "link", "add", "switch", "type", "bridge")
        run("ip", "link", "set", "switch", "up")
        for host in self.hosts.values():
            port = f"to-{host.name}"
            far_end = ("peer", "name", "net0", "netns", host.pid)
            run("ip", "link", "add", port, "type", "veth", *far_end)
            run("ip", "link", "set", port, "master", "switch", "up")
            self.bring_up(host)

    def bring_up(self, host: Host) -> None:
        """Gives a host's end of its link an address."""
        run(*host.inside("ip", "link", "set", "lo", "up"))
        run(*host.inside("ip", "address", "add", f"{host.address}/24", "dev", "net0"))
        run(*host.inside("ip", "link", "set", "net0", "up"))

    def disconnect(self) -> None:
        """Takes cables and bridge away. The kernel would do so too, but some time later."""
        for link in (*(f"to-{name}" for name in self.hosts), "switch"):
            subprocess.run(["ip", "link", "delete", link], stderr=subprocess.DEVNULL, check=False)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.end()
        self._door.close()
        self.disconnect()

    def pull(self, name: str) -> None:
        """Pulls a host's cable out of the switch: both ends see the link go down."""
        run("ip", "link", "set", f"to-{name}", "down")

    def mute(self, name: str) -> None:
        """Drops every frame from and to a host; both ends see a link that is up."""
        run("ip", "link", "set", f"to-{name}", "nomaster")

    def bytes_to(self, name: str) -> int:
        """Bytes that came to a host over its link so far."""
        statistics = "/sys/class/net/net0/statistics/rx_bytes"
        # A new mount shows the network of the process that makes it.
        shown = run(
            *("nsenter", "-t", self.hosts[name].pid, "--net", "unshare", "--mount", "sh", "-c"),
            f"mount -t sysfs sysfs /sys && cat {statistics}",
        )
        return int(shown)

    def mpirun(self, ranks_of: dict[str, int], *command: object, flags: Sequence[str] = ()) -> Job:
        """Starts a command with so many ranks on each host."""
        placement = ",".join(f"{host}:{ranks}" for host, ranks in ranks_of.items())
        line = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", sum(ranks_of.values())]
        line += ["--host", placement, "--mca", "plm_rsh_agent", self._door.agent]
        line += ["--mca", "btl_tcp_if_include", "net0", "--mca", "oob_tcp_if_include", "net0"]
        line += ["--mca", "orte_tmpdir_base", scratch(), *flags, *command]
        return Job(list(self.hosts.values()), line)


class Job:
    """A command under mpirun, which runs on the first host."""

    def __init__(self, hosts: list[Host], line: list[object]) -> None:
        self.hosts = hosts
        self.line = hosts[0].inside(*line)
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            self.line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.out = self.err = ""
        self.code: int | None = None
        self.seconds = 0.0

    def wait(self, timeout: float) -> Job:
        """Waits for mpirun's end; `code` stays None when it did not end in time."""
        try:
            out, err = self._process.communicate(timeout=timeout)
            self.out, self.err = out.decode(), err.decode()
            self.code = self._process.returncode
        except subprocess.TimeoutExpired:
            pass
        self.seconds = time.monotonic() - self.started
        return self

    def end(self) -> None:
        """Kills all that runs on the hosts, if mpirun still does, and takes what it printed."""
        while self.code is None:
            # Again, should something have been forked meanwhile.
            for host in self.hosts:
                host.clear()
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = self._process.communicate(timeout=1)
                self.out, self.err = out.decode(), err.decode()
                return

    def passes(self, timeout: float = 120) -> str:
        """The output of a command that must succeed in time."""
        self.wait(timeout)
        if self.code != 0:
            self.end()
            how = "did not end" if self.code is None else f"ended with {self.code}"
            raise AssertionError(f"{shlex.join(self.line)} {how}\n{self.out}\n{self.err}")
        return self.out
