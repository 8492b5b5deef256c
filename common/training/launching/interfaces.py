"""This machine's addresses and network interfaces, as far as they matter for reaching the other nodes."""

import os
import socket
import time
from ipaddress import ip_address

import psutil

from common.errors import KitError
from common.log import logger


def is_own_host(host: str) -> bool:
    """Whether `host` is this machine: a socket can be bound to one of its addresses."""
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


def wait_for_port(host: str, port: int, timeout_s: float) -> str:
    """Empty as soon as a server listens at `host`:`port`; after `timeout_s` seconds, why the last attempt failed."""
    end, cause = time.monotonic() + timeout_s, ""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, min(10.0, end - time.monotonic()))).close()
            return ""
        except OSError as error:
            cause = error.strerror or cause or "no answer"  # a timeout has no strerror
        if time.monotonic() > end:
            return cause
        time.sleep(0.5)


def address_towards(host: str, port: int) -> str | None:
    """This machine's address on the route to `host`; None without a route. Sends nothing."""
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
            f"GLOO_SOCKET_IFNAME={given}: {socket.gethostname()} has no network interface {unknown[0]}; give one of"
            f" {', '.join(sorted(known))}"
        )


def select_gloo_interface(address: str | None) -> None:
    """Sets GLOO_SOCKET_IFNAME to the interface of `address`, this machine's own towards the others, unless it is set.

    By default gloo uses the address that the hostname resolves to, often 127.0.1.1, which no other node can reach.
    """
    if address is None or ip_address(address).is_loopback or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    for name, found in psutil.net_if_addrs().items():
        if address in (each.address for each in found):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            logger.info(
                "gloo uses %s (%s), the route to the first node; set GLOO_SOCKET_IFNAME for another", name, address
            )
