"""Which of this machine's addresses and network interfaces lead to the other nodes."""

import os
import socket
import time
from ipaddress import ip_address

import psutil

from common.errors import KitError
from common.log import logger


def is_own_host(host: str) -> bool:
    """Whether `host` is this machine: one of its addresses can be listened on here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, _, _, _, address in found:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return True
    return False


def wait_for_port(host: str, port: int, seconds: float) -> str:
    """Empty as soon as something listens at `host`:`port`; after `seconds` without that, why the last try failed."""
    end, why = time.monotonic() + seconds, ""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, min(10.0, end - time.monotonic()))).close()
            return ""
        except OSError as error:
            why = error.strerror or why or "no answer"  # a timeout has no text of its own
        if time.monotonic() > end:
            return why
        time.sleep(0.5)


def address_towards(host: str, port: int) -> str | None:
    """This machine's address on the way to `host`; None when there is no way. Nothing is sent."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def check_gloo_interface() -> None:
    """Raises KitError when GLOO_SOCKET_IFNAME names an interface that this machine does not have."""
    given, known = os.environ.get("GLOO_SOCKET_IFNAME", ""), psutil.net_if_addrs()
    unknown = [name for name in given.split(",") if name and name not in known]
    if unknown:
        raise KitError(
            f"GLOO_SOCKET_IFNAME={given}: {unknown[0]} is no network interface of {socket.gethostname()}, which has"
            f" {', '.join(sorted(known))}"
        )


def choose_gloo_interface(address: str | None) -> None:
    """Has gloo use the interface of `address`, this machine's own towards the others, unless GLOO_SOCKET_IFNAME is set.

    Left to itself gloo takes the address that the machine's name resolves to, often 127.0.1.1, and no node finds it.
    """
    if address is None or ip_address(address).is_loopback or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    for name, found in psutil.net_if_addrs().items():
        if address in (each.address for each in found):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            logger.info("gloo: %s (%s), the way to the first node; GLOO_SOCKET_IFNAME chooses another", name, address)
