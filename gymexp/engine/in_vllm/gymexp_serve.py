"""`vllm serve`, with vLLM's interpreter: imports nothing of gymexp.

    python -m gymexp_serve serve MODEL --port N …

Whoever starts vLLM keeps port N bound with SO_REUSEPORT, so that no other user takes it before vLLM listens,
which then would be told the engine's key. vLLM sets that option where it has several API servers; this has it
set for one as well (0.31, `launcher.py`).
"""

from __future__ import annotations

import socket
import sys
from typing import Any


def share_port(port: int) -> None:
    """From now on, what this process binds to the port shares it with other sockets of this user's."""
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
