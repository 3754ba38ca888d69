"""The records of the workplace server: its five tables and its people, read from the server's CSV files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pandas  # pyright: ignore[reportMissingImports]

TODAY = "2023-11-30"
NOW = "2023-11-30 23:59:00"
STATUSES = ["Qualified", "Won", "Lost", "Lead", "Proposal"]
PRODUCTS = ["Software", "Hardware", "Services", "Consulting", "Training"]
LISTS = ["Backlog", "In Progress", "In Review", "Completed"]
BOARDS = ["Back end", "Front end", "Design"]
DURATIONS = ["30", "45", "60", "90", "120"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Person:
    """A colleague. `first` alone finds exactly one address in the company directory."""

    first: str
    last: str
    email: str


@dataclass(frozen=True)
class World:
    """The server's records as plain dicts, in file order, and its people: `people` are the colleagues whose
    first name identifies them, `team` those of them with project tasks, `sales` those with customers."""

    events: list[Record]
    tasks: list[Record]
    customers: list[Record]
    emails: list[Record]
    visitors: list[Record]
    people: list[Person]
    team: list[Person]
    sales: list[Person]

    def person(self, email: str) -> Person:
        """Returns the person with this email address."""
        return next(p for p in self.people if p.email == email)

    def event_days(self, low: int, high: int, after: str = "") -> dict[str, list[Record]]:
        """Returns the days after `after` that have low..high events, each with its events. Days and events
        come latest first, as in the server's answers."""
        days: dict[str, list[Record]] = {}
        for event in sorted(self.events, key=lambda e: e["event_start"], reverse=True):
            days.setdefault(event["event_start"][:10], []).append(event)
        return {day: events for day, events in days.items() if low <= len(events) <= high and day > after}

    def search_emails(self, query: str) -> list[Record]:
        """Returns the emails with every word of the query in subject, body or sender, latest first."""
        words = query.lower().split()
        emails = [
            e
            for e in self.emails
            if all(w in f"{e['subject']} {e['body']} {e['sender/recipient']}".lower() for w in words)
        ]
        return sorted(emails, key=lambda e: e["sent_datetime"], reverse=True)


def load_world(csv_data: Path) -> World:
    """Reads the tables in the server's `csv_data` folder."""

    def read(name: str) -> list[Record]:
        return pandas.read_csv(csv_data / "processed" / f"{name}.csv", dtype=str).to_dict(orient="records")

    addresses = (csv_data / "raw" / "email_addresses.csv").read_text().split()
    people = []
    for email in addresses:
        first, last = email.split("@")[0].split(".")
        if sum(first in other for other in addresses) == 1:
            people.append(Person(first.title(), last.title(), email))
    tasks, customers = read("project_tasks"), read("customer_relationship_manager_data")
    team, sales = ({row["assigned_to_email"] for row in rows} for rows in (tasks, customers))
    return World(
        events=read("calendar_events"),
        tasks=tasks,
        customers=customers,
        emails=read("emails"),
        visitors=read("analytics_data"),
        people=people,
        team=[p for p in people if p.email in team],
        sales=[p for p in people if p.email in sales],
    )


def is_unique(rows: list[Record], keep: Callable[[Record], bool]) -> bool:
    """Returns whether exactly one row satisfies `keep`, so that a request with this description is
    unambiguous."""
    return sum(map(keep, rows)) == 1


def weekday(r: Random, first: str = "2023-12-01", last: str = "2023-12-29") -> str:
    """Draws a working day between two ISO dates, both included."""
    start, end = date.fromisoformat(first), date.fromisoformat(last)
    while (day := start + timedelta(days=r.randint(0, (end - start).days))).weekday() >= 5:
        pass
    return day.isoformat()


def next_day(day: str) -> str:
    """Returns the day after an ISO date."""
    return (date.fromisoformat(day) + timedelta(days=1)).isoformat()


def meeting_start(r: Random, duration: str, day: str | None = None) -> str:
    """Draws a start, on the hour or half hour, of a meeting between 9am and 6pm, as "YYYY-MM-DD HH:MM:SS".

    duration: in minutes. day: an ISO date; None draws a working day.
    """
    slot = r.randint(0, (9 * 60 - int(duration)) // 30)
    return f"{day or weekday(r)} {9 + slot // 2:02d}:{slot % 2 * 30:02d}:00"


def other(r: Random, choices: list[Any], *taken: Any) -> Any:
    """Draws a choice not in `taken`: an update must change something, or doing nothing would be right."""
    return r.choice([c for c in choices if c not in taken])
