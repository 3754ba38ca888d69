"""A prompt that leaves no room for an answer is named before anything starts, with both numbers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from whole_run import TINY

from gymexp.config.schema import ModelConfig
from gymexp.data.prepare import Prepared
from gymexp.errors import DataError
from gymexp.gateway import prompt_lengths
from gymexp.rollout.outcome import Task

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def prepared(directory: Path, *requests: dict, tools: tuple[list, ...] = ()) -> Prepared:
    """Tasks whose first requests are these, as `first_requests` writes them; the last is for validation."""
    keys = [f"sums/train/{number:06d}" for number in range(len(requests))]
    lines: list[dict] = [{"tools": some} for some in tools]
    for number, (key, request) in enumerate(zip(keys, requests, strict=True)):
        lines.append({"key": key, "at": f"mine.jsonl:{number + 1}", "request": request})
    path = directory / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [Task(key, "sums", "a", {}) for key in keys]
    return Prepared(tasks[:-1] * 2, {"sums": tasks[-1:]}, {}, path)


def asks(content, **more) -> dict:
    return {"messages": [{"role": "user", "content": content}]} | more


def length(content: str, **more) -> int:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": "user", "content": content}]
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **more)["input_ids"])


def check(tasks: Prepared, max_model_len: int, cache: Path) -> None:
    prompt_lengths.check(ModelConfig("tiny", str(TINY), max_model_len=max_model_len), tasks, cache)


def test_prompts_without_room_are_named_with_line_key_and_both_numbers_in_train_and_validation(tmp_path):
    long, longer = "x " * 40, "x " * 60
    tasks = prepared(tmp_path, asks("x"), asks(long), asks(longer))
    limit = length(long)
    check(tasks, length(longer) + 1, tmp_path)
    with pytest.raises(DataError) as caught:
        check(tasks, limit, tmp_path)
    said = str(caught.value).splitlines()
    assert said[0] == "the prompts of 2 tasks cannot be answered:"
    assert said[1] == (
        f"env.sums: 2 of 3 tasks have a prompt without room for a reply. The longest has {length(longer)} "
        f"tokens: raise model.max_model_len to {length(longer) + 1} and the tokens of the replies "
        "(env.sums.max_output_tokens a turn), or leave out these rows:"
    )
    assert said[2:] == [
        f"mine.jsonl:2 (sums/train/000001): its prompt has {limit} tokens, model.max_model_len is {limit}",
        f"mine.jsonl:3 (sums/train/000002): its prompt has {length(longer)} tokens, "
        f"model.max_model_len is {limit}",
    ]


def test_tools_and_variables_of_the_chat_template_count(tmp_path):
    with_tools = length("x", tools=[TOOL])
    tasks = prepared(tmp_path, asks("x"), asks("x", tools=0), tools=([TOOL],))
    assert length("x") < with_tools
    check(tasks, with_tools + 1, tmp_path)
    with pytest.raises(DataError, match=rf"000001\): its prompt has {with_tools} tokens"):
        check(tasks, with_tools, tmp_path)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (asks([{"type": "image_url", "image_url": {"url": "data:"}}]), "must be text, got a part of type"),
        (
            asks("x", tool_choice="required"),
            "tool_choice must be 'auto' or 'none' for this gateway, got 'required'",
        ),
    ],
)
def test_what_the_gateway_refuses_is_refused_before_it_starts(tmp_path, request_, reason):
    with pytest.raises(DataError, match=r"mine\.jsonl:2 \(sums/train/000001\): ") as caught:
        check(prepared(tmp_path, asks("x"), request_), 1000, tmp_path)
    assert reason in str(caught.value)
    has_image = isinstance(request_["messages"][0]["content"], list)
    assert ("env.sums: 1 of 2 tasks have images" in str(caught.value)) == has_image


def test_counts_are_kept_for_the_same_requests_and_tokenizer(tmp_path, monkeypatch):
    check(prepared(tmp_path, asks("x"), asks("y")), 1000, tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("they were counted"))
    check(prepared(tmp_path, asks("x"), asks("y")), 1000, tmp_path)


def test_many_are_counted_by_several_processes_as_by_one(tmp_path, monkeypatch):
    tasks = prepared(tmp_path, *(asks("x " * number) for number in range(40)))
    assert tasks.requests
    alone = prompt_lengths.count(TINY, tasks.requests)
    monkeypatch.setattr(prompt_lengths, "_MIN_FOR_POOL", 10)
    assert prompt_lengths.count(TINY, tasks.requests) == alone
    assert alone["sums/train/000039"] == length("x " * 39)
