"""What a run shows while it goes on."""

from __future__ import annotations

from typing import Any


class View:
    """Plain lines."""

    def __init__(self) -> None:
        self._shown: tuple[Any, ...] = ()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def update(self, facts: dict[str, Any]) -> None:
        now = (facts.get("phase"), facts.get("step"), str(facts.get("logs")))
        if now != self._shown:
            self._shown = now
            print({k: v for k, v in facts.items()}, flush=True)

    def services(self, states: dict[str, str]) -> None:
        pass
