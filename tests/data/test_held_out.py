"""A share of the training tasks is held out: the same ones every time, none in both parts."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymexp.data.held_out import split
from gymexp.data.rows import with_system
from gymexp.errors import DataError


def numbered(prompts: list[str], **more) -> list:
    return [
        (i, {"responses_create_params": {"input": p}, "answer": i, **more}) for i, p in enumerate(prompts, 1)
    ]


@given(
    st.lists(st.text(max_size=3), min_size=2, max_size=40).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
)
def test_every_row_is_in_one_part_and_a_prompt_too(prompts, share, seed):
    rows = numbered(prompts)
    train, held_out = split("x", rows, share, seed)
    assert sorted(train + held_out, key=lambda row: row[0]) == rows
    assert [n for n, _ in train] == sorted(n for n, _ in train), "in the file's order"
    prompts_of = lambda part: {row["responses_create_params"]["input"] for _, row in part}  # noqa: E731
    assert not prompts_of(train) & prompts_of(held_out)
    wanted = min(max(round(share * len(set(prompts))), 1), len(set(prompts)) - 1)
    assert len(prompts_of(held_out)) == wanted
    assert split("x", rows, share, seed) == (train, held_out)


def test_the_seed_chooses_and_the_order_of_the_file_does_not():
    rows = numbered([f"prompt {i}" for i in range(100)])
    held_out = lambda rows, seed: {r["answer"] for _, r in split("x", rows, 0.2, seed)[1]}  # noqa: E731
    assert held_out(rows, 1) == held_out(rows[::-1], 1) != held_out(rows, 2)
    assert len(held_out(rows, 1)) == 20


def test_rows_of_one_prompt_are_tasks_of_their_own():
    train, held_out = split("x", numbered(["Play."] * 10), 0.3, 1)
    assert (len(train), len(held_out)) == (7, 3)


def test_a_file_that_cannot_be_split_is_named():
    row = {"responses_create_params": {"input": "Play."}}
    with pytest.raises(DataError, match=r"env\.x\.data\.validation_share needs two different rows at least"):
        split("x", [(1, row), (2, row)], 0.5, 0)


@pytest.mark.parametrize(
    "given",
    [
        "Hi.",
        [{"role": "user", "content": "Hi."}],
        [{"role": "system", "content": "Old."}, {"role": "user", "content": "Hi."}],
        [{"role": "developer", "content": "Old."}, {"role": "user", "content": "Hi."}],
    ],
)
def test_the_users_system_message_takes_the_place_of_the_rows_own(given):
    row = {"responses_create_params": {"input": given}}
    assert with_system(row, "New.") == [
        {"role": "system", "content": "New."},
        {"role": "user", "content": "Hi."},
    ]


@pytest.mark.gym
def test_jsonl_rows_are_split_filled_in_by_a_template_and_get_the_system_message(
    gym_python: Path, tmp_path, monkeypatch
):
    from gymexp.config.schema import DataConfig, DatasetConfig, EnvConfig, ModelConfig, RunConfig
    from gymexp.data.prepare import prepare

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"question": f"{i} + {i}?"}) + "\n" for i in range(10)))
    Path("prompt.yaml").write_text('system: "From the template."\nuser: "What is {question}"\n')
    Path("wrong.yaml").write_text('user: "{topic}"\n')

    def prepared(template: str):
        data = DataConfig("jsonl", train_file="rows.jsonl", validation_share=0.2, prompt_config=template)
        env = EnvConfig("my.yaml", "agent", system_prompt="Be brief.", data=data)
        config = RunConfig(model=ModelConfig("m", "m"), env={"x": env}, dataset=DatasetConfig())
        return prepare(config, gym_python, tmp_path / "cache", lambda _: None)

    found = prepared("prompt.yaml")
    validation = found.validation["x"]
    assert (len(found.train), len(validation)) == (8, 2)
    asked = {task.row["responses_create_params"]["input"][1]["content"] for task in found.train + validation}
    assert asked == {f"What is {i} + {i}?" for i in range(10)}
    for task in found.train + validation:
        assert task.row["responses_create_params"]["input"][0] == {"role": "system", "content": "Be brief."}
    assert found.summary["envs"]["x"]["validation_share"] == 0.2
    [*_, last] = [orjson.loads(line) for line in (found.requests or Path()).read_bytes().splitlines()]
    assert last["request"]["messages"][0]["content"] == "Be brief."
    with pytest.raises(DataError, match=r"env\.x\.data: .*wrong\.yaml.*references field 'topic'"):
        prepared("wrong.yaml")
    with pytest.raises(DataError, match=r"env\.x\.data\.prompt_config: none\.yaml is neither in"):
        prepared("none.yaml")
