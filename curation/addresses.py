"""Which addresses of the internet may be asked for an image, held at the moment of the connection.

A URL from a table is hostile: its host may be, or resolve to, an address inside the cluster.  What counts is therefore
the address that a socket is about to connect to, whatever name, redirect or odd spelling led there.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052


class RefusedAddress(OSError):
    """The address is private, link-local, loopback, reserved, or for many at once."""


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is a single host of the open internet, also one that is packed into another."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local or int(ip) >> 32 == 0:  # the latter: IPv4-compatible, long out of use
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


def parse_networks(text: str) -> Networks:
    """``10.0.0.0/8,fd00::/8`` as networks.  Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def public_sockets(allowed: Networks = ()) -> Callable[[tuple[Any, ...]], socket.socket]:
    """What makes a socket for one result of ``getaddrinfo``, and raises RefusedAddress for one that is not public.

    allowed: networks that may be asked although they are not.
    """

    def make_socket(address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, place = address
        text = str(place[0]).partition("%")[0]
        if not is_public(text) and not any(ipaddress.ip_address(text) in network for network in allowed):
            raise RefusedAddress(f"refused_address {text}")
        return socket.socket(family, kind, protocol)

    return make_socket
