"""Ports without races: the controller opens each listening socket and hands it down to the server.

A restarted server gets the same socket. So its address never changes, and connections made during the restart
wait in the socket's queue instead of being refused.
"""

from __future__ import annotations

import errno
import socket

from gymexp.errors import ConfigError

_BACKLOG = 1024


def listen(host: str = "127.0.0.1", port: int = 0, key: str = "") -> socket.socket:
    """Returns a listening, inheritable TCP socket. port: 0 lets the system choose.

    key: the configuration key to name in an error. Raises ConfigError if the port is in use.
    """
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
    """Reserves a free port for a program that opens its own socket; returns the socket that reserves it.

    The socket is bound, so that the system gives the port to nobody else, and does not listen. The program
    must set SO_REUSEPORT; Linux then lets only the same user bind to the port.

    exclusive: False for a program that sets SO_REUSEADDR instead, as torch does. Then another user who also
    sets SO_REUSEADDR may take the port first.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if exclusive else socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock


def url_of(sock: socket.socket) -> str:
    """Returns the http URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{host}:{port}"


def address_of(node: str) -> str:
    """Returns the IP address that a node's name resolves to, at which the job's other nodes reach it.

    Raises ConfigError if the name does not resolve.
    """
    try:
        return socket.gethostbyname(node)
    except OSError as error:
        raise ConfigError(
            f"the node's own name must resolve to an address that the job's other nodes reach, but {node!r} "
            f"does not ({error.strerror}): have it in DNS or /etc/hosts"
        ) from None


def adopt(fd: int) -> socket.socket:
    """Returns the listening socket that a parent process handed down as file descriptor `fd`."""
    return socket.socket(fileno=fd)
