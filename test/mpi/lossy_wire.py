"""A bad network between hosts: a hub in this process that delays and drops frames.

Linux has netem for this, but kernels of virtual machines often lack it. Here each host has a TAP
device whose other end is a file descriptor of this process. Frames go to all other hosts, after a
delay, or never.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import selectors
import struct
import threading
import time

from hosts import Cluster, run

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000


class BadCluster(Cluster):
    """Hosts on a hub that takes `delay` seconds and loses a share `loss` of the frames."""

    def __init__(self, *names: str, delay: float, loss: float, seed: int = 1) -> None:
        self._delay = delay
        self._loss = loss
        self._chance = random.Random(seed)
        self._taps: list[int] = []
        self._ends = False
        self.carried = self.lost = 0
        super().__init__(*names)
        self._hub = threading.Thread(target=self._carry, daemon=True)
        self._hub.start()

    def connect(self) -> None:
        """Makes a TAP device a host and moves its network end there."""
        for host in self.hosts.values():
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            request = struct.pack("16sH22x", b"net0", _TAP_WITHOUT_HEADER)
            fcntl.ioctl(tap, _TUNSETIFF, request)
            run("ip", "link", "set", "net0", "netns", host.pid)
            self._taps.append(tap)
            self.bring_up(host)

    def disconnect(self) -> None:
        """Stops the hub."""
        self._ends = True
        self._hub.join()
        for tap in self._taps:
            os.close(tap)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # due, number, from, frame
        selector = selectors.DefaultSelector()
        for tap in self._taps:
            selector.register(tap, selectors.EVENT_READ)
        while not self._ends:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, origin, frame = heapq.heappop(waiting)
                self._deliver(origin, frame)
            pause = min(waiting[0][0] - now, 0.05) if waiting else 0.05
            for key, _ in selector.select(max(pause, 0)):
                self._take(key.fd, waiting)

    def _take(self, tap: int, waiting: list[tuple[float, int, int, bytes]]) -> None:
        for _ in range(64):
            try:
                frame = os.read(tap, 65536)
            except OSError:
                return  # nothing more, or its host is gone
            if self._chance.random() < self._loss:
                self.lost += 1
                continue
            self.carried += 1
            heapq.heappush(waiting, (time.monotonic() + self._delay, self.carried, tap, frame))

    def _deliver(self, origin: int, frame: bytes) -> None:
        for tap in self._taps:
            if tap != origin:
                try:
                    os.write(tap, frame)
                except OSError:
                    self.lost += 1  # its host is down
