"""Parse and format ``host:port``. Standard library only."""

import re
import socket

DEFAULT_PORT = 7700
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):(\d{1,5})")
_WILDCARDS = ("0.0.0.0", "::", "*")


def parse_address(text: str) -> tuple[str, int]:
    """Return ``("10.0.0.5", 7700)`` for ``10.0.0.5:7700``; IPv6 addresses are in brackets.

    Raises:
        ValueError: ``text`` is not the address of one machine and a port.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError(f'expected host:port, such as "10.0.0.5:{DEFAULT_PORT}", got "{text}"')
    host = match[1] or match[2]
    if host in _WILDCARDS:
        raise ValueError(f'expected the address of one machine, got "{text}"')
    return host, int(match[3])


def show_address(host: str, port: int) -> str:
    """Format an address so that :func:`parse_address` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_towards(host: str) -> str:
    """Return this machine's address on the interface that routes to ``host``. Sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
