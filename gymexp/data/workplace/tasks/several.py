"""Tasks that need the tools of two domains, e.g. because one tool finds what the other one changes."""

from __future__ import annotations

from collections import Counter
from random import Random

from gymexp.data.workplace.tasks import analytics, calendar, customers, email, projects
from gymexp.data.workplace.tasks.draft import (
    Call,
    find_address,
    make_request,
    possessive,
    say_person,
    template,
)
from gymexp.data.workplace.tasks.words import (
    EVENT_NAMES,
    METRICS,
    PLOTS,
    SUBJECTS,
    make_body,
    make_task_name,
    say_date,
    say_minutes,
    say_time,
)
from gymexp.data.workplace.tasks.world import (
    BOARDS,
    DURATIONS,
    LISTS,
    STATUSES,
    World,
    meeting_start,
    other,
    weekday,
)

DOMAIN = "multi_domain"


@template(DOMAIN, "medium")
def cancel_and_tell(w: World, r: Random) -> tuple[str, list[Call]]:
    event, subject, body = r.choice(w.events), r.choice(SUBJECTS), make_body(r)
    to = r.choice(w.people).email
    wordings = [
        "delete event {id} and email {to} about '{subject}' with the text '{body}'",
        "cancel calendar event {id} and send {to} an email: subject '{subject}', body '{body}'",
    ]
    text = make_request(r, *wordings, id=event["event_id"], to=to, subject=subject, body=body)
    return text, [calendar.delete(event), email.send(to, subject, body)]


@template(DOMAIN, "medium")
def write_to_assignee(w: World, r: Random) -> tuple[str, list[Call]]:
    task, subject, body = r.choice(w.tasks), r.choice(SUBJECTS), make_body(r)
    lookup = (
        "project_management_get_task_information_by_id",
        {"task_id": task["task_id"], "field": "assigned_to_email"},
    )
    wordings = [
        "email whoever works on task {id} with the subject '{subject}' and the body '{body}'",
        "send the assignee of task {id} an email about '{subject}' saying '{body}'",
    ]
    text = make_request(r, *wordings, id=task["task_id"], subject=subject, body=body)
    return text, [lookup, email.send(task["assigned_to_email"], subject, body)]


@template(DOMAIN, "medium")
def meet_the_owner_of_customer(w: World, r: Random) -> tuple[str, list[Call]]:
    customer, name, minutes = r.choice(w.customers), r.choice(EVENT_NAMES), r.choice(DURATIONS)
    start = meeting_start(r, minutes)
    wordings = [
        "schedule '{name}' with whoever is in charge of {customer} on {day} at {time} for {long}",
        "set up '{name}', {long}, on {day} at {time} with the colleague who looks after {customer}",
    ]
    values = {"day": say_date(r, start[:10]), "time": say_time(r, start), "long": say_minutes(r, minutes)}
    text = make_request(r, *wordings, name=name, customer=customer["customer_name"], **values)
    lookup = customers.search(customer_name=customer["customer_name"])
    return text, [lookup, calendar.create(name, customer["assigned_to_email"], start, minutes)]


@template(DOMAIN, "medium")
def close_task_and_mark_customer(w: World, r: Random) -> tuple[str, list[Call]]:
    task, customer = r.choice(w.tasks), r.choice(w.customers)
    list_name, status = other(r, LISTS, task["list_name"]), other(r, STATUSES, customer["status"])
    wordings = [
        "move task {task} to {list} and mark customer {customer} as {status}",
        "put task {task} in {list} and set the status of customer {customer} to {status}",
    ]
    text = make_request(
        r, *wordings, task=task["task_id"], list=list_name, customer=customer["customer_id"], status=status
    )
    return text, [projects.update(task, "list_name", list_name), customers.update(customer, "status", status)]


@template(DOMAIN, "hard")
def meet_and_invite(w: World, r: Random) -> tuple[str, list[Call]]:
    person, name, minutes = r.choice(w.people), r.choice(EVENT_NAMES), r.choice(DURATIONS)
    start, body = meeting_start(r, minutes), make_body(r)
    wordings = [
        "schedule '{name}' with {person} on {day} at {time} for {long}, "
        "then email {person} with that name as the subject and the body '{body}'",
        "create '{name}' with {person} on {day} at {time}, {long}, and send {person} an email "
        "titled '{name}' that says '{body}'",
    ]
    values = {"day": say_date(r, start[:10]), "time": say_time(r, start), "long": say_minutes(r, minutes)}
    text = make_request(r, *wordings, name=name, person=say_person(r, person), body=body, **values)
    return text, [
        find_address(person),
        calendar.create(name, person.email, start, minutes),
        email.send(person.email, name, body),
    ]


@template(DOMAIN, "hard")
def cancel_named_and_tell(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (event := calendar.named_on_day(w, r)):
        return None
    name, day, subject, body = (
        event["event_name"],
        event["event_start"][:10],
        r.choice(SUBJECTS),
        make_body(r),
    )
    wordings = [
        "cancel the {name} on {day} and email its participant about '{subject}' saying '{body}'",
        "delete '{name}' on {day}, then write to the participant: subject '{subject}', body '{body}'",
    ]
    text = make_request(r, *wordings, name=name, day=say_date(r, day), subject=subject, body=body)
    calls = [
        calendar.search(name, day, day),
        calendar.delete(event),
        email.send(event["participant_email"], subject, body),
    ]
    return text, calls


@template(DOMAIN, "hard")
def hand_over_task_and_tell(w: World, r: Random) -> tuple[str, list[Call]]:
    task, subject, body = r.choice(w.tasks), r.choice(SUBJECTS), make_body(r)
    new_owner = other(r, w.team, w.person(task["assigned_to_email"]))
    wordings = [
        "reassign task {id} to {new_owner} and email {new_owner} about '{subject}' with '{body}'",
        "give {new_owner} task {id}, then send {new_owner} an email: subject '{subject}', body '{body}'",
    ]
    text = make_request(
        r, *wordings, id=task["task_id"], new_owner=new_owner.first, subject=subject, body=body
    )
    return text, [
        find_address(new_owner),
        projects.update(task, "assigned_to_email", new_owner.email),
        email.send(new_owner.email, subject, body),
    ]


@template(DOMAIN, "hard")
def advance_customer_and_meet(w: World, r: Random) -> tuple[str, list[Call]]:
    customer, name, minutes = r.choice(w.customers), r.choice(EVENT_NAMES), r.choice(DURATIONS)
    status, start = other(r, STATUSES, customer["status"]), meeting_start(r, minutes)
    wordings = [
        "mark {customer} as {status} and schedule '{name}' with the colleague in charge of that customer "
        "on {day} at {time} for {long}",
        "set {customer} to {status} in the crm, then book '{name}' with whoever looks after that customer "
        "on {day} at {time}, {long}",
    ]
    values = {"day": say_date(r, start[:10]), "time": say_time(r, start), "long": say_minutes(r, minutes)}
    text = make_request(r, *wordings, customer=customer["customer_name"], status=status, name=name, **values)
    calls = [
        customers.search(customer_name=customer["customer_name"]),
        customers.update(customer, "status", status),
    ]
    return text, [*calls, calendar.create(name, customer["assigned_to_email"], start, minutes)]


@template(DOMAIN, "hard")
def plot_or_task_by_visits(w: World, r: Random) -> tuple[str, list[Call]]:
    day, name, due, board = analytics.span(r)[0], make_task_name(r), weekday(r), r.choice(BOARDS)
    visits = Counter(v["date_of_visit"] for v in w.visitors)[day]
    limit, person = max(0, visits + r.choice([-3, -2, -1, 0, 1, 2])), r.choice(w.team)
    metric, kind = r.choice(list(METRICS)), r.choice(list(PLOTS))
    wordings = [
        "If {day} had more than {n} visits, make {plot} for that day. "
        "Otherwise create a {board} task '{name}' for {to} in Backlog, due {due}.",
        "Count the visits on {day}. With more than {n}, create {plot} for that day, "
        "else add '{name}' to the Backlog of the {board} board for {to}, due {due}.",
    ]
    values = {
        "day": say_date(r, day),
        "n": limit,
        "board": board,
        "to": person.email,
        "due": say_date(r, due),
    }
    text = make_request(r, *wordings, plot=analytics.describe_plot(r, metric, kind), name=name, **values)
    task = projects.create(name, person.email, "Backlog", due, board)
    chosen = analytics.plot(day, day, metric, kind) if visits > limit else task
    return text, [analytics.lookup("total_visits_count", day, day), chosen]


@template(DOMAIN, "hard")
def follow_up_mail_with_task(w: World, r: Random) -> tuple[str, list[Call]] | None:
    mail = r.choice(w.emails)
    sender, name, due, board = (
        w.person(mail["sender/recipient"]),
        make_task_name(r),
        weekday(r),
        r.choice(BOARDS),
    )
    if sender not in w.team:
        return None
    list_name = r.choice(LISTS)
    wordings = [
        "create a {board} task '{name}' in {list}, due {due}, for whoever sent email {id}, then delete that",
        "find the sender of email {id}, give that person a new task '{name}' on the {board} board in {list}, "
        "due {due}, and delete the email",
    ]
    text = make_request(
        r, *wordings, board=board, name=name, list=list_name, due=say_date(r, due), id=mail["email_id"]
    )
    calls = [
        email.sender_of(mail),
        projects.create(name, sender.email, list_name, due, board),
        email.delete(mail),
    ]
    return text, calls


@template(DOMAIN, "hard")
def last_mail_to_customer_owner(w: World, r: Random) -> tuple[str, list[Call]] | None:
    person, customer = r.choice(w.people), r.choice(w.customers)
    if not (mails := email.latest(w, person)) or customer["assigned_to_email"] == person.email:
        return None
    wordings = [
        "forward {whose} last email to the colleague in charge of {customer}",
        "find who looks after {customer} and forward the latest email from {person} to them",
    ]
    text = make_request(
        r, *wordings, whose=possessive(person), person=person.first, customer=customer["customer_name"]
    )
    owner = w.person(customer["assigned_to_email"])
    lookup = customers.search(customer_name=customer["customer_name"])
    return text, [lookup, email.search(person.first), email.forward(mails[0], owner)]
