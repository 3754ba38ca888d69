import json
from pathlib import Path

import pytest

from gymexp import data
from gymexp.coldstart.demonstrations import demonstrations
from gymexp.config.schema import DataConfig, DatasetConfig, EnvConfig, RunConfig
from gymexp.data.prepare import load_prepared, needs_gym_python, prepare, write_prepared
from gymexp.data.sources import Files, fetch
from gymexp.errors import DataError

PYTHON = Path("no interpreter is run here")


def ignore(_: str) -> None: ...


@pytest.fixture(autouse=True)
def nemo_gym_takes_all_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(data.prepare, "first_requests", lambda *_: tmp_path / "requests.jsonl")


def own_env(directory, name: str, rows: int = 12, server: str = "mine", **changes) -> EnvConfig:
    """An environment with the user's own files: `rows` train rows and 4 validation rows."""
    files = {}
    for split, count in {"train": rows, "validation": 4}.items():
        lines = [{"responses_create_params": {"input": f"{name} {split} {n}"}} for n in range(count)]
        path = directory / f"{name}-{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files[f"{split}_file"] = str(path)
    data = DataConfig("jsonl", **files, **changes)
    return EnvConfig(f"resources_servers/{server}/configs/x.yaml", f"{name}_agent", data=data)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(env={"one": own_env(tmp_path, "one"), "two": own_env(tmp_path, "two", rows=40)})


def test_tasks_carry_key_environment_agent_and_row(config, tmp_path):
    prepared = prepare(config, PYTHON, tmp_path, ignore)
    task = next(task for task in prepared.train if task.key == "one/train/000003")
    assert (task.env, task.agent) == ("one", "one_agent")
    assert task.row["responses_create_params"]["input"] == "one train 3"
    assert [task.key for task in prepared.validation["two"]] == [f"two/validation/{n:06d}" for n in range(4)]


def test_what_was_written_is_read_back_in_the_same_order(config, tmp_path):
    config.dataset = DatasetConfig(train_size=100, order="shuffle", seed=5)
    written = prepare(config, PYTHON, tmp_path, ignore)
    write_prepared(written, tmp_path / "data")
    assert load_prepared(tmp_path / "data") == written
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[0]).keys() == {"key", "env", "agent", "row"} and len(lines) == 100


def test_preparing_writes_nothing_beside_the_users_files(config, tmp_path):
    before = set(tmp_path.rglob("*"))
    prepare(config, PYTHON, tmp_path, ignore)
    assert set(tmp_path.rglob("*")) == before


def test_the_summary_names_sources_counts_and_repeats(config, tmp_path):
    config.dataset.train_size = 60
    said: list[str] = []
    summary = prepare(config, PYTHON, tmp_path, said.append).summary
    one = summary["envs"]["one"]
    assert (one["source"], one["available"], one["in_epoch"], one["repeats"]) == ("jsonl", 12, 30, 18)
    assert one["validation_tasks"] == 4 and len(one["train_sha256"]) == 64
    assert said == ["one: 30 training tasks out of 12: each 2.5 times an epoch"]


def test_size_limits_cut_each_split(config, tmp_path):
    config.env["two"].data.train_size = 10
    config.env["two"].data.validation_size = 3
    config.dataset.validation_size = 2
    prepared = prepare(config, PYTHON, tmp_path, ignore)
    assert prepared.summary["envs"]["two"]["available"] == 10
    assert {env: len(tasks) for env, tasks in prepared.validation.items()} == {"one": 2, "two": 2}


def test_an_environment_of_weight_zero_is_evaluated_but_not_trained_on(config, tmp_path):
    config.env["two"].weight = 0
    prepared = prepare(config, PYTHON, tmp_path, ignore)
    assert {task.env for task in prepared.train} == {"one"} and len(prepared.validation["two"]) == 4


def test_data_of_another_run_is_not_taken_for_this_one(config, tmp_path):
    write_prepared(prepare(config, PYTHON, tmp_path, ignore), tmp_path / "data")
    train = tmp_path / "data" / "train.jsonl"
    train.write_text("".join(reversed(train.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match=r"does not hold the tasks that mix\.json beside it describes"):
        load_prepared(tmp_path / "data")
    train.write_text(train.read_text()[:-20])
    with pytest.raises(DataError, match="must hold"):
        load_prepared(tmp_path / "data")
    with pytest.raises(DataError, match="must hold"):
        load_prepared(tmp_path / "nothing")


def test_only_generated_data_is_fetched_with_nemo_gyms_python(config):
    assert not needs_gym_python(config.env)
    config.env["one"].data.source = "generate"
    assert needs_gym_python(config.env)


def test_a_puzzle_is_demonstrated_by_its_answer(tmp_path):
    row = {"responses_create_params": {"input": [{"role": "user", "content": "2 + 2?"}]}}
    row |= {"question": "2 + 2?", "answer": "4", "metadata": {"source_dataset": "chain_sum"}}
    env = own_env(tmp_path, "sums", server="reasoning_gym")
    (tmp_path / "sums-train.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"answer": None}) + "\n"
    )
    shown = list(demonstrations("sums", env, fetch("sums", env, None, tmp_path, ignore)))
    assert shown == [
        {
            "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
            "tools": None,
        }
    ]


def test_written_demonstrations_are_read_up_to_the_train_size(tmp_path):
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps({"messages": [n], "tools": [1], "id": n}) + "\n" for n in range(5)))
    env = own_env(tmp_path, "office", train_size=3)
    files = Files(tmp_path / "office-train.jsonl", tmp_path / "office-validation.jsonl", "", "", path)
    assert list(demonstrations("office", env, files)) == [{"messages": [n], "tools": [1]} for n in range(3)]


def test_an_environment_without_demonstrations_says_so_at_once(tmp_path):
    env = own_env(tmp_path, "office", generator="workplace")
    files = fetch("office", env, None, tmp_path, ignore)
    with pytest.raises(DataError, match=r"no demonstrations.*env\.office\.data\.source=generate makes them"):
        demonstrations("office", env, files)


def test_two_environments_of_one_file_are_played_each_by_its_own_agent(config, tmp_path):
    """Each row would be played by the wrong agent half the time."""
    lines = [
        {"responses_create_params": {"input": "x"}, "agent_ref": {"name": f"{name}_agent"}}
        for name in ("one", "two")
    ]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for env in config.env.values():
        env.data = DataConfig("jsonl", train_file=str(path), validation_file=str(path))
    with pytest.raises(
        DataError, match=r'both\.jsonl:2: agent_ref\.name: must be one_agent .*got "two_agent"'
    ):
        prepare(config, PYTHON, tmp_path, ignore)
