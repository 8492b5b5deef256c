import os
import socket
import threading
import time

import psutil
import pytest

from common.errors import KitError
from common.training.launching.interfaces import (
    address_towards,
    check_gloo_interface,
    is_own_host,
    select_gloo_interface,
    wait_for_port,
)


def external_interface() -> tuple[str, str] | None:
    """An interface of this machine and its address, not the loopback's."""
    for name, found in psutil.net_if_addrs().items():
        for each in found:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return name, each.address
    return None


def test_local_addresses_are_known() -> None:
    assert is_own_host("localhost") and is_own_host("127.0.0.1")
    assert not is_own_host("192.0.2.1")  # RFC 5737: reserved for documentation
    assert not is_own_host("no-such-host.invalid")


def test_a_port_is_waited_for() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert wait_for_port("127.0.0.1", port, 0.1) == "Connection refused"
        began = time.monotonic()
        threading.Timer(0.3, server.listen).start()
        assert wait_for_port("127.0.0.1", port, 10) == "" and time.monotonic() - began < 5


def test_the_route_to_a_host_starts_at_a_local_address() -> None:
    assert address_towards("127.0.0.1", 29500) == "127.0.0.1"
    assert address_towards("no-such-host.invalid", 29500) is None


@pytest.mark.skipif(external_interface() is None, reason="no network interface but the loopback")
def test_gloo_is_given_the_interface_of_an_address_unless_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = external_interface()
    assert found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    for nothing in (None, "127.0.0.1"):
        select_gloo_interface(nothing)
        assert os.environ["GLOO_SOCKET_IFNAME"] == ""
    select_gloo_interface(found[1])
    assert os.environ["GLOO_SOCKET_IFNAME"] == found[0]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    select_gloo_interface(found[1])
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_interface_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    check_gloo_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nothing7")
    with pytest.raises(KitError, match="has no network interface nothing7; give one of .*lo"):
        check_gloo_interface()
