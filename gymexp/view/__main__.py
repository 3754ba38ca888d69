"""Look at runs in a browser: their steps, groups and rollouts, token by token; runs side by side.

python -m gymexp.view outputs/<name>/<date_time>                  a run; several, or a sweep, are listed
python -m gymexp.view outputs/<name>/<date_time> --export page    a folder of files to keep or to send
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path

from gymexp.cli.terminal import guarded, parser_of
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError
from gymexp.printable import say
from gymexp.view.access import LOOPBACK, Access, tunnel
from gymexp.view.links import server_link
from gymexp.view.server import serve
from gymexp.view.site import Site
from gymexp.view.viewed_run import runs_at


def main() -> None:
    parser = parser_of("view", __doc__ or "")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="DIR", help="of a run, a sweep or an evaluation"
    )
    parser.add_argument("--port", type=int, default=0, help="else one of the system's choice")
    parser.add_argument("--host", default=LOOPBACK, help=f"{LOOPBACK}; another is refused, as ssh is safer")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of a model that is not in the run")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write the pages to this new folder instead"
    )
    parser.add_argument("--steps", metavar="A:B", help="export: steps A to B alone")
    parser.add_argument("--env", metavar="NAME", help="export: this environment alone")
    parser.add_argument("--limit", type=int, metavar="N", help="export: at most N rollouts (500)")
    args = parser.parse_args()
    if args.export is None and (args.steps or args.env or args.limit is not None):
        parser.error("--steps, --env and --limit need --export")
    if not 0 <= args.port < 65536:
        parser.error(f"--port must be from 0 to 65535, got {args.port}")
    if args.host not in (LOOPBACK, "localhost"):
        raise GymexpError(
            f"--host must be {LOOPBACK}, got {args.host}: everyone who reaches that address could read the "
            f"run. From your own machine, {_tunnel_to(args.port)}"
        )
    runs = runs_at(args.runs, args.tokenizer)
    if args.export:
        from gymexp.view.export import export

        say(export(runs, args.export, args.steps, args.env, args.limit))
        return
    site = Site(runs, lambda run: partial(server_link, run.slug), lambda name: f"/static/{name}", "/")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(site, args.port, _announce))


def _tunnel_to(port: int) -> str:
    command = tunnel(port, {"SSH_CONNECTION": ""}) if port else tunnel(8000, {"SSH_CONNECTION": ""})
    return f"use {command} with --port {port or 8000}"


def _announce(access: Access) -> None:
    say(f"open {access.url}")
    if command := tunnel(access.port):
        say(f"from your own machine, first: {command}")
    say("Ctrl-C ends it")


if __name__ == "__main__":
    guarded(main, RunConfig)()
