"""The table that a run prints at its end: held-out reward before and after training, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gymexp.rollout.rollout_files import read_index
from gymexp.statistics import Change, holm, paired_change

_NOTE = (
    "change, 95 % interval and p are over the tasks that both evaluations scored, paired by task; p is by "
    "sign flips,\nadjusted for the number of environments (Holm). They say nothing of other training seeds."
)
_MIN_TASKS = 6  # with fewer, an interval may have no width, and no p is below 0.05


def read_changes(rollouts: Path, step: int) -> dict[str, Change]:
    """Returns the change of each environment's held-out rewards from before training to the evaluation after
    `step`. An environment with fewer than six tasks that both
    evaluations scored is left out.
    """
    by_env: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_index(rollouts):
        if row.get("reward") is not None:
            by_env[row["env"]][row["file"]][row["key"]] = row["reward"]
    changes = {
        env: paired_change(files.get("eval-000000", {}), files.get(f"eval-{step:06d}", {}))
        for env, files in by_env.items()
    }
    return {env: change for env, change in changes.items() if change and change.num_tasks >= _MIN_TASKS}


def held_out_table(result: Mapping[str, Any], changes: Mapping[str, Change]) -> str:
    """Returns the table of a result.json as plain text; "" if nothing was evaluated."""
    p_values = dict(zip(changes, holm([change.p for change in changes.values()]), strict=True))
    rows = []
    for env, metrics in result.get("held_out", {}).items():
        before, after = metrics.get("reward", [None, None])
        change = _number(after - before, "+") if before is not None and after is not None else "–"
        row = [env, _number(before), _number(after), change]
        if found := changes.get(env):
            p = p_values[env]
            row[3] = _number(found.mean, "+")
            row += [f"[{found.low:+.3f}, {found.high:+.3f}]", "<0.001" if p < 0.001 else f"{p:.3f}"]
            failed = int(max(filter(None, metrics.get("rollouts", [0])), default=0)) - found.num_tasks
            tasks = f"{found.better} better, {found.worse} worse of {found.num_tasks}"
            row.append(tasks + (f", {failed} failed in one" if failed > 0 else ""))
        rows.append(row)
    if not rows:
        return ""
    head = ["held-out reward", "before", "after", "change"]
    if changes:
        head += ["95 % interval", "p", "tasks"]
    table = [head, *(row + ["–"] * (len(head) - len(row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, _NOTE] if changes else lines)


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"
