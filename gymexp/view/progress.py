"""The progress display of a run: a live panel on a terminal, else one line for each step."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gymexp.printable import duration, printable, printable_in
from gymexp.record.metric_names import by_env

_NUMBERS = ("reward", "success", "turns", "tokens", "truncated", "failed")


class View:
    """Shows a run's progress. `say` and `log` print lines; `update` and `services` change the live panel."""

    def __init__(self, stream: Any = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._facts: dict[str, Any] = {}
        self._services: dict[str, str] = {}
        self._train: dict[str, dict[str, float]] = {}
        self._held_out: dict[str, dict[str, float]] = {}
        self._trained_since: tuple[float, int] | None = None
        self._live: Live | None = None

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        self._console.print(printable(text), markup=False, emoji=False)

    def services(self, states: dict[str, str]) -> None:
        self._services = states

    def update(self, facts: dict[str, Any]) -> None:
        phase_before = self._facts.get("phase")
        facts = self._facts = printable_in(facts)
        if facts.get("phase") == "train" and self._trained_since is None:
            self._trained_since = (time.monotonic(), facts.get("step") or 0)
        if facts.get("phase") != phase_before and facts.get("phase") != "train":
            self.say(
                f"{facts.get('phase')} (step {facts['step']})"
                if facts.get("step")
                else str(facts.get("phase"))
            )

    def log(self, step: int, logs: dict[str, Any]) -> None:
        """Prints an entry of the log (of a step or an evaluation) as a line, and updates the panel."""
        if held_out := by_env(logs, held_out=True):
            self._held_out = held_out
            self.say(self._line(step, "held-out ", held_out, logs))
        if trained := by_env(logs, held_out=False):
            self._train = trained
            self.say(self._line(step, "", trained, logs))

    def time_left(self) -> float | None:
        """Returns the seconds to the last step at the average pace; None before the first step is done."""
        step, last = self._facts.get("step") or 0, self._facts.get("max_steps") or 0
        if self._trained_since is None or step <= self._trained_since[1] or not last:
            return None
        began, first = self._trained_since
        return (time.monotonic() - began) / (step - first) * (last - step)

    def _line(self, step: int, prefix: str, envs: dict[str, dict[str, float]], logs: dict[str, Any]) -> str:
        rewards = "  ".join(f"{env} {_shown(n.get('reward'))}" for env, n in envs.items())
        line = f"step {step}/{self._facts.get('max_steps') or '?'}  {prefix}reward: {rewards}"
        if seconds := logs.get("time/step"):
            line += f"  {seconds:.1f} s a step ({logs.get('time/rollout', 0):.1f} rollouts)"
        left = self.time_left()
        return line + (f"  {duration(left)} left" if left else "")

    def __rich__(self) -> Group:
        facts = self._facts
        step, last = facts.get("step") or 0, facts.get("max_steps") or 0
        left = self.time_left()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(str(facts.get("phase", "starting")), style="bold"),
            f"step {step}/{last or '?'}",
            ProgressBar(total=last or 1, completed=step, width=30),
            f"{duration(left)} left" if left is not None else "",
        )
        flow = Text(
            f"rollouts {facts.get('done', 0)}/{facts.get('total', 0)}  "
            f"in flight {facts.get('in_flight', 0)}  "
            f"retried {facts.get('retried', 0)}  failed {facts.get('failed', 0)}  "
            f"{facts.get('tokens_per_s', 0):.0f} tokens/s"
        )
        parts: list[Any] = [head, flow]
        if self._train or self._held_out:
            table = Table(box=None, padding=(0, 2, 0, 0))
            table.add_column("environment")
            for name in ("held-out reward", *_NUMBERS):
                table.add_column(name, justify="right")
            for env in self._train or self._held_out:
                numbers = self._train.get(env, {})
                held_out = self._held_out.get(env, {}).get("reward")
                table.add_row(env, _shown(held_out), *(_shown(numbers.get(n)) for n in _NUMBERS))
            parts.append(table)
        waiting = [name for name, state in self._services.items() if state not in ("ready", "stopped")]
        if waiting:
            parts.append(Text(f"waiting for {', '.join(waiting)}", style="dim"))
        return Group(*parts)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
