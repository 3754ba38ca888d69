"""Customer relationship tasks: add, update, hand over and delete customer records."""

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
from gymexp.data.workplace.tasks.words import COMPANIES, FIRST_NAMES, LAST_NAMES, NOTES, make_phone, say_date
from gymexp.data.workplace.tasks.world import PRODUCTS, STATUSES, Person, World, other, weekday

DOMAIN = "customer_relationship_manager"


def update(customer: dict[str, Any], field: str, value: str) -> Call:
    arguments = {"customer_id": customer["customer_id"], "field": field, "new_value": value}
    return (f"{DOMAIN}_update_customer", arguments)


def delete(customer: dict[str, Any]) -> Call:
    return (f"{DOMAIN}_delete_customer", {"customer_id": customer["customer_id"]})


def search(**arguments: str) -> Call:
    return (f"{DOMAIN}_search_customers", arguments)


def new_customer(r: Random) -> tuple[str, str]:
    """Draws the name and the email address of a customer whom the server does not have yet."""
    first, last = r.choice(FIRST_NAMES), r.choice(LAST_NAMES)
    return f"{first} {last}", f"{first}.{last}@{r.choice(COMPANIES)}.com".lower()


def change(r: Random, customer: dict[str, Any]) -> tuple[str, Call]:
    """Draws one change of a customer, and returns it as an imperative ("set X to Y") and as a call."""
    status, product = other(r, STATUSES, customer["status"]), other(r, PRODUCTS, customer["product_interest"])
    day, phone, note = weekday(r), make_phone(r), r.choice(NOTES)
    text, field, value = r.choice(
        [
            (f"set the status to {status}", "status", status),
            (f"change the status to {status}", "status", status),
            (f"change the product interest to {product}", "product_interest", product),
            (f"set the follow-up date to {say_date(r, day)}", "follow_up_by", day),
            (f"change the phone number to {phone}", "customer_phone", phone),
            (f"replace the notes with '{note}'", "notes", note),
        ]
    )
    return text, update(customer, field, value)


@template(DOMAIN, "easy")
def delete_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    wordings = [
        "delete customer {id}",
        "remove customer {id} from the crm",
        "drop the customer with ID {id}",
        "We lost touch with customer {id}. Delete the record.",
    ]
    return make_request(r, *wordings, id=customer["customer_id"]), [delete(customer)]


@template(DOMAIN, "easy")
def set_status_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    status = other(r, STATUSES, customer["status"])
    wordings = [
        "set the status of customer {id} to {value}",
        "mark customer {id} as {value}",
        "move customer {id} to {value} in the crm",
    ]
    return make_request(r, *wordings, id=customer["customer_id"], value=status), [
        update(customer, "status", status)
    ]


@template(DOMAIN, "easy")
def set_product_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    product = other(r, PRODUCTS, customer["product_interest"])
    wordings = [
        "set the product interest of customer {id} to {value}",
        "change what customer {id} is interested in to {value}",
        "Customer {id} wants {value} now. Update the product interest.",
    ]
    return make_request(r, *wordings, id=customer["customer_id"], value=product), [
        update(customer, "product_interest", product)
    ]


@template(DOMAIN, "easy")
def set_contact_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    customer, phone, address = r.choice(w.customers), make_phone(r), new_customer(r)[1]
    noun, field, value = r.choice(
        [("phone number", "customer_phone", phone), ("email address", "customer_email", address)]
    )
    wordings = [
        "change the {noun} of customer {id} to {value}",
        "set the {noun} of customer {id} to {value}",
        "Customer {id} has a new {noun}: {value}. Update it.",
    ]
    return make_request(r, *wordings, noun=noun, id=customer["customer_id"], value=value), [
        update(customer, field, value)
    ]


@template(DOMAIN, "easy")
def set_note_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    customer, note = r.choice(w.customers), r.choice(NOTES)
    wordings = [
        "set the notes of customer {id} to '{value}'",
        "replace the notes of customer {id} with '{value}'",
    ]
    return make_request(r, *wordings, id=customer["customer_id"], value=note), [
        update(customer, "notes", note)
    ]


@template(DOMAIN, "easy")
def set_date_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    noun, field, value = r.choice(
        [
            ("follow-up date", "follow_up_by", weekday(r)),
            ("last contact date", "last_contact_date", weekday(r, "2023-11-01", "2023-11-30")),
        ]
    )
    wordings = ["set the {noun} of customer {id} to {value}", "change the {noun} of customer {id} to {value}"]
    return make_request(r, *wordings, noun=noun, id=customer["customer_id"], value=value), [
        update(customer, field, value)
    ]


@template(DOMAIN, "easy")
def reassign_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    email = other(r, w.people, w.person(customer["assigned_to_email"])).email
    wordings = [
        "assign customer {id} to {email}",
        "reassign customer {id} to {email}",
        "give customer {id} to {email}",
    ]
    return make_request(r, *wordings, id=customer["customer_id"], email=email), [
        update(customer, "assigned_to_email", email)
    ]


@template(DOMAIN, "easy")
def add_from_values(w: World, r: Random) -> tuple[str, list[Call]]:
    (name, address), person = new_customer(r), r.choice(w.sales)
    status, product = r.choice(STATUSES), r.choice(PRODUCTS)
    required = {"customer_name": name, "assigned_to_email": person.email, "status": status}
    if r.random() < 0.5:
        wordings = [
            "add {name} as a new {status} assigned to {email}",
            "create a customer {name}, status {status}, for {email}",
        ]
        return make_request(r, *wordings, name=name, status=status, email=person.email), [
            (f"{DOMAIN}_add_customer", required)
        ]
    wordings = [
        "add a customer {name} ({address}) as {status}, interested in {product}, assigned to {email}",
        "create a {status} named {name} for {email}: email {address}, product interest {product}",
    ]
    text = make_request(
        r, *wordings, name=name, address=address, status=status, product=product, email=person.email
    )
    return text, [
        (f"{DOMAIN}_add_customer", required | {"customer_email": address, "product_interest": product})
    ]


@template(DOMAIN, "medium")
def change_by_name(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    name = customer["customer_name"]
    if r.random() < 0.25:
        wordings = [
            "delete {name} from the crm",
            "remove the customer {name}",
            "drop {name} from our customers",
        ]
        return make_request(r, *wordings, name=name), [search(customer_name=name), delete(customer)]
    change_text, call = change(r, customer)
    wordings = [
        "find {name} in the crm and {change}",
        "{change} for the customer {name}",
        "look up {name} and {change}",
    ]
    return make_request(r, *wordings, name=name, change=change_text), [search(customer_name=name), call]


@template(DOMAIN, "medium")
def add_for_first_name(w: World, r: Random) -> tuple[str, list[Call]]:
    (name, _), person, status = new_customer(r), r.choice(w.people), r.choice(STATUSES)
    wordings = [
        "add {name} to the crm as a {status} and assign it to {person}",
        "create a new {status} called {name} for {person}",
        "add a customer named {name}, status {status}, assigned to {person}",
    ]
    arguments = {"customer_name": name, "assigned_to_email": person.email, "status": status}
    text = make_request(r, *wordings, name=name, status=status, person=say_person(r, person))
    return text, [find_address(person), (f"{DOMAIN}_add_customer", arguments)]


@template(DOMAIN, "medium")
def reassign_to_first_name(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    person = other(r, w.people, w.person(customer["assigned_to_email"]))
    wordings = [
        "assign customer {id} to {person}",
        "hand customer {id} over to {person}",
        "give customer {id} to {person}",
    ]
    text = make_request(r, *wordings, id=customer["customer_id"], person=say_person(r, person))
    return text, [find_address(person), update(customer, "assigned_to_email", person.email)]


@template(DOMAIN, "medium")
def two_changes_by_id(w: World, r: Random) -> tuple[str, list[Call]]:
    first, second = r.sample(w.customers, 2)
    (first_change, first_call), (second_change, second_call) = change(r, first), change(r, second)
    wordings = [
        "For customer {a}, {x}. For customer {b}, {y}.",
        "{x} for customer {a}, and {y} for customer {b}",
    ]
    values = {"a": first["customer_id"], "b": second["customer_id"], "x": first_change, "y": second_change}
    return make_request(r, *wordings, **values), [first_call, second_call]


def group(w: World, r: Random, low: int, high: int) -> tuple[Person, str, str, list[dict[str, Any]]] | None:
    """Draws the colleague, the status and the product interest that low..high customers share. Returns these
    three and the customers, or None if the number does not fit."""
    row = r.choice(w.customers)
    keys = ("assigned_to_email", "status", "product_interest")
    rows = [c for c in w.customers if all(c[k] == row[k] for k in keys)]
    if not low <= len(rows) <= high:
        return None
    return w.person(row["assigned_to_email"]), row["status"], row["product_interest"], rows


def describe_group(r: Random, person: Person, status: str, product: str) -> str:
    return r.choice(
        [
            f"{possessive(person)} customers with status {status} and interest in {product}",
            f"{possessive(person)} {status} customers who are interested in {product}",
        ]
    )


@template(DOMAIN, "hard")
def change_group(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (drawn := group(w, r, 1, 3)):
        return None
    person, status, product, rows = drawn
    description = describe_group(r, person, status, product)
    calls = [
        find_address(person),
        search(product_interest=product, status=status, assigned_to_email=person.email),
    ]
    if r.random() < 0.35:
        wordings = ["delete all of {group}", "We no longer need {group}. Delete them all."]
        return make_request(r, *wordings, group=description), calls + [delete(c) for c in rows]
    value = other(r, STATUSES, status)
    wordings = ["move all of {group} to {value}", "set the status of all of {group} to {value}"]
    return make_request(r, *wordings, group=description, value=value), calls + [
        update(c, "status", value) for c in rows
    ]


@template(DOMAIN, "hard")
def hand_over_group(w: World, r: Random) -> tuple[str, list[Call]] | None:
    if not (drawn := group(w, r, 1, 2)):
        return None
    person, status, product, rows = drawn
    new_owner = other(r, w.sales, person)
    calls = [
        find_address(person),
        find_address(new_owner),
        search(product_interest=product, status=status, assigned_to_email=person.email),
    ]
    calls += [update(c, "assigned_to_email", new_owner.email) for c in rows]
    wordings = ["reassign all of {group} to {new_owner}", "give all of {group} to {new_owner}"]
    description = describe_group(r, person, status, product)
    return make_request(r, *wordings, group=description, new_owner=new_owner.first), calls


@template(DOMAIN, "hard")
def depends_on_status(w: World, r: Random) -> tuple[str, list[Call]]:
    customer = r.choice(w.customers)
    name, status = customer["customer_name"], customer["status"]
    guess = status if r.random() < 0.5 else r.choice(STATUSES)
    then, day = other(r, STATUSES, guess, status), weekday(r)
    call = update(customer, "status", then) if status == guess else update(customer, "follow_up_by", day)
    wordings = [
        "If {name} is a {guess}, change the status to {then}; otherwise set the follow-up date to {day}.",
        "Look up {name}. If the status is {guess}, set it to {then}, if not make the follow-up date {day}.",
    ]
    text = make_request(r, *wordings, name=name, guess=guess, then=then, day=say_date(r, day))
    return text, [search(customer_name=name), call]


@template(DOMAIN, "hard")
def overdue_follow_ups(w: World, r: Random) -> tuple[str, list[Call]] | None:
    """Follow-up dates have the time 23:59:00, so a bare day as `follow_up_by_max` means "before that day"."""
    person, status, limit = r.choice(w.sales), r.choice(STATUSES), weekday(r, "2023-11-01", "2023-12-08")
    keys = {"assigned_to_email": person.email, "status": status}
    rows = [c for c in w.customers if all(c[k] == v for k, v in keys.items()) and c["follow_up_by"] < limit]
    if not 1 <= len(rows) <= 3:
        return None
    value = other(r, STATUSES, status)
    lookup = search(status=status, assigned_to_email=person.email, follow_up_by_max=limit)
    wordings = [
        "set all of {whose} {status} customers with a follow-up date before {day} to {value}",
        "move every {status} of {person} that had to be followed up before {day} to {value}",
    ]
    values = {"whose": possessive(person), "person": person.first, "day": say_date(r, limit)}
    calls = [find_address(person), lookup, *(update(c, "status", value) for c in rows)]
    return make_request(r, *wordings, status=status, value=value, **values), calls
