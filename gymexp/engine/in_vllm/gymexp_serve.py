"""Runs `vllm serve` on a port that the parent process keeps bound. It runs in vLLM's interpreter, so it
imports nothing of gymexp.

    python -m gymexp_serve serve MODEL --port N …

The parent keeps port N bound with SO_REUSEPORT. Otherwise another user could take the port before vLLM
listens on it, and would get the engine's key with the requests. vLLM sets SO_REUSEPORT only if it has several
API servers (0.31, `launcher.py`); this module sets it for a single one too.
"""

from __future__ import annotations

import socket
import sys
from typing import Any


def share_port(port: int) -> None:
    """Makes this process bind sockets to `port` with SO_REUSEPORT, which shares it with other sockets of the
    same user.
    """
    bind = socket.socket.bind

    def bind_shared(sock: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[1] == port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bind(sock, address)

    socket.socket.bind = bind_shared  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    share_port(int(sys.argv[sys.argv.index("--port") + 1]))
    from vllm.entrypoints.cli.main import main  # pyright: ignore[reportMissingImports]

    main()


if __name__ == "__main__":
    main()
