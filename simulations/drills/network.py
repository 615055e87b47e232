"""A network of this machine's own: places in namespaces, and every packet between them comes through here.

Each place has one interface, `wan` (a TUN device), and nothing else but its loopback. What it sends arrives
in this process, which counts it, and then loses, delays, or passes it on to the place that it is for. So a
line can be cut or made bad without any module of the kernel's, and nothing leaves a place unseen. A place
called `… custodian` has no interface at all.

It needs root, `ip` and /dev/net/tun. Packets are whole IPv4 packets, headers included.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.errors import UserError

INTERFACE = "wan"
PACKET = 65536
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_TCP, _UDP = 6, 17


@dataclass
class Traffic:
    """What a place has sent.

    Attributes:
        bytes: In all, IP headers included.
        packets: How many.
        to: Packets by where they went: address, protocol number, port (0 if there is none).
    """

    bytes: int = 0
    packets: int = 0
    to: Counter[tuple[str, int, int]] = field(default_factory=Counter)


@dataclass
class Network:
    """The network; `Network.between` makes it.

    Attributes:
        loss: Share of packets that is lost.
        delay: Seconds that each packet takes.
        cut: Places whose line is down.
        sent: What each place has sent.
    """

    _ends: dict[str, int]
    _names: dict[str, str]
    _addresses: dict[str, str]
    loss: float = 0.0
    delay: float = 0.0
    cut: set[str] = field(default_factory=set)
    sent: dict[str, Traffic] = field(default_factory=dict)
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _closed: bool = False

    @classmethod
    @contextlib.contextmanager
    def between(cls, places: Sequence[str]) -> "Iterator[Network]":
        """Make a network of these places; all of it is gone afterwards.

        Raises:
            UserError: if this machine doesn't let us.
        """
        require_network()
        names = {place: f"gr{os.getpid()}-{number}" for number, place in enumerate(places)}
        addresses = {place: f"10.99.0.{number + 1}" for number, place in enumerate(places)}
        nowhere = f"gr{os.getpid()}-nowhere"
        ends: dict[str, int] = {}
        try:
            _ip("netns", "add", nowhere)
            for place, name in names.items():
                _ip("netns", "add", name)
                _ip(
                    "netns",
                    "exec",
                    name,
                    "sh",
                    "-c",
                    "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 || true",
                )
                ends[place] = _tun_within(name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "addr", "add", f"{addresses[place]}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
                _ip("-n", name, "route", "add", "default", "dev", INTERFACE)
            network = cls(ends, names | {"": nowhere}, addresses, sent={place: Traffic() for place in places})
            thread = threading.Thread(target=network._carry, daemon=True)
            thread.start()
            try:
                yield network
            finally:
                network._closed = True
                thread.join()
        finally:
            for end in ends.values():
                os.close(end)
            for name in (*names.values(), nowhere):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def address(self, place: str) -> str:
        """A place's address."""
        return self._addresses[place]

    def prefix(self, place: str) -> list[str]:
        """What stands before a command that is to run at a place."""
        return ["ip", "netns", "exec", self._names.get(place, self._names[""])]

    def _carry(self) -> None:
        place_of = {end: place for place, end in self._ends.items()}
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._closed:
            patience = max(0.0, min(0.05, under_way[0][0] - time.monotonic())) if under_way else 0.05
            for end in select.select(list(place_of), [], [], patience)[0]:
                packet, place = os.read(end, PACKET), place_of[end]
                target = self._note(place, packet)
                if target is not None and self._passes(place, target):
                    number += 1
                    due = time.monotonic() + self.delay
                    heapq.heappush(under_way, (due, number, self._ends[target], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):
                    os.write(end, packet)

    def _passes(self, place: str, target: str) -> bool:
        return self.cut.isdisjoint((place, target)) and self._random.random() >= self.loss

    def _note(self, place: str, packet: bytes) -> str | None:
        """Count a packet and return the place that it is for, or None if there is no such place."""
        traffic = self.sent[place]
        traffic.bytes += len(packet)
        traffic.packets += 1
        if packet[0] >> 4 != 4:
            traffic.to["not IPv4", packet[6], 0] += 1
            return None
        header, protocol = 4 * (packet[0] & 15), packet[9]
        port = 0
        if protocol in (_TCP, _UDP) and len(packet) >= header + 4:
            port = int(struct.unpack("!H", packet[header + 2 : header + 4])[0])
        target = ".".join(map(str, packet[16:20]))
        traffic.to[target, protocol, port] += 1
        return next((place for place, one in self._addresses.items() if one == target), None)


def require_network() -> None:
    """See whether this machine can have such a network.

    Raises:
        UserError: saying what is missing.
    """
    missing = [
        what
        for what, there in (
            ("root", os.geteuid() == 0),
            ("the program ip (iproute2)", shutil.which("ip") is not None),
            ("/dev/net/tun", os.access("/dev/net/tun", os.R_OK | os.W_OK)),
        )
        if not there
    ]
    if missing:
        raise UserError(f"a network of one's own needs {', '.join(missing)}: not on this machine")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _tun_within(namespace: str) -> int:
    """Make the interface of a namespace; return the end that is here."""
    made: list[int | OSError] = []

    def make() -> None:  # in a thread of its own: the namespace is the thread's, and goes with it
        try:
            place = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(place, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            os.close(place)
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            request = struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(end, _TUNSETIFF, request)
            made.append(end)
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise UserError(f"no interface can be made in {namespace}: {made[0].strerror}")
    return made[0]
