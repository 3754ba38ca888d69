"""The addresses of the viewer's pages: of a server, and of the files of an export. Pure.

Every link of a template comes from here, so that the same templates serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any
from urllib.parse import quote, urlencode

# Page -> its path on the server below /r/<run>/, and its file in an export ("": it is not exported).
PAGES = {
    "run": ("", "index.html"),
    "steps": ("steps", "steps.html"),
    "step": ("step/{file}", "{file}.html"),
    "group": ("group/{file}/{group}", "{file}-group-{group}.html"),
    "side": ("side/{file}/{number}", ""),
    "tasks": ("tasks", "tasks.html"),
    "rollouts": ("rollouts", "rollouts.html"),
    "csv": ("rollouts.csv", ""),
    "rollout": ("rollout/{file}/{number}", "{file}-{number}.html"),
    "tokens": ("rollout/{file}/{number}/tokens", "{file}-{number}-tokens.html"),
    "task": ("rollout/{file}/{number}/task", "{file}-{number}-task.html"),
    "verdict": ("rollout/{file}/{number}/verdict", "{file}-{number}-verdict.html"),
    "raw": ("rollout/{file}/{number}/raw", "{file}-{number}-raw.html"),
    "text": ("text/{file}/{number}/{part}", ""),
    "config": ("config", "config.html"),
    "logs": ("logs", ""),
    "log": ("log/{name}", ""),
    "compare": ("compare", ""),
}
_FIELDS = {
    page: {name for _, name, _, _ in Formatter().parse(path) if name} for page, (path, _) in PAGES.items()
}
Link = Callable[..., str]


def server_link(run: str, page: str, /, **arguments: Any) -> str:
    """Returns the address of a page on the server. Arguments that are None or "" are left out."""
    path = PAGES[page][0].format(**{n: quote(str(arguments[n]), safe="") for n in _FIELDS[page]})
    rest = {
        name.rstrip("_"): str(value)
        for name, value in arguments.items()
        if name not in _FIELDS[page] and value not in (None, "")
    }
    return f"/r/{quote(run, safe='')}/{path}" + (f"?{urlencode(rest)}" if rest else "")


def export_link(page: str, /, **arguments: Any) -> str:
    """Returns the name of a page's file in an export; "" if an export does not have it. The arguments that
    sort and filter are left out, as the page's script does that in an export."""
    return PAGES[page][1].format(**{name: arguments[name] for name in _FIELDS[page]})


def with_changes(arguments: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    """Returns the arguments of a URL with some of them replaced, and without the page's number."""
    kept = {name: value for name, value in arguments.items() if name != "page"}
    return kept | {name.rstrip("_"): value for name, value in changes.items()}
