"""The reward over training as an SVG for the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gymexp.record.metric_names import of_each_env


def draw_curves(metrics: Sequence[Mapping[str, Any]], envs: Sequence[str], path: Path) -> bool:
    """Writes the training and the held-out reward of each environment over steps. Returns False, and writes
    nothing, if the metrics have no reward."""
    import matplotlib
    from matplotlib.figure import Figure

    series = {env: (_series(metrics, env, False), _series(metrics, env, True)) for env in envs}
    if not any(points for both in series.values() for points in both):
        return False
    # A salt makes the same file from the same numbers. The page behind may be dark, so the figure is white.
    with matplotlib.rc_context({"svg.hashsalt": "gymexp", "font.size": 9}):
        figure = Figure(figsize=(3.6 * len(envs), 2.8), layout="constrained", facecolor="white")
        for axes, (env, (training, held_out)) in zip(
            figure.subplots(1, len(envs), squeeze=False)[0], series.items(), strict=True
        ):
            axes.plot(*zip(*training, strict=True) if training else ((), ()), linewidth=1.2, label="training")
            axes.plot(*zip(*held_out, strict=True) if held_out else ((), ()), "o-", label="held-out")
            axes.set(title=env, xlabel="step", ylabel="mean reward")
            axes.grid(alpha=0.2)
            axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _series(metrics: Sequence[Mapping[str, Any]], env: str, held_out: bool) -> list[tuple[int, float]]:
    points = ((entry["step"], of_each_env(entry, "reward", held_out).get(env)) for entry in metrics)
    return [(step, reward) for step, reward in points if reward is not None]
