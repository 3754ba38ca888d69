"""Project board tasks: create, move, reassign, rename and delete tasks."""

from __future__ import annotations

from random import Random
from typing import Any

from gymexp.data.workplace.tasks.draft import (
    Call,
    find_address,
    make_request,
    possessive,
    say_person,
    template,
)
from gymexp.data.workplace.tasks.words import make_task_name, say_date
from gymexp.data.workplace.tasks.world import BOARDS, LISTS, World, is_unique, other, weekday

Group = tuple[str, dict[str, Any], list[dict[str, Any]]]


def update(task: dict[str, Any], field: str, value: str) -> Call:
    return (
        "project_management_update_task",
        {"task_id": task["task_id"], "field": field, "new_value": value},
    )


def delete(task: dict[str, Any]) -> Call:
    return ("project_management_delete_task", {"task_id": task["task_id"]})


def create(name: str, email: str, list_name: str, due: str, board: str) -> Call:
    arguments = {
        "task_name": name,
        "assigned_to_email": email,
        "list_name": list_name,
        "due_date": due,
        "board": board,
    }
    return ("project_management_create_task", arguments)


def search(**arguments: str) -> Call:
    return ("project_management_search_tasks", arguments)


def described(w: World, r: Random) -> tuple[dict[str, Any], Call, str] | None:
    """Draws a task that its name and its due date identify. Returns the task, the search for it, and the due
    date in words; None if another task fits the name and the date."""
    task = r.choice(w.tasks)
    name, due = task["task_name"], task["due_date"]
    if not is_unique(w.tasks, lambda t: name.lower() in t["task_name"].lower() and t["due_date"] == due):
        return None
    return task, search(task_name=name, due_date=due), say_date(r, due)


def change(r: Random, task: dict[str, Any]) -> tuple[str, Call]:
    """Draws one change of a task, and returns it as an imperative with "it" and as a call."""
    kind = r.randrange(4)
    if kind == 0:
        value = other(r, LISTS, task["list_name"])
        return r.choice([f"move it to {value}", f"put it in the {value} list"]), update(
            task, "list_name", value
        )
    if kind == 1:
        value = other(r, BOARDS, task["board"])
        return f"move it to the {value} board", update(task, "board", value)
    if kind == 2:
        value = weekday(r, "2023-12-14")
        return f"change its due date to {say_date(r, value)}", update(task, "due_date", value)
    value = make_task_name(r)
    return f"rename it to '{value}'", update(task, "task_name", value)


@template("project_management", "easy")
def delete_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    task = r.choice(w.tasks)
    wordings = [
        "delete task {id}",
        "remove the task with ID {id} from the board",
        "drop project task {id}",
        "Task {id} is obsolete. Delete it.",
    ]
    return make_request(r, *wordings, id=task["task_id"]), [delete(task)]


@template("project_management", "easy")
def move_to_list_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    task = r.choice(w.tasks)
    value = other(r, LISTS, task["list_name"])
    wordings = [
        "move task {id} to {value}",
        "put task {id} in the {value} list",
        "set the list of task {id} to {value}",
        "Task {id} belongs in {value} now. Move it.",
    ]
    return make_request(r, *wordings, id=task["task_id"], value=value), [update(task, "list_name", value)]


@template("project_management", "easy")
def reassign_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    task = r.choice(w.tasks)
    email = other(r, w.team, w.person(task["assigned_to_email"])).email
    wordings = [
        "assign task {id} to {email}",
        "reassign project task {id} to {email}",
        "give task {id} to {email}",
        "hand task {id} over to {email}",
    ]
    return make_request(r, *wordings, id=task["task_id"], email=email), [
        update(task, "assigned_to_email", email)
    ]


@template("project_management", "easy")
def postpone_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    task, due = r.choice(w.tasks), weekday(r, "2023-12-14")
    wordings = [
        "change the due date of task {id} to {due}",
        "make task {id} due on {due}",
        "set task {id} to be due {due}",
        "Task {id} is due on {due} now. Update it.",
    ]
    return make_request(r, *wordings, id=task["task_id"], due=due), [update(task, "due_date", due)]


@template("project_management", "easy")
def rename_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    task, name = r.choice(w.tasks), make_task_name(r)
    wordings = [
        "rename task {id} to '{name}'",
        "change the name of task {id} to '{name}'",
        "call task {id} '{name}'",
    ]
    return make_request(r, *wordings, id=task["task_id"], name=name), [update(task, "task_name", name)]


@template("project_management", "easy")
def move_to_board_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    task = r.choice(w.tasks)
    board = other(r, BOARDS, task["board"])
    wordings = [
        "move task {id} to the {board} board",
        "put task {id} on the {board} board",
        "set the board of task {id} to {board}",
    ]
    return make_request(r, *wordings, id=task["task_id"], board=board), [update(task, "board", board)]


@template("project_management", "easy")
def create_from_values(w: World, r: Random) -> tuple[str, list[Call]]:
    person, name, due = r.choice(w.team), make_task_name(r), weekday(r)
    list_name, board = r.choice(LISTS), r.choice(BOARDS)
    wordings = [
        "create a task '{name}' on the {board} board in {list}, assigned to {email}, due {due}",
        "add a task called '{name}' for {email} to the {list} list of the {board} board, due on {due}",
    ]
    text = make_request(r, *wordings, name=name, board=board, list=list_name, email=person.email, due=due)
    return text, [create(name, person.email, list_name, due, board)]


@template("project_management", "medium")
def change_described(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (drawn := described(w, r)):
        return None
    task, lookup, due = drawn
    if r.random() < 0.3:
        wordings = ["delete the task '{name}' that is due on {due}", "remove the '{name}' task due {due}"]
        return make_request(r, *wordings, name=task["task_name"], due=due), [lookup, delete(task)]
    change_text, call = change(r, task)
    wordings = [
        "find the task '{name}' due on {due} and {change}",
        "take the '{name}' task due {due} and {change}",
    ]
    return make_request(r, *wordings, name=task["task_name"], due=due, change=change_text), [lookup, call]


@template("project_management", "medium")
def reassign_to_first_name(w: World, r: Random) -> tuple[str, list[Call]]:
    task = r.choice(w.tasks)
    person = other(r, w.team, w.person(task["assigned_to_email"]))
    wordings = [
        "assign task {id} to {person}",
        "give task {id} to {person}",
        "reassign {id} to {person} on the project board",
        "{person} will take over task {id}. Reassign it.",
    ]
    text = make_request(r, *wordings, id=task["task_id"], person=say_person(r, person))
    return text, [find_address(person), update(task, "assigned_to_email", person.email)]


@template("project_management", "medium")
def create_for_first_name(w: World, r: Random) -> tuple[str, list[Call]]:
    person, name, due = r.choice(w.team), make_task_name(r), weekday(r)
    list_name, board = r.choice(LISTS), r.choice(BOARDS)
    wordings = [
        "create a {board} task '{name}' for {person} in {list}, due {due}",
        "add '{name}' to the {list} list of the {board} board, due on {due}, and assign it to {person}",
    ]
    values = {"board": board, "list": list_name, "due": say_date(r, due)}
    text = make_request(r, *wordings, name=name, person=say_person(r, person), **values)
    return text, [find_address(person), create(name, person.email, list_name, due, board)]


@template("project_management", "medium")
def two_changes_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    first, second = r.sample(w.tasks, 2)
    (first_change, first_call), (second_change, second_call) = change(r, first), change(r, second)
    wordings = ["take task {a} and {x}, then take task {b} and {y}", "For task {a}, {x}. For task {b}, {y}."]
    values = {"a": first["task_id"], "b": second["task_id"], "x": first_change, "y": second_change}
    return make_request(r, *wordings, **values), [first_call, second_call]


def group_of_person(w: World, r: Random, low: int, high: int) -> tuple[Any, Group] | None:
    """Draws a colleague and a group of low..high of the colleague's tasks: in one list of one board, or due
    on one day. A group is its description, its search keys and its tasks. None if the number of tasks does
    not fit."""
    person = r.choice(w.team)
    task = r.choice([t for t in w.tasks if t["assigned_to_email"] == person.email])
    if r.random() < 0.5:
        keys = {"list_name": task["list_name"], "board": task["board"]}
        description = f"{task['board']} tasks in {task['list_name']}"
    else:
        keys = {"due_date": task["due_date"]}
        description = f"tasks due on {say_date(r, task['due_date'])}"
    rows = [
        t
        for t in w.tasks
        if all(t[k] == v for k, v in keys.items()) and t["assigned_to_email"] == person.email
    ]
    return (person, (description, keys, rows)) if low <= len(rows) <= high else None


@template("project_management", "hard")
def change_all_of_person(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (drawn := group_of_person(w, r, 1, 3)):
        return None
    person, (description, keys, rows) = drawn
    lookup = search(assigned_to_email=person.email, **keys)
    if r.random() < 0.35:
        wordings = ["delete all of {whose} {tasks}", "remove every one of {whose} {tasks}"]
        request = make_request(r, *wordings, whose=possessive(person), tasks=description)
        return request, [find_address(person), lookup, *map(delete, rows)]
    value = other(r, LISTS, *{t["list_name"] for t in rows})
    wordings = ["move all of {whose} {tasks} to {value}", "put all {whose} {tasks} in the {value} list"]
    calls = [find_address(person), lookup, *(update(t, "list_name", value) for t in rows)]
    return make_request(r, *wordings, whose=possessive(person), tasks=description, value=value), calls


@template("project_management", "hard")
def hand_over_to_colleague(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (drawn := group_of_person(w, r, 1, 2)):
        return None
    person, (description, keys, rows) = drawn
    new_owner = other(r, w.team, person)
    wordings = [
        "reassign all of {whose} {tasks} to {new_owner}",
        "give {whose} {tasks} to {new_owner}",
        "{new_owner} takes over all {whose} {tasks}. Reassign them.",
    ]
    calls = [find_address(person), find_address(new_owner), search(assigned_to_email=person.email, **keys)]
    calls += [update(t, "assigned_to_email", new_owner.email) for t in rows]
    return make_request(
        r, *wordings, whose=possessive(person), tasks=description, new_owner=new_owner.first
    ), calls


@template("project_management", "hard")
def depends_on_list(w: World, r: Random) -> tuple[str, list[Call]]:
    task = r.choice(w.tasks)
    guess = task["list_name"] if r.random() < 0.5 else r.choice(LISTS)
    then, due = other(r, LISTS, guess, task["list_name"]), weekday(r, "2023-12-14")
    lookup = (
        "project_management_get_task_information_by_id",
        {"task_id": task["task_id"], "field": "list_name"},
    )
    call = update(task, "list_name", then) if task["list_name"] == guess else update(task, "due_date", due)
    wordings = [
        "If task {id} is in {guess}, move it to {then}; otherwise change its due date to {due}.",
        "Check the list of task {id}: if it is {guess}, put it in {then}, if not make it due on {due}.",
    ]
    return make_request(r, *wordings, id=task["task_id"], guess=guess, then=then, due=say_date(r, due)), [
        lookup,
        call,
    ]


@template("project_management", "hard")
def depends_on_assignee(w: World, r: Random) -> tuple[str, list[Call]]:
    task = r.choice(w.tasks)
    holder = w.person(task["assigned_to_email"])
    guess = holder if r.random() < 0.5 else r.choice(w.team)
    then, new_owner = other(r, LISTS, task["list_name"]), other(r, w.team, holder, guess)
    lookup = (
        "project_management_get_task_information_by_id",
        {"task_id": task["task_id"], "field": "assigned_to_email"},
    )
    move, give = update(task, "list_name", then), update(task, "assigned_to_email", new_owner.email)
    calls = [lookup, move] if guess == holder else [lookup, find_address(new_owner), give]
    wordings = [
        "If {guess} is working on task {id}, move it to {then}. Otherwise assign it to {new_owner}.",
        "See who has task {id}. If it is {guess}, put it in {then}; if not, give it to {new_owner}.",
    ]
    return make_request(
        r, *wordings, id=task["task_id"], guess=guess.first, then=then, new_owner=new_owner.first
    ), calls
