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
    """A request and an expert's calls for it. The calls that change records are the ground truth."""

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
    """Registers a function that drafts one task. It returns (request, calls), or None if the drawn records do
    not fit."""

    def register(function: Template) -> Template:
        TEMPLATES.setdefault((domain, difficulty), []).append(function)
        return function

    return register


def make_request(r: Random, *wordings: str, **values: Any) -> str:
    """Returns one of the wordings with `values` filled in. A wording without a full stop or a question mark
    is an imperative, and becomes a request by one of WRAPPINGS."""
    wording = r.choice(wordings)
    text = wording.format(**values)
    if wording[-1] in ".?":
        return text
    request = r.choice(WRAPPINGS).format(c=text, C=text[0].upper() + text[1:])
    return request.replace("'.", "'") if request.endswith("'.") else request


def say_person(r: Random, person: Person) -> str:
    """Returns the person's first name, or less often the full name."""
    return r.choice([person.first, person.first, f"{person.first} {person.last}"])


def possessive(person: Person) -> str:
    """Returns the first name in the possessive: "Anna's", "James'"."""
    return f"{person.first}'" if person.first.endswith("s") else f"{person.first}'s"


def find_address(person: Person) -> Call:
    """Returns the call that looks up an email address by first name."""
    return ("company_directory_find_email_address", {"name": person.first})
