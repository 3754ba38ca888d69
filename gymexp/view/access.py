"""Who may read from the viewer: this machine's user alone, by a token, and no other page in their browser.

Ports of a login node are open to every user of it, so the first address has a token, which becomes a cookie.
Another site that makes its own name point to 127.0.0.1 (DNS rebinding) sends its name as Host. Pages cannot
load anything from elsewhere, and no page may show them in a frame.
"""

from __future__ import annotations

import getpass
import hmac
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

# plotly.js makes an empty style element, whose hash this is, and adds its rules by script.
_EMPTY_STYLE = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self' {_EMPTY_STYLE}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Access:
    """The checks of one server. port: that it listens on."""

    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def cookie(self) -> str:
        """The cookie's name. It has the port, as a browser sends a cookie to all ports of a host."""
        return f"gymexp_{self.port}"

    @property
    def url(self) -> str:
        """The address to open first."""
        return f"http://{LOOPBACK}:{self.port}/?token={self.token}"

    def refusal(
        self, method: str, headers: Mapping[str, str], cookies: Mapping[str, str], token: str | None
    ) -> tuple[int, str] | None:
        """Returns (HTTP status, reason) of a request that is refused; None for one that may be answered.

        token: of the URL; None without one.
        """
        hosts = [f"{name}:{self.port}" for name in (LOOPBACK, "localhost")]
        if (host := headers.get("Host", "")) not in hosts:
            return 400, f"Host must be {hosts[0]}: a tunnel must end at port {self.port} on your side too"
        if method not in ("GET", "HEAD"):
            return 405, "the viewer changes nothing: GET and HEAD alone are answered"
        if headers.get("Origin", f"http://{host}") != f"http://{host}":
            return 403, "another site asked for this page"
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return 403, "another site linked to this page: paste the address that the command printed"
        given = cookies.get(self.cookie, "") if token is None else token
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return 403, "open the address that `gymexp view` printed, which has a token"
        return None


def tunnel(port: int, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the ssh command that makes a viewer on this machine reachable from the reader's own; "" on a
    machine that nobody reached by ssh."""
    if "SLURM_JOB_ID" not in environ and "SSH_CONNECTION" not in environ:
        return ""
    host, user = socket.gethostname(), getpass.getuser()
    submitted_from = environ.get("SLURM_SUBMIT_HOST", host)
    jump = f"-J {user}@{submitted_from} " if submitted_from.split(".")[0] != host.split(".")[0] else ""
    return f"ssh -N -L {port}:{LOOPBACK}:{port} {jump}{user}@{host}"
