"""The map of tasks by steps: a row a task, the always solved at the top, and a column a step. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gymexp.report import figures
from gymexp.report.panel import Chart, Panel
from gymexp.view.tables import Row

_MAX_TASKS = 400  # of an environment; of more, every second, third … in their order is left out
_MAX_STEPS = 120
_AXES = {"train": "step", "held-out": "evaluation after step", "left out": "step"}


def task_map(tasks: Sequence[Row], split: str) -> Panel:
    """Returns the panel of a chart an environment.

    tasks: rows of `tables.task_rows` of a split. A cell has the solved share of a visit, and as `customdata`
    "<file>/<group>" of its group.
    """
    about = (
        "A row is a task, the always solved at the top and the never solved at the bottom; a column is a "
        "step. Point at a cell to see the task, click to open its group."
    )
    envs = sorted({task["env"] for task in tasks})
    charts = [_chart(env, [task for task in tasks if task["env"] == env], split) for env in envs]
    return Panel(
        "map", "Tasks by step", about, charts, notes=[] if charts else ["no task is like this"], wide=True
    )


def _chart(env: str, tasks: Sequence[Row], split: str) -> Chart:
    ordered = sorted(tasks, key=lambda task: (-_share(task), task["key"]))
    every = -(-len(ordered) // _MAX_TASKS)
    shown = ordered[::every][::-1]  # plotly draws the first row at the bottom
    steps = sorted({visit["step"] for task in shown for visit in task["history"]})
    steps, num_steps = steps[-_MAX_STEPS:], len(steps)
    cells = [{visit["step"]: visit for visit in task["history"]} for task in shown]
    trace = figures.SOLVED | {
        "x": [str(step) for step in steps],
        # A number before each name, as two long names may be shortened to the same text.
        "y": [f"{len(shown) - at}. {figures.label(task['key'])}" for at, task in enumerate(shown)],
        "z": [[_value(row.get(step)) for step in steps] for row in cells],
        "text": [[_text(row.get(step)) for step in steps] for row in cells],
        "customdata": [[_place(row.get(step)) for step in steps] for row in cells],
        "hovertemplate": "%{y}<br>step %{x}: solved %{text}<extra></extra>",
        "xgap": 1 if len(steps) <= 60 else 0,
        "ygap": 1 if len(shown) <= 100 else 0,
    }
    layout = figures.layout("tasks", _AXES[split], height=min(440, 140 + 4 * len(shown)))
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] |= {"type": "category", "showgrid": False, "showticklabels": False, "ticks": ""}
    layout |= {"hovermode": "closest", "showlegend": False}
    parts = [f"{len(shown)} of {len(tasks)} tasks" if every > 1 else f"{len(tasks)} tasks"]
    parts += [f"the last {len(steps)} of {num_steps} steps"] if num_steps > len(steps) else []
    return Chart(f"{env}: {', '.join(parts)}", {"": {"data": [trace], "layout": layout}})


def _share(task: Row) -> float:
    return task["solved"] / task["scored"] if task["scored"] else -1.0


def _value(visit: Row | None) -> figures.Number | None:
    return figures.compact((visit["solved"] or 0) / visit["scored"]) if visit and visit["scored"] else None


def _text(visit: Row | None) -> str | None:
    return f"{visit['solved'] or 0} of {visit['num']}" if visit else None


def _place(visit: Row | None) -> str | None:
    return f"{visit['file']}/{visit['grp']}" if visit else None
