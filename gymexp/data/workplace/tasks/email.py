"""Email tasks: send, reply, forward, delete. Searches return one or two mails, as a mail's body is long."""

from __future__ import annotations

from random import Random

from gymexp.data.workplace.tasks.draft import (
    Call,
    find_address,
    make_request,
    possessive,
    say_person,
    template,
)
from gymexp.data.workplace.tasks.words import SUBJECTS, make_body
from gymexp.data.workplace.tasks.world import Person, Record, World, other

LONGEST_BODY = 220


def send(recipient: str, subject: str, body: str) -> Call:
    return ("email_send_email", {"recipient": recipient, "subject": subject, "body": body})


def delete(mail: Record) -> Call:
    return ("email_delete_email", {"email_id": mail["email_id"]})


def forward(mail: Record, person: Person) -> Call:
    return ("email_forward_email", {"email_id": mail["email_id"], "recipient": person.email})


def reply(mail: Record, body: str) -> Call:
    return ("email_reply_email", {"email_id": mail["email_id"], "body": body})


def search(query: str, page_size: int = 1) -> Call:
    return ("email_search_emails", {"query": query, "page_size": page_size})


def sender_of(mail: Record) -> Call:
    return ("email_get_email_information_by_id", {"email_id": mail["email_id"], "field": "sender/recipient"})


def latest(w: World, person: Person, subject: str = "", count: int = 1) -> list[Record] | None:
    """Returns the first `count` mails that a search for first name and subject finds; None unless there are
    so many, all of them short mails of that colleague with that subject."""
    mails = w.search_emails(f"{person.first} {subject}")[:count]
    fits = all(m["sender/recipient"] == person.email and len(m["body"]) <= LONGEST_BODY for m in mails)
    fits = fits and all(subject in m["subject"] for m in mails)
    return mails if fits and len(mails) == count else None


def act(w: World, r: Random, mail: Record) -> tuple[str, list[Call]]:
    """Draws an action on a mail. Returns an imperative with the placeholder {mail}, and the calls that follow
    the search for the mail."""
    kind = r.randrange(3)
    if kind == 0:
        return "delete {mail}", [delete(mail)]
    if kind == 1:
        person = r.choice(w.people)
        return f"forward {{mail}} to {person.email}", [forward(mail, person)]
    body = make_body(r)
    return f"reply to {{mail}} with '{body}'", [reply(mail, body)]


@template("email", "easy")
def send_to_address(w: World, r: Random) -> tuple[str, list[Call]]:
    person, subject, body = r.choice(w.people), r.choice(SUBJECTS), make_body(r)
    wordings = [
        "send an email to {to} with the subject '{subject}' and the body '{body}'",
        "email {to}: subject '{subject}', body '{body}'",
        "write to {to} about '{subject}', saying '{body}'",
    ]
    return make_request(r, *wordings, to=person.email, subject=subject, body=body), [
        send(person.email, subject, body)
    ]


@template("email", "easy")
def delete_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    mail = r.choice(w.emails)
    wordings = [
        "delete email {id}",
        "remove the email with ID {id}",
        "delete message {id} from my inbox",
        "I no longer need email {id}. Delete it.",
    ]
    return make_request(r, *wordings, id=mail["email_id"]), [delete(mail)]


@template("email", "easy")
def forward_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    mail, person = r.choice(w.emails), r.choice(w.people)
    wordings = [
        "forward email {id} to {to}",
        "pass the email with ID {id} on to {to}",
        "send email {id} on to {to}",
    ]
    return make_request(r, *wordings, id=mail["email_id"], to=person.email), [forward(mail, person)]


@template("email", "easy")
def reply_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    mail, body = r.choice(w.emails), make_body(r)
    wordings = [
        "reply to email {id} with '{body}'",
        "answer email {id}: '{body}'",
        "write '{body}' in reply to email {id}",
    ]
    return make_request(r, *wordings, id=mail["email_id"], body=body), [reply(mail, body)]


@template("email", "medium")
def send_to_first_name(w: World, r: Random) -> tuple[str, list[Call]]:
    person, subject, body = r.choice(w.people), r.choice(SUBJECTS), make_body(r)
    wordings = [
        "send an email to {to} with the subject '{subject}' and the body '{body}'",
        "email {to} about '{subject}' and say '{body}'",
        "write to {to}: subject '{subject}', body '{body}'",
    ]
    text = make_request(r, *wordings, to=say_person(r, person), subject=subject, body=body)
    return text, [find_address(person), send(person.email, subject, body)]


@template("email", "medium")
def forward_to_first_name(w: World, r: Random) -> tuple[str, list[Call]]:
    mail, person = r.choice(w.emails), r.choice(w.people)
    wordings = [
        "forward email {id} to {to}",
        "pass email {id} on to {to}",
        "let {to} see email {id} by forwarding it",
    ]
    text = make_request(r, *wordings, id=mail["email_id"], to=say_person(r, person))
    return text, [find_address(person), forward(mail, person)]


@template("email", "medium")
def write_to_sender(w: World, r: Random) -> tuple[str, list[Call]]:
    mail, subject, body = r.choice(w.emails), r.choice(SUBJECTS), make_body(r)
    wordings = [
        "find out who sent email {id} and send them a new email about '{subject}' saying '{body}'",
        "send a new email to the sender of email {id}: subject '{subject}', body '{body}'",
    ]
    text = make_request(r, *wordings, id=mail["email_id"], subject=subject, body=body)
    return text, [sender_of(mail), send(mail["sender/recipient"], subject, body)]


@template("email", "medium")
def act_on_found(w: World, r: Random) -> tuple[str, list[Call]] | None:
    mail = r.choice(w.emails)
    person, subject = w.person(mail["sender/recipient"]), mail["subject"]
    if latest(w, person, subject) != [mail]:
        return None
    action, calls = act(w, r, mail)
    mail_text = r.choice(
        [
            f"{possessive(person)} last email about '{subject}'",
            f"the latest '{subject}' email from {person.first}",
        ]
    )
    return make_request(r, action, mail=mail_text), [search(f"{person.first} {subject}"), *calls]


@template("email", "medium")
def two_actions_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    first, second = r.sample(w.emails, 2)
    action, calls = act(w, r, second)
    text = make_request(
        r,
        f"delete email {{first}} and then {action}",
        first=first["email_id"],
        mail=f"email {second['email_id']}",
    )
    return text, [delete(first), *calls]


@template("email", "hard")
def forward_found_to_first_name(w: World, r: Random) -> tuple[str, list[Call]] | None:
    person = r.choice(w.people)
    mail = r.choice([m for m in w.emails if m["sender/recipient"] == person.email])
    recipient, subject = other(r, w.people, person), r.choice([mail["subject"], ""])
    if not (mails := latest(w, person, subject)):
        return None
    about = f" about '{subject}'" if subject else ""
    wordings = [
        "forward {whose} last email{about} to {to}",
        "send {to} the latest email from {person}{about} by forwarding it",
        "pass the most recent email from {person}{about} on to {to}",
    ]
    text = make_request(
        r,
        *wordings,
        whose=possessive(person),
        person=person.first,
        about=about,
        to=say_person(r, recipient),
    )
    return text, [
        find_address(recipient),
        search(f"{person.first} {subject}".strip()),
        forward(mails[0], recipient),
    ]


@template("email", "hard")
def act_on_last_of_sender(w: World, r: Random) -> tuple[str, list[Call]] | None:
    person = r.choice(w.people)
    if not (mails := latest(w, person)):
        return None
    action, calls = act(w, r, mails[0])
    mail_text = r.choice([f"the last email from {person.first}", f"{possessive(person)} most recent email"])
    return make_request(r, action, mail=mail_text), [search(person.first), *calls]


@template("email", "hard")
def delete_last_two(w: World, r: Random) -> tuple[str, list[Call]] | None:
    person = r.choice(w.people)
    if not (mails := latest(w, person, count=2)):
        return None
    wordings = [
        "delete the last two emails from {person}",
        "remove the two most recent emails that {person} sent me",
    ]
    return make_request(r, *wordings, person=say_person(r, person)), [
        search(person.first, 2),
        *map(delete, mails),
    ]


@template("email", "hard")
def depends_on_sender(w: World, r: Random) -> tuple[str, list[Call]]:
    mail = r.choice(w.emails)
    sender = w.person(mail["sender/recipient"])
    guess = sender if r.random() < 0.5 else r.choice(w.people)
    body, recipient = make_body(r), other(r, w.people, sender)
    choices = [
        (f"reply with '{body}'", reply(mail, body)),
        (f"forward it to {recipient.email}", forward(mail, recipient)),
        ("delete it", delete(mail)),
    ]
    then, otherwise = r.sample(choices, 2)
    chosen = then if guess == sender else otherwise
    wordings = [
        "If email {id} is from {guess}, {then}; otherwise {otherwise}.",
        "Check who sent email {id}. If it was {guess}, {then}. If not, {otherwise}.",
    ]
    text = make_request(
        r, *wordings, id=mail["email_id"], guess=guess.first, then=then[0], otherwise=otherwise[0]
    )
    return text, [sender_of(mail), chosen[1]]


@template("email", "hard")
def tell_two_people(w: World, r: Random) -> tuple[str, list[Call]]:
    first, second = r.sample(w.people, 2)
    subject, body = r.choice(SUBJECTS), make_body(r)
    wordings = [
        "email {first} and then {second} about '{subject}', both with the body '{body}'",
        "send first {first} and then {second} an email with the subject '{subject}' and the text '{body}'",
    ]
    text = make_request(r, *wordings, first=first.first, second=second.first, subject=subject, body=body)
    sends = [send(p.email, subject, body) for p in (first, second)]
    return text, [find_address(first), find_address(second), *sends]
