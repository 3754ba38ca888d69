"""The table that a run prints at its end: held-out reward before and after training."""

from __future__ import annotations

from typing import Any


def held_out_table(result: dict[str, Any]) -> str:
    """Returns the table of a result.json as plain text; "" if nothing was evaluated."""
    rows = []
    for env, metrics in result.get("held_out", {}).items():
        before, after = metrics.get("reward", [None, None])
        rows.append(
            (
                env,
                _number(before),
                _number(after),
                _number(after - before, "+") if before is not None else "–",
            )
        )
    if not rows:
        return ""
    head = ("held-out reward", "before", "after", "change")
    widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(4)]
    lines = [
        "  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in (head, *rows)
    ]
    return "\n".join(lines)


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"
