import json

import pytest

from gymexp.data.rows import load_rows, read_rows, server_of
from gymexp.errors import DataError

PUZZLE = {"question": "2 + 2?", "answer": "4", "metadata": {"source_dataset": "basic_arithmetic"}}
OFFICE = {
    "id": 3,
    "ground_truth": [{"name": "send", "arguments": "{}"}],
    "category": "x",
    "environment_name": "y",
}


def row(**changes) -> dict:
    return {"responses_create_params": {"input": [{"role": "user", "content": "2 + 2?"}]}, **changes}


def with_parameters(**changes) -> dict:
    return {"responses_create_params": row()["responses_create_params"] | changes}


def read(tmp_path, lines, **options):
    path = tmp_path / "tasks.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode())
    return load_rows(path, "sudoku", "sudoku_agent", **options)


def problems(tmp_path, lines, **options) -> list[str]:
    """The message's lines but the first, with the path cut off."""
    with pytest.raises(DataError) as caught:
        read(tmp_path, lines, **options)
    first, *others = str(caught.value).splitlines()
    assert first.startswith("env.sudoku.data")
    return [line.removeprefix(f"{tmp_path / 'tasks.jsonl'}:") for line in others]


def test_a_row_without_an_agent_gets_the_environments(tmp_path):
    assert read(tmp_path, [row()])[0]["agent_ref"] == {"type": "responses_api_agents", "name": "sudoku_agent"}


def test_a_row_that_nemo_gym_ships_may_name_the_agent_of_another_environment_of_its_server(tmp_path):
    shipped = row(agent_ref={"type": "responses_api_agents", "name": "another_agent"})
    path = tmp_path / "example.jsonl"
    path.write_text(json.dumps(shipped))
    [(_, read)] = read_rows(path, "sudoku", "sudoku_agent", of_nemo_gym=True)
    assert read["agent_ref"] == {"type": "responses_api_agents", "name": "sudoku_agent"}


@pytest.mark.parametrize("reference", [None, {"name": "sudoku_agent"}])
def test_a_row_may_name_its_environments_agent_or_none(tmp_path, reference):
    assert read(tmp_path, [row(agent_ref=reference)])[0]["agent_ref"]["name"] == "sudoku_agent"


@pytest.mark.parametrize("name", ["workplace_assistant_simple_agent", "sudoku_agnet"])
def test_a_row_of_another_agent_is_refused_with_its_line_and_both_names(tmp_path, name):
    (said,) = problems(tmp_path, [row(), row(agent_ref={"type": "responses_api_agents", "name": name})])
    assert said.startswith("2: agent_ref.name: must be sudoku_agent (env.sudoku.agent)")
    assert f'got "{name}"' in said and "leave agent_ref out" in said


def test_blank_lines_repeated_rows_and_a_byte_order_mark_do_no_harm(tmp_path):
    assert len(read(tmp_path, ["\ufeff" + json.dumps(row()), "", "  ", row(), row()])) == 3


def test_the_rest_of_the_row_is_left_as_it_is(tmp_path):
    assert read(tmp_path, [row(**PUZZLE)])[0] == row(**PUZZLE) | {
        "agent_ref": {"type": "responses_api_agents", "name": "sudoku_agent"}
    }


def test_a_broken_line_is_named_by_its_number(tmp_path):
    (said,) = problems(tmp_path, [*[row()] * 6, '{"responses_create_params": {', row()])
    assert said.startswith("7: not valid JSON")


def test_rows_beyond_the_limit_are_not_read(tmp_path):
    assert len(read(tmp_path, [row(), row(), "no JSON"], limit=2)) == 2


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_is_refused(tmp_path, lines):
    with pytest.raises(DataError, match="must hold at least one row"):
        read(tmp_path, lines)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_rows(tmp_path / "none.jsonl", "sudoku", "a")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([1], "a row must be a JSON object, got [1]"),
        ({}, "responses_create_params: must be an object, but it is missing"),
        (with_parameters(input=[]), ".input: must be a non-empty array of messages, or a string, got []"),
        (with_parameters(input=""), '.input: must be a non-empty array of messages, or a string, got ""'),
        (with_parameters(input=None), ".input: must be a non-empty array of messages, or a string, got null"),
        (with_parameters(metadata={"extra_body": "{}"}), ".metadata.extra_body: must be left out"),
        (row(agent_ref={"type": "agents", "name": "sudoku_agent"}), "agent_ref.type: must be responses_api"),
        (row(agent_ref="sudoku_agent"), "agent_ref: must be {type: responses_api_agents, name: …}"),
    ],
)
def test_a_bad_row_is_named_with_field_and_rule(tmp_path, bad, said):
    assert any(said in line for line in problems(tmp_path, [bad]))


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**40])
def test_an_integer_that_would_become_a_float_on_its_way_is_refused(tmp_path, number):
    (said,) = problems(tmp_path, [row(puzzle={"cells": [1, number]})])
    assert said.startswith("1: puzzle.cells[1]: must be an integer of 64 bits") and str(number) in said


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63), 2**53 + 1])
def test_an_integer_stays_one(tmp_path, number):
    [read_back] = read(tmp_path, [row(puzzle=number, text="12345678901234567890123", half=0.5)])
    assert (type(read_back["puzzle"]), read_back["puzzle"]) == (int, number)


@pytest.mark.parametrize(("server", "fields"), [("reasoning_gym", PUZZLE), ("workplace_assistant", OFFICE)])
def test_what_a_server_asks_for_is_checked(tmp_path, server, fields):
    assert read(tmp_path, [row(**fields)], server=server)
    missing = problems(tmp_path, [row()], server=server)
    assert [line.split(": ")[1] for line in missing] == list(fields)
    wrong = problems(tmp_path, [row(**dict.fromkeys(fields, True))], server=server)
    assert [line.split(": ")[1] for line in wrong] == list(fields)


def test_fields_inside_other_fields_are_checked(tmp_path):
    (said,) = problems(tmp_path, [row(**PUZZLE | {"metadata": {}})], server="reasoning_gym")
    assert said.startswith("1: metadata.source_dataset: must be a string, but it is missing")
    (said,) = problems(
        tmp_path, [row(**OFFICE | {"ground_truth": [{"arguments": {}}]})], server="workplace_assistant"
    )
    assert said.startswith("1: ground_truth[0]: must be an object of strings")


def test_all_problems_come_in_one_message_cut_at_twenty(tmp_path):
    said = problems(tmp_path, [row(), *[{}] * 15, "oops", *[[]] * 9])
    assert len(said) == 21 and said[-1] == "and 5 more"
    assert said[0].startswith("2: ") and said[15].startswith("17: not valid JSON")


def test_the_server_is_named_by_its_folder():
    assert server_of("resources_servers/reasoning_gym/configs/reasoning_gym.yaml") == "reasoning_gym"
    assert server_of("/home/me/Gym/resources_servers/mine/configs/a.yaml") == "mine"
    assert server_of("somewhere/else.yaml") == ""


def test_an_empty_input_is_for_agents_that_take_the_first_prompt_from_their_environment(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(with_parameters(input=[]) | {"task_idx": 0}))
    [(_, read)] = read_rows(path, "maze", "maze_agent", may_be_empty=lambda: True)
    assert read["responses_create_params"] == {"input": []}
    for empty in ("", None):
        path.write_text(json.dumps(with_parameters(input=empty)))
        with pytest.raises(DataError, match=r"input: must be a non-empty array of messages, or a string"):
            read_rows(path, "maze", "maze_agent", may_be_empty=lambda: True)
