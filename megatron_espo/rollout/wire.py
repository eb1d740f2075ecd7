"""Authenticated TCP between the machines of a run: the key, the handshake, and connections that notice when the other end is gone.

Both ends prove that they know the key (HMAC, as ``multiprocessing.connection`` does it); nothing is unpickled before. What follows is neither
encrypted nor signed: it belongs on a cluster's own network.
"""

import os
import secrets
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

from megatron_espo.errors import InputError

KEY_FILE = "engine.key"
HANDSHAKE_SECONDS = 10.0
_KEY_BYTES = 32
_KEY_PATIENCE_SECONDS = 30.0
_CONNECT_SECONDS = 5.0


def run_key(folder: str | Path) -> bytes:
    """The key of the run in ``folder``, which all hosts share: made by whoever comes first, readable by its user alone.

    Raises:
        InputError: others may read it, or it is not whole.
    """
    path = Path(folder, KEY_FILE)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
    deadline = time.monotonic() + _KEY_PATIENCE_SECONDS
    while len(key := path.read_bytes()) != _KEY_BYTES:  # another host is just writing it
        if time.monotonic() > deadline:
            raise InputError(f"{path}: expected a key of {_KEY_BYTES} bytes, got {len(key)}; remove it")
        time.sleep(0.1)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(f"{path}: expected a key that its user alone can read (mode 600), got mode {mode:o}; remove it, and see who else read it")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address of the machine, and on no other. OSError: the address is not to be had."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


def connect(host: str, port: int, key: bytes) -> Connection:
    """A connection to a peer that knows the key. OSError: nobody answers; AuthenticationError: it has another key."""
    sock = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    return _handshake(sock, key, answer_challenge, deliver_challenge)


def admit(sock: socket.socket, key: bytes) -> Connection:
    """The connection of an accepted socket whose peer knows the key. Errors as in ``connect``; the socket is closed then."""
    return _handshake(sock, key, deliver_challenge, answer_challenge)


def _handshake(sock: socket.socket, key: bytes, *steps: Callable[[Connection, bytes], None]) -> Connection:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _limit_waits(sock, HANDSHAKE_SECONDS)
    connection = Connection(sock.detach())
    try:
        for step in steps:
            step(connection, key)
    except BaseException as error:
        connection.close()
        if isinstance(error, AssertionError):
            raise AuthenticationError("it speaks another protocol") from None
        if isinstance(error, EOFError):
            raise ConnectionResetError("it hung up") from None
        raise
    return connection


def notice_loss(connection: Connection, seconds: float) -> None:
    """From now on waits on this connection are not limited, but end with an OSError when the peer's machine has not been heard of for ``seconds``.

    The kernels do this, whatever the processes are busy with: probes while nothing is sent (TCP keepalive), a limit on what is not acknowledged
    otherwise. A peer that stops reading for so long counts as lost too.
    """
    probe = max(1, int(seconds / 5))
    with as_socket(connection) as sock:
        _limit_waits(sock, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
        # The last probe comes up to one interval after this limit.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int((seconds - probe) * 1000))


def own_address(connection: Connection) -> str:
    """This machine's address as the peer's machine reaches it."""
    with as_socket(connection) as sock:
        return sock.getsockname()[0]


@contextmanager
def as_socket(connection: Connection) -> Iterator[socket.socket]:
    """The socket under a connection, which stays the connection's."""
    sock = socket.socket(fileno=connection.fileno())
    try:
        yield sock
    finally:
        sock.detach()


def _limit_waits(sock: socket.socket, seconds: float) -> None:
    """Have each wait of a blocking socket end with BlockingIOError after so long; 0: never. Not ``settimeout``: a ``Connection`` needs a blocking one."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
