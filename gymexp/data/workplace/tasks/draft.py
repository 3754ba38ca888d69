"""A task before it is proven, and the register of templates that draft tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from gymexp.data.workplace.tasks.world import Person, World

Call = tuple[str, dict[str, Any]]
Template = Callable[[World, Random], "tuple[str, list[Call]] | None"]

ACTIONS = frozenset(
    [
        "email_send_email",
        "email_delete_email",
        "email_forward_email",
        "email_reply_email",
        "calendar_create_event",
        "calendar_delete_event",
        "calendar_update_event",
        "analytics_create_plot",
        "project_management_create_task",
        "project_management_delete_task",
        "project_management_update_task",
        "customer_relationship_manager_update_customer",
        "customer_relationship_manager_add_customer",
        "customer_relationship_manager_delete_customer",
    ]
)
WRAPPINGS = [
    "{C}.", "{C}.", "Please {c}.", "Can you {c}?", "Could you {c}?", "{C}, please.", "I need you to {c}.",
    "Could you please {c}?", "Hi, can you {c}?", "I would like you to {c}.", "Would you {c} for me?",
]  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """A request and the calls an expert answers it with; those that change records are the ground truth."""

    domain: str
    difficulty: str
    template: str
    user: str
    calls: list[Call]

    @property
    def ground_truth(self) -> list[Call]:
        return [call for call in self.calls if call[0] in ACTIONS]


TEMPLATES: dict[tuple[str, str], list[Template]] = {}


def template(domain: str, difficulty: str) -> Callable[[Template], Template]:
    """Register a function that drafts one task (request, calls), or None if the drawn records do not fit."""

    def register(function: Template) -> Template:
        TEMPLATES.setdefault((domain, difficulty), []).append(function)
        return function

    return register


def ask(r: Random, *wordings: str, **values: Any) -> str:
    """One wording, filled in. One without an end mark is an imperative and gets wrapped into a request."""
    wording = r.choice(wordings)
    text = wording.format(**values)
    if wording[-1] in ".?":
        return text
    said = r.choice(WRAPPINGS).format(c=text, C=text[0].upper() + text[1:])
    return said.replace("'.", "'") if said.endswith("'.") else said


def say_person(r: Random, person: Person) -> str:
    return r.choice([person.first, person.first, f"{person.first} {person.last}"])


def whose(person: Person) -> str:
    return f"{person.first}'" if person.first.endswith("s") else f"{person.first}'s"


def find(person: Person) -> Call:
    """The look-up of an address by first name."""
    return ("company_directory_find_email_address", {"name": person.first})
