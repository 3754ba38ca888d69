"""Analytics tasks: plots of website visits. In some tasks the numbers decide which plot is right."""

from __future__ import annotations

from collections import Counter
from datetime import date, timedelta
from random import Random

from gymexp.data.workplace.tasks.draft import Call, make_request, template
from gymexp.data.workplace.tasks.words import METRICS, PLOTS, say_date
from gymexp.data.workplace.tasks.world import TODAY, Record, World, other

MONTHS = {
    "September": ("2023-09-01", "2023-09-30"),
    "October": ("2023-10-01", "2023-10-31"),
    "November": ("2023-11-01", TODAY),
}
SOURCES = {
    "direct": "visits_direct",
    "referral": "visits_referral",
    "search engine": "visits_search_engine",
    "social media": "visits_social_media",
}


def plot(first: str, last: str, metric: str, kind: str) -> Call:
    return (
        "analytics_create_plot",
        {"time_min": first, "time_max": last, "value_to_plot": metric, "plot_type": kind},
    )


def lookup(tool: str, first: str, last: str, **more: str) -> Call:
    return (f"analytics_{tool}", {"time_min": first, "time_max": last} | more)


def span(r: Random, low: int = 1, high: int = 40) -> tuple[str, str]:
    """Draws two ISO dates, low..high days apart, from the recorded time (September to November 2023)."""
    length = r.randint(low, high)
    first = date(2023, 9, 1) + timedelta(days=r.randint(0, 90 - length))
    return first.isoformat(), (first + timedelta(days=length)).isoformat()


def on_day(w: World, day: str) -> list[Record]:
    return [v for v in w.visitors if v["date_of_visit"] == day]


def one_visitor(w: World, r: Random) -> Record:
    """Draws a visitor who came only once, so that the visitor's ID identifies one visit."""
    visits = Counter(v["visitor_id"] for v in w.visitors)
    return r.choice([v for v in w.visitors if visits[v["visitor_id"]] == 1])


def describe_plot(r: Random, metric: str, kind: str) -> str:
    return f"a {r.choice(PLOTS[kind])} of {r.choice(METRICS[metric])}"


@template("analytics", "easy")
def plot_between_dates(w: World, r: Random) -> tuple[str, list[Call]]:
    first, last = span(r)
    metric, kind = r.choice(list(METRICS)), r.choice(list(PLOTS))
    wordings = [
        "make {plot} from {a} to {b}",
        "create {plot} between {a} and {b}",
        "draw {plot} for {a} to {b}",
        "plot {metric} from {a} to {b} as a {kind}",
        "I would like to see {plot} from {a} to {b}.",
        "give me {plot} for the days from {a} to {b}",
    ]
    values = {
        "plot": describe_plot(r, metric, kind),
        "metric": r.choice(METRICS[metric]),
        "kind": r.choice(PLOTS[kind]),
    }
    return make_request(r, *wordings, a=first, b=last, **values), [plot(first, last, metric, kind)]


@template("analytics", "easy")
def plot_one_day(w: World, r: Random) -> tuple[str, list[Call]]:
    day = span(r)[0]
    metric, kind = r.choice(list(METRICS)), r.choice(list(PLOTS))
    wordings = [
        "make {plot} for {a} only",
        "create {plot} for the single day {a}",
        "draw {plot} from {a} to {a}",
    ]
    return make_request(r, *wordings, plot=describe_plot(r, metric, kind), a=day), [
        plot(day, day, metric, kind)
    ]


@template("analytics", "medium")
def plot_said_dates(w: World, r: Random) -> tuple[str, list[Call]]:
    """Two plots of one period, which the request describes in words."""
    first, last = span(r)
    month = r.choice(list(MONTHS))
    when, (first, last) = r.choice(
        [
            (f"from {say_date(r, first)} to {say_date(r, last)}", (first, last)),
            (f"from {say_date(r, first)} until today", (first, TODAY)),
            (f"for {month}", MONTHS[month]),
        ]
    )
    metric, second_metric = r.sample(list(METRICS), 2)
    kind, second_kind = r.choice(list(PLOTS)), r.choice(list(PLOTS))
    wordings = [
        "make {x} and then {y}, both {when}",
        "First make {x} {when}, then {y} for the same days.",
        "create {x} {when}, and after that {y} for the same time",
    ]
    plots = {"x": describe_plot(r, metric, kind), "y": describe_plot(r, second_metric, second_kind)}
    text = make_request(r, *wordings, **plots, when=when)
    return text, [plot(first, last, metric, kind), plot(first, last, second_metric, second_kind)]


@template("analytics", "medium")
def plot_day_of_visitor(w: World, r: Random) -> tuple[str, list[Call]]:
    visitor, metric, kind = one_visitor(w, r), r.choice(list(METRICS)), r.choice(list(PLOTS))
    day = visitor["date_of_visit"]
    wordings = [
        "make {plot} for the day on which visitor {id} came",
        "create {plot} for the day of visitor {id}'s visit",
        "When did visitor {id} come? Draw {plot} for that day.",
    ]
    calls = [("analytics_get_visitor_information_by_id", {"visitor_id": visitor["visitor_id"]})]
    text = make_request(r, *wordings, plot=describe_plot(r, metric, kind), id=visitor["visitor_id"])
    return text, [*calls, plot(day, day, metric, kind)]


@template("analytics", "medium")
def plot_source_of_visitor(w: World, r: Random) -> tuple[str, list[Call]]:
    visitor, kind, month = one_visitor(w, r), r.choice(list(PLOTS)), r.choice(list(MONTHS))
    wordings = [
        "make a {kind} of the visits in {month} from the traffic source that visitor {id} came from",
        "find the traffic source of visitor {id} and plot its visits in {month} as a {kind}",
    ]
    calls = [("analytics_get_visitor_information_by_id", {"visitor_id": visitor["visitor_id"]})]
    text = make_request(r, *wordings, kind=r.choice(PLOTS[kind]), month=month, id=visitor["visitor_id"])
    return text, [*calls, plot(*MONTHS[month], SOURCES[visitor["traffic_source"]], kind)]


@template("analytics", "medium")
def plot_after_start_of_visitor(w: World, r: Random) -> tuple[str, list[Call]]:
    visitor, metric, kind = one_visitor(w, r), r.choice(list(METRICS)), r.choice(list(PLOTS))
    wordings = [
        "make {plot} from the day of visitor {id}'s visit until today",
        "look up visitor {id} and create {plot} from that visit to today",
    ]
    calls = [("analytics_get_visitor_information_by_id", {"visitor_id": visitor["visitor_id"]})]
    text = make_request(r, *wordings, plot=describe_plot(r, metric, kind), id=visitor["visitor_id"])
    return text, [*calls, plot(visitor["date_of_visit"], TODAY, metric, kind)]


@template("analytics", "hard")
def depends_on_a_number(w: World, r: Random) -> tuple[str, list[Call]]:
    """Visits, engaged users or session duration of one day decide which of two plots is right."""
    day = span(r)[0]
    rows = on_day(w, day)
    source = r.choice(list(SOURCES))
    engaged = sum(v["user_engaged"] == "True" for v in rows)
    seconds = sum(int(v["session_duration_seconds"]) for v in rows) / len(rows)
    noun, tool, more, value = r.choice(
        [
            ("the total number of visits", "total_visits_count", {}, len(rows)),
            ("the number of engaged users", "engaged_users_count", {}, engaged),
            (
                f"the number of {source} visits",
                "traffic_source_count",
                {"traffic_source": source},
                sum(v["traffic_source"] == source for v in rows),
            ),
            ("the average session duration in seconds", "get_average_session_duration", {}, seconds),
        ]
    )
    limit = max(0, round(value) + r.randint(-3, 3))
    first, last = span(r)
    metrics = r.sample(list(METRICS), 2)
    (metric, kind), (second_metric, second_kind) = ((m, r.choice(list(PLOTS))) for m in metrics)
    wordings = [
        "If {noun} on {day} was above {n}, make {x} from {a} to {b}; otherwise make {y} for these days.",
        "Check {noun} on {day}. Above {n}, create {x} from {a} to {b}; if not, {y} for the same days.",
    ]
    values = {
        "noun": noun,
        "day": say_date(r, day),
        "n": limit,
        "a": say_date(r, first),
        "b": say_date(r, last),
    }
    plots = {"x": describe_plot(r, metric, kind), "y": describe_plot(r, second_metric, second_kind)}
    text = make_request(r, *wordings, **plots, **values)
    chosen = (metric, kind) if value > limit else (second_metric, second_kind)
    return text, [lookup(tool, day, day, **more), plot(first, last, *chosen)]


@template("analytics", "hard")
def plot_the_busiest_day(w: World, r: Random) -> tuple[str, list[Call]] | None:
    first, last = span(r, 2, 3)
    metric, kind = r.choice(list(METRICS)), r.choice(list(PLOTS))
    noun, tool, rows = r.choice(
        [
            ("the most visits", "total_visits_count", w.visitors),
            (
                "the most engaged users",
                "engaged_users_count",
                [v for v in w.visitors if v["user_engaged"] == "True"],
            ),
        ]
    )
    ranking = Counter(v["date_of_visit"] for v in rows if first <= v["date_of_visit"] <= last).most_common(2)
    if len(ranking) < 2 or ranking[0][1] == ranking[1][1]:
        return None
    day = ranking[0][0]
    wordings = [
        "find the day with {noun} from {a} to {b} and make {plot} for that day",
        "Which day from {a} to {b} had {noun}? Create {plot} for it.",
    ]
    values = {"noun": noun, "a": say_date(r, first), "b": say_date(r, last)}
    text = make_request(r, *wordings, plot=describe_plot(r, metric, kind), **values)
    return text, [lookup(tool, first, last), plot(day, day, metric, kind)]


@template("analytics", "hard")
def plot_the_stronger_source(w: World, r: Random) -> tuple[str, list[Call]] | None:
    day, kind, month = span(r)[0], r.choice(list(PLOTS)), r.choice(list(MONTHS))
    source = r.choice(list(SOURCES))
    second_source = other(r, list(SOURCES), source)
    count = Counter(v["traffic_source"] for v in on_day(w, day))
    if count[source] == count[second_source]:
        return None
    wordings = [
        "Were there more {one} or {two} visits on {day}? Plot the larger source for {month} as a {kind}.",
        "compare {one} with {two} visits on {day} and make a {kind} of the larger of the two for {month}",
    ]
    values = {"one": source, "two": second_source, "day": say_date(r, day), "month": month}
    text = make_request(r, *wordings, **values, kind=r.choice(PLOTS[kind]))
    lookups = [lookup("traffic_source_count", day, day, traffic_source=s) for s in (source, second_source)]
    larger = max(source, second_source, key=lambda s: count[s])
    return text, [*lookups, plot(*MONTHS[month], SOURCES[larger], kind)]


@template("analytics", "hard")
def depends_on_visitor(w: World, r: Random) -> tuple[str, list[Call]]:
    visitor = one_visitor(w, r)
    first, last = span(r)
    metrics = r.sample(list(METRICS), 2)
    (metric, kind), (second_metric, second_kind) = ((m, r.choice(list(PLOTS))) for m in metrics)
    source = visitor["traffic_source"] if r.random() < 0.5 else r.choice(list(SOURCES))
    condition, holds = r.choice(
        [
            ("was engaged", visitor["user_engaged"] == "True"),
            (f"came through {source}", visitor["traffic_source"] == source),
        ]
    )
    wordings = [
        "If visitor {id} {condition}, make {x} from {a} to {b}, otherwise make {y} for these days.",
        "Look up visitor {id}: if this one {condition}, create {x} from {a} to {b}; if not, "
        "{y} for these days.",
    ]
    values = {
        "id": visitor["visitor_id"],
        "condition": condition,
        "a": say_date(r, first),
        "b": say_date(r, last),
    }
    plots = {"x": describe_plot(r, metric, kind), "y": describe_plot(r, second_metric, second_kind)}
    text = make_request(r, *wordings, **plots, **values)
    chosen = (metric, kind) if holds else (second_metric, second_kind)
    return text, [
        ("analytics_get_visitor_information_by_id", {"visitor_id": visitor["visitor_id"]}),
        plot(first, last, *chosen),
    ]
