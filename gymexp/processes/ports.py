"""Ports without races: the controller binds and listens, and hands the open socket to whoever serves on it.

A server that is restarted finds the same socket, so its address never changes and connections made meanwhile
wait in the socket's queue instead of being refused.
"""

from __future__ import annotations

import errno
import socket

from gymexp.errors import ConfigError

_BACKLOG = 1024


def listen(host: str = "127.0.0.1", port: int = 0, key: str = "") -> socket.socket:
    """A listening, inheritable TCP socket; port 0 lets the system choose. `key` names the setting in the
    error."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{key or 'port'} must be a free port on {host}, but {port} is in use by another program: "
                f"end that program or choose another port"
            ) from None
        raise ConfigError(f"{key or 'port'}: cannot listen on {host}:{port}: {error.strerror}") from None
    sock.set_inheritable(True)
    return sock


def reserve(host: str = "127.0.0.1", exclusive: bool = True) -> socket.socket:
    """A port for a program that opens its own socket: bound here, so that nobody else is given it, and not
    listened on. The program must set SO_REUSEPORT, with which Linux lets in the same user alone.

    exclusive: False for a program that sets SO_REUSEADDR instead, as torch does: another user who does so may
    take the port first.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if exclusive else socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock


def url_of(sock: socket.socket) -> str:
    """The address of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{host}:{port}"


def address_of(node: str) -> str:
    """Where the other nodes of a job reach this one: what its name stands for. Raises ConfigError."""
    try:
        return socket.gethostbyname(node)
    except OSError as error:
        raise ConfigError(
            f"the node's own name must resolve to an address that the job's other nodes reach, but {node!r} "
            f"does not ({error.strerror}): have it in DNS or /etc/hosts"
        ) from None


def adopt(fd: int) -> socket.socket:
    """The listening socket that a parent handed down as file descriptor `fd`."""
    return socket.socket(fileno=fd)
