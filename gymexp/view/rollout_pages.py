"""What the pages of one rollout show, and of two side by side: no HTML or HTTP, as in pages.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import orjson

from gymexp.view.filters import BadAddress, selection, whole_number
from gymexp.view.messages import Message, conversation_of, verdict_of
from gymexp.view.pages import SEARCH_S, Arguments, Context, Place
from gymexp.view.token_text import NLL_LIMITS, RATIO_LIMITS, flat, tokens_of
from gymexp.view.viewed_run import ViewedRun
from gymexp.view.visible_text import PART

HEATS = ("logprob", "trained", "ratio", "none")
_TOKENS = 4_000  # on a page


def rollout_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """A rollout as a conversation, its verdict beside it."""
    row, record, context = _rollout(run, place, arguments)
    messages = list(conversation_of(record, run.tasks.read(row["key"])))
    return context | {"messages": messages, "expected": _expected(run.tasks.read(row["key"]))}


def task_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The dataset row of a rollout's task."""
    row, _, context = _rollout(run, place, arguments)
    task = run.tasks.read(row["key"])
    return context | {"text": "" if task is None else pretty(task), "text_name": "task", "what": "Task row"}


def verdict_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """Everything that the environment answered beside the task's own fields."""
    _, record, context = _rollout(run, place, arguments)
    rollout = record.get("rollout")
    verdict = rollout.get("verdict") if isinstance(rollout, dict) else None
    text = pretty(verdict) if verdict else ""
    return context | {"text": text, "text_name": "verdict", "what": "Verdict"}


def raw_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The rollout's line of its file, and the trainer's, as JSON."""
    _, record, context = _rollout(run, place, arguments)
    return context | {"text": pretty(record), "text_name": "raw", "what": "Raw JSON"}


def tokens_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The tokens that were trained on, coloured."""
    row, record, context = _rollout(run, place, arguments)
    heat = arguments.get("heat") or "logprob"
    if heat not in HEATS:
        raise BadAddress(f"heat must be one of {', '.join(HEATS)}, got {heat!r}")
    found, trained = flat(record), run.index.read_trained(row)
    tokenizer, why = run.tokenizer()
    context |= {"heat": heat, "heats": HEATS, "no_tokenizer": why, "found": found, "trained": trained}
    context |= {"nll_limits": NLL_LIMITS, "ratio_limits": RATIO_LIMITS}
    if found is None:
        return context | {"tokens": [], "first": 0, "end": 0, "size": 0, "prompt": [], "page_size": _TOKENS}
    first = min(whole_number(arguments, "first", 0), max(0, len(found.ids) - 1)) // _TOKENS * _TOKENS
    end = min(first + _TOKENS, len(found.ids))
    prompt = found.prompt_ids[:_TOKENS] if first == 0 else []
    pretend = flat({"rollout": {"turns": [{"prompt_ids": [], "completion_ids": prompt, "logprobs": []}]}})
    return context | {
        "tokens": tokens_of(found, trained, tokenizer, first, end),
        "prompt": tokens_of(pretend, None, tokenizer, 0, len(prompt)) if pretend else [],
        "first": first,
        "end": end,
        "size": len(found.ids),
        "page_size": _TOKENS,
    }


def text_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """A long text of a rollout in parts: a message by its number, the task's row, the verdict, or all."""
    row, record, context = _rollout(run, place, arguments)
    part = place["part"]
    messages = list(conversation_of(record, run.tasks.read(row["key"])))
    if part.isdigit() and int(part) < len(messages):
        what, text = f"message {part}: {messages[int(part)].who}", messages[int(part)].text
    elif part in (pages := {"task": task_page, "verdict": verdict_page, "raw": raw_page}):
        shown = pages[part](run, place, arguments)
        what, text = shown["what"], shown["text"]
    else:
        raise BadAddress(f"the rollout has no text {part}")
    pages_ = max(1, -(-len(text) // PART))
    page = min(max(1, whole_number(arguments, "page", 1)), pages_)
    shown = text[(page - 1) * PART : page * PART]
    return context | {
        "what": what,
        "text": shown,
        "size": len(text),
        "part": part,
        "page": page,
        "pages": pages_,
    }


def side_page(run: ViewedRun, place: Place, arguments: Arguments, other_run: ViewedRun) -> Context:
    """Two rollouts side by side, of one run or of two. The other one: the arguments `of` and `other`."""
    file = arguments.get("of") or place["file"]
    other = {"file": file, "number": arguments.get("other") or ""}
    sides = [_side(run, place, arguments), _side(other_run, other, arguments)]
    return side_by_side(*sides)


def side_by_side(left: Context, right: Context) -> Context:
    """Returns two rollouts' messages in rows, and how many at the beginning are the same."""
    pairs = list(zip_longest(left["messages"], right["messages"]))
    same = 0
    while same < len(pairs) and pairs[same][0] == pairs[same][1]:
        same += 1
    return {"sides": [left, right], "same": pairs[:same], "pairs": pairs[same:]}


def _side(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    row, record = _read(run, place)
    return side_of(run, row, record)


def side_of(run: ViewedRun, row: Mapping[str, Any], record: Mapping[str, Any]) -> Context:
    """Returns a rollout for `side_by_side`."""
    messages = list(conversation_of(record, run.tasks.read(row["key"])))
    messages += [
        Message(f"verdict: {name}", text, "environment") for name, text in verdict_of(record).items()
    ]
    return {"run": run, "row": row, "messages": messages}


def pretty(value: Any) -> str:
    """Returns a JSON value as indented text."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
    except orjson.JSONEncodeError:
        return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _read(run: ViewedRun, place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    row = run.index.row(place["file"], whole_number(place, "number", -1)) if place.get("number") else None
    if row is None and not run.index.is_ready:
        raise BadAddress(f"{run.index.progress:.0%} of the run's rollouts are read: load the page again")
    if row is None:
        raise BadAddress(f"the run has no rollout {place.get('number')} of {place['file']}")
    return row, run.files.read_record(row)


def _rollout(
    run: ViewedRun, place: Place, arguments: Arguments
) -> tuple[dict[str, Any], dict[str, Any], Context]:
    """Returns a rollout's row, its record, and what all its pages show: its numbers and its neighbours."""
    row, record = _read(run, place)
    chosen = selection(arguments)
    run.search.find(chosen, SEARCH_S)
    before, after = _neighbours(run, chosen, row)
    others = run.index.query(
        "SELECT file, step, split, number, reward, idx FROM rollouts WHERE key = ? "
        "ORDER BY step, file, number",
        (row["key"],),
    )
    in_group = [o for o in others if o["file"] == row["file"]]
    at = next(i for i, o in enumerate(in_group) if o["number"] == row["number"])
    return (
        row,
        record,
        {
            "row": row,
            "record": record,
            "verdict": verdict_of(record),
            "chosen": chosen.arguments,
            "before": before,
            "after": after,
            "group_before": in_group[at - 1] if at else None,
            "group_after": in_group[at + 1] if at + 1 < len(in_group) else None,
            "other_visits": [o for o in others if o["file"] != row["file"] and o["idx"] == 0],
            "num_in_group": len(in_group),
            "place_in_group": at + 1,
            "log": _log(run, record),
        },
    )


def _neighbours(run: ViewedRun, chosen: Any, row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the rollouts before and after this one in the list that the URL selects."""
    found = run.index.query(
        "SELECT * FROM (SELECT file, number, "
        f"LAG(file) OVER w AS b_file, LAG(number) OVER w AS b_number, "
        f"LEAD(file) OVER w AS a_file, LEAD(number) OVER w AS a_number FROM rollouts WHERE {chosen.where} "
        f"WINDOW w AS (ORDER BY {chosen.order})) WHERE file = :this_file AND number = :this_number",
        chosen.parameters | {"this_file": row["file"], "this_number": row["number"]},
    )
    if not found:
        return None, None
    [near] = found
    before = {"file": near["b_file"], "number": near["b_number"]} if near["b_file"] else None
    after = {"file": near["a_file"], "number": near["a_number"]} if near["a_file"] else None
    return before, after


def _log(run: ViewedRun, record: Mapping[str, Any]) -> str:
    """Returns the name of the log that may explain a failure, if the run has it; else ""."""
    name = str(record.get("log") or "").rpartition("/")[2]
    return name if name in run.files.names("logs", ".log") else ""


def _expected(task: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the fields of a task's row from which an environment scores, if their names are usual ones."""
    names = ("expected_answer", "answer", "ground_truth", "expected", "solution", "target")
    found = {name: task[name] for name in names if name in task} if task else {}
    return {name: value if isinstance(value, str) else pretty(value) for name, value in found.items()}
