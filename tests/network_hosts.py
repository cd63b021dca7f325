"""Hosts with addresses of their own on one machine: network namespaces that a bridge joins."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

INTERFACE = "eth0"


def run(*words):
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)


def why_not():
    """Why this machine allows no such hosts, or None."""
    name = f"m3er{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "-n", name, "link", "add", INTERFACE, "type", "bridge")
        finally:
            run("ip", "netns", "del", name)
    except FileNotFoundError:
        return "there is no command ip"
    except subprocess.CalledProcessError as error:
        return error.stderr.strip() or "network namespaces are not allowed"
    return None


class Hosts:
    """Some hosts, for a ``with`` block. Everything that runs on them ends with it."""

    def __init__(self, count):
        # The range is set aside for tests of networks; links have at most 15 letters.
        self._mark, number = f"m3er{os.getpid()}", os.getpid() % 65536
        self._hosts = [f"{self._mark}-{host}" for host in range(count)]
        self.addresses = [f"198.18.{number % 250}.{10 + host}" for host in range(count)]

    def __enter__(self):
        try:
            run("ip", "netns", "add", self._mark)  # the bridge has a namespace of its own
            run("ip", "-n", self._mark, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", self._mark, "link", "set", "bridge", "up")
            for host, (name, address) in enumerate(zip(self._hosts, self.addresses, strict=True)):
                port, peer = f"port{host}", ("peer", "name", INTERFACE, "netns", name)
                run("ip", "netns", "add", name)
                run("ip", "-n", self._mark, "link", "add", port, "type", "veth", *peer)
                run("ip", "-n", self._mark, "link", "set", port, "master", "bridge", "up")
                run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
                run("ip", "-n", name, "link", "set", INTERFACE, "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self._hosts:
            for _ in range(20):
                processes = self._processes(name)
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                if not processes:
                    break
                time.sleep(0.1)
        for name in (*self._hosts, self._mark):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)

    def start(self, host, *words, log, **environment):
        """Start a command on a host, with its output in a file."""
        with Path(log).open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._hosts[host], *map(str, words)],
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def cut_off(self, host):
        """Let nothing from or to a host through any more; what runs there goes on."""
        run("ip", "-n", self._mark, "link", "set", f"port{host}", "down")

    def runs(self, host, name):
        """Whether a process with this in its command line runs on a host."""
        for process in self._processes(self._hosts[host]):
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{process}/cmdline").read_text(errors="replace"):
                    return True
        return False

    @staticmethod
    def _processes(name):
        found = subprocess.run(
            ["ip", "netns", "pids", name], check=False, capture_output=True, text=True, timeout=30
        ).stdout
        return [int(process) for process in found.split()]
