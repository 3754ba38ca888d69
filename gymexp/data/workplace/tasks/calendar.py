"""Calendar tasks: create, move, rename, shorten and cancel events."""

from __future__ import annotations

from datetime import datetime, timedelta
from random import Random
from typing import Any

from gymexp.data.workplace.tasks.draft import Call, find_address, make_request, say_person, template
from gymexp.data.workplace.tasks.words import EVENT_NAMES, say_date, say_minutes, say_time
from gymexp.data.workplace.tasks.world import (
    DURATIONS,
    NOW,
    Person,
    World,
    is_unique,
    meeting_start,
    next_day,
    other,
)


def update(event: dict[str, Any], field: str, value: str) -> Call:
    return ("calendar_update_event", {"event_id": event["event_id"], "field": field, "new_value": value})


def delete(event: dict[str, Any]) -> Call:
    return ("calendar_delete_event", {"event_id": event["event_id"]})


def create(name: str, email: str, start: str, duration: str) -> Call:
    arguments = {"event_name": name, "participant_email": email, "event_start": start, "duration": duration}
    return ("calendar_create_event", arguments)


def search(query: str | None, first_day: str, last_day: str) -> Call:
    window = {"time_min": f"{first_day} 00:00:00", "time_max": f"{last_day} 23:59:00"}
    return ("calendar_search_events", ({"query": query} if query else {}) | window)


def named_on_day(w: World, r: Random) -> dict[str, Any] | None:
    """Draws an event that its name and its day identify; None if another event fits them."""
    event = r.choice(w.events)
    name, day = event["event_name"], event["event_start"][:10]
    unique = is_unique(
        w.events, lambda e: name.lower() in e["event_name"].lower() and e["event_start"][:10] == day
    )
    return event if unique else None


def change(r: Random, event: dict[str, Any], day_known: bool = True) -> tuple[str, Call]:
    """Draws one change of an event, and returns it as an imperative and as a call. day_known: whether the
    request tells the day of the event, without which the event cannot get a new time."""
    day, minutes = event["event_start"][:10], event["duration"]
    kind = r.randrange(3 if day_known else 2)
    if kind == 0:
        name = other(r, EVENT_NAMES, event["event_name"])
        return f"rename it to '{name}'", update(event, "event_name", name)
    if kind == 1:
        value = other(r, DURATIONS, minutes)
        return f"make it {say_minutes(r, value)} long", update(event, "duration", value)
    start = meeting_start(r, minutes, day)
    return f"start it at {say_time(r, start)} instead", update(event, "event_start", start)


@template("calendar", "easy")
def delete_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    event = r.choice(w.events)
    wordings = [
        "delete calendar event {id}",
        "cancel the event with ID {id}",
        "remove event {id} from my calendar",
        "take event {id} off my calendar",
        "Event {id} is no longer happening. Delete it.",
    ]
    return make_request(r, *wordings, id=event["event_id"]), [delete(event)]


@template("calendar", "easy")
def rename_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    event, name = r.choice(w.events), r.choice(EVENT_NAMES)
    wordings = [
        "rename event {id} to '{name}'",
        "change the name of calendar event {id} to '{name}'",
        "call event {id} '{name}' from now on",
        "set the name of event {id} to '{name}'",
    ]
    return make_request(r, *wordings, id=event["event_id"], name=name), [update(event, "event_name", name)]


@template("calendar", "easy")
def move_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    event = r.choice(w.events)
    start = meeting_start(r, event["duration"])
    wordings = [
        "move event {id} to {day} at {time}",
        "reschedule calendar event {id} to {day}, {time}",
        "set the start of event {id} to {day} {time}",
        "Event {id} starts on {day} at {time} now. Update it.",
    ]
    text = make_request(r, *wordings, id=event["event_id"], day=start[:10], time=start[11:16])
    return text, [update(event, "event_start", start)]


@template("calendar", "easy")
def resize_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    event = r.choice(w.events)
    minutes = other(r, [str(n) for n in range(15, 185, 5)], event["duration"])
    wordings = [
        "change the duration of event {id} to {n} minutes",
        "make event {id} last {n} minutes",
        "set event {id} to {n} minutes",
        "Event {id} will take {n} minutes. Change its duration.",
    ]
    return make_request(r, *wordings, id=event["event_id"], n=minutes), [update(event, "duration", minutes)]


@template("calendar", "easy")
def change_participant_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    event = r.choice(w.events)
    email = other(r, w.people, w.person(event["participant_email"])).email
    wordings = [
        "change the participant of event {id} to {email}",
        "put {email} on event {id} as the participant",
        "set the participant of calendar event {id} to {email}",
    ]
    return make_request(r, *wordings, id=event["event_id"], email=email), [
        update(event, "participant_email", email)
    ]


@template("calendar", "easy")
def create_from_values(w: World, r: Random) -> tuple[str, list[Call]]:
    person, name, minutes = r.choice(w.people), r.choice(EVENT_NAMES), r.choice(DURATIONS)
    start = meeting_start(r, minutes)
    wordings = [
        "create an event '{name}' with {email} on {day} at {time} for {n} minutes",
        "schedule a {n} minute meeting called '{name}' with {email} on {day} at {time}",
        "add '{name}' to my calendar: {day} at {time}, {n} minutes, with {email}",
    ]
    text = make_request(
        r, *wordings, name=name, email=person.email, day=start[:10], time=start[11:16], n=minutes
    )
    return text, [create(name, person.email, start, minutes)]


@template("calendar", "medium")
def cancel_named(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (event := named_on_day(w, r)):
        return None
    name, day = event["event_name"], event["event_start"][:10]
    wordings = [
        "cancel the {name} on {day}",
        "delete the '{name}' event on {day}",
        "remove {name} on {day} from my calendar",
        "The {name} on {day} is not happening. Cancel it.",
    ]
    return make_request(r, *wordings, name=name, day=say_date(r, day)), [
        search(name, day, day),
        delete(event),
    ]


@template("calendar", "medium")
def change_named(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (event := named_on_day(w, r)):
        return None
    name, day = event["event_name"], event["event_start"][:10]
    change_text, call = change(r, event)
    wordings = [
        "find the {name} on {day} and {change}",
        "look up '{name}' on {day} and {change}",
        "There is a {name} on {day}. Please {change}.",
    ]
    request = make_request(r, *wordings, name=name, day=say_date(r, day), change=change_text)
    return request, [search(name, day, day), call]


@template("calendar", "medium")
def create_with_first_name(w: World, r: Random) -> tuple[str, list[Call]]:
    person, name, minutes = r.choice(w.people), r.choice(EVENT_NAMES), r.choice(DURATIONS)
    start = meeting_start(r, minutes)
    wordings = [
        "schedule a '{name}' with {person} on {day} at {time} for {long}",
        "set up a meeting called '{name}' with {person} on {day} at {time}, {long} long",
        "book {long} with {person} on {day} at {time} and name it '{name}'",
    ]
    values = {"day": say_date(r, start[:10]), "time": say_time(r, start), "long": say_minutes(r, minutes)}
    text = make_request(r, *wordings, name=name, person=say_person(r, person), **values)
    return text, [find_address(person), create(name, person.email, start, minutes)]


@template("calendar", "medium")
def two_changes_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    first, second = r.sample(w.events, 2)
    change_text, call = change(r, second, day_known=False)
    wordings = [
        "delete event {a}, then take event {b} and {change}",
        "Cancel event {a}. For event {b}, {change}.",
    ]
    request = make_request(r, *wordings, a=first["event_id"], b=second["event_id"], change=change_text)
    return request, [delete(first), call]


@template("calendar", "medium")
def new_time_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    event = r.choice(w.events)
    start = meeting_start(r, event["duration"], event["event_start"][:10])
    lookup = ("calendar_get_event_information_by_id", {"event_id": event["event_id"], "field": "event_start"})
    wordings = [
        "move event {id} to {time} on the same day",
        "keep event {id} on its day but start it at {time}",
        "look up the day of event {id} and let it begin at {time} that day",
    ]
    text = make_request(r, *wordings, id=event["event_id"], time=say_time(r, start))
    return text, [lookup, update(event, "event_start", start)]


@template("calendar", "hard")
def change_first_or_last_of_day(w: World, r: Random) -> tuple[str, list[Call]]:
    day, events = r.choice(list(w.event_days(2, 3).items()))
    which = r.choice(["first", "last"])
    event = events[0] if which == "last" else events[-1]
    day_text = say_date(r, day)
    if r.random() < 0.35:
        wordings = ["cancel the {which} event on {day}", "delete my {which} meeting on {day}"]
        return make_request(r, *wordings, which=which, day=day_text), [search(None, day, day), delete(event)]
    change_text, call = change(r, event)
    wordings = [
        "find the {which} event on {day} and {change}",
        "take my {which} meeting on {day} and {change}",
    ]
    request = make_request(r, *wordings, which=which, day=day_text, change=change_text)
    return request, [search(None, day, day), call]


@template("calendar", "hard")
def clear_a_day(w: World, r: Random) -> tuple[str, list[Call]]:
    day, events = r.choice(list(w.event_days(2, 3).items()))
    wordings = [
        "cancel all my meetings on {day}",
        "clear my calendar on {day}",
        "I am away on {day}. Cancel every event.",
    ]
    return make_request(r, *wordings, day=say_date(r, day)), [search(None, day, day), *map(delete, events)]


@template("calendar", "hard")
def change_next_with_person(w: World, r: Random) -> tuple[str, list[Call]] | None:
    person = r.choice(w.people)
    coming = [e for e in w.events if e["participant_email"] == person.email and e["event_start"] > NOW]
    if not 1 <= len(coming) <= 3:
        return None
    event = min(coming, key=lambda e: e["event_start"])
    lookup = ("calendar_search_events", {"query": person.email, "time_min": NOW})
    if r.random() < 0.3:
        wordings = ["cancel my next meeting with {person}", "delete the next event that I have with {person}"]
        return make_request(r, *wordings, person=say_person(r, person)), [
            find_address(person),
            lookup,
            delete(event),
        ]
    change_text, call = change(r, event)
    wordings = [
        "take my next meeting with {person} and {change}",
        "find the next event with {person} and {change}",
    ]
    request = make_request(r, *wordings, person=say_person(r, person), change=change_text)
    return request, [find_address(person), lookup, call]


def meetings_with(w: World, person: Person, day: str) -> list[dict[str, Any]]:
    return [e for e in w.events if e["participant_email"] == person.email and e["event_start"][:10] == day]


@template("calendar", "hard")
def cancel_if_there_else_create(w: World, r: Random) -> tuple[str, list[Call]] | None:
    person = r.choice(w.people)
    coming = [
        e["event_start"][:10]
        for e in w.events
        if e["participant_email"] == person.email and e["event_start"] > NOW
    ]
    minutes, name = r.choice(DURATIONS), r.choice(EVENT_NAMES)
    start = meeting_start(r, minutes, r.choice(coming) if coming and r.random() < 0.6 else None)
    day = start[:10]
    meetings = meetings_with(w, person, day)
    if len(meetings) > 1:
        return None
    calls = [find_address(person), search(person.email, day, day)]
    calls.append(delete(meetings[0]) if meetings else create(name, person.email, start, minutes))
    wordings = [
        "If I have a meeting with {person} on {day}, cancel it. "
        "If not, create '{name}' with {person} on that day at {time} for {n} minutes.",
        "Check {day} for an event with {person}. Cancel it if there is one; "
        "otherwise schedule '{name}' with {person} that day at {time}, {n} minutes.",
    ]
    values = {
        "person": person.first,
        "day": say_date(r, day),
        "time": say_time(r, start),
    }
    return make_request(r, *wordings, name=name, n=minutes, **values), calls


@template("calendar", "hard")
def shift_named_by_what_it_is(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (event := named_on_day(w, r)):
        return None
    name, start = event["event_name"], event["event_start"]
    day = start[:10]
    hours = r.choice([1, 2])
    moved = datetime.fromisoformat(start) + timedelta(hours=hours)
    by_a_day = r.random() < 0.5
    if not by_a_day and (moved + timedelta(minutes=int(event["duration"]))).strftime("%H:%M") > "18:00":
        return None
    value = f"{next_day(day)} {start[11:]}" if by_a_day else str(moved)
    how = "to the next day, same time" if by_a_day else f"back by {'an hour' if hours == 1 else 'two hours'}"
    wordings = ["move the {name} on {day} {how}", "push '{name}' on {day} {how}"]
    text = make_request(r, *wordings, name=name, day=say_date(r, day), how=how)
    return text, [search(name, day, day), update(event, "event_start", value)]
