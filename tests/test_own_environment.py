"""docs/guides/environment.md: its files are written, its commands run in their order, with less to do."""

from __future__ import annotations

import re

import pytest
from test_guides import NOT_HERE, ONE_STEP, Shell
from whole_run import ROOT

from gymexp.record.places import cache_dir
from gymexp.rollout.rollout_files import load_index

GUIDE = (ROOT / "docs" / "guides" / "environment.md").read_text()
FILE = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
LESS = {
    # Two groups, so that both environments are in the batch.
    "gymexp.train": f"{ONE_STEP} trainer.per_device_train_batch_size=8 env.between.max_output_tokens=24",
    "gymexp.evaluate": "evaluation.num_tasks=4",
}


def commands() -> list[str]:
    """Returns the guide's commands in their order, without comments."""
    lines = (line for block in COMMANDS.findall(FILE.sub("", GUIDE)) for line in block.splitlines())
    return [command for line in lines if (command := re.split(r"\s+#", line)[0].strip())]


@pytest.mark.gym
@pytest.mark.e2e
def test_every_command_of_the_guide(tmp_path, gym_python):
    for path, text in FILE.findall(GUIDE):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    shell, said = Shell(tmp_path), {}
    for command in commands():
        if command in NOT_HERE:
            continue
        less = next((words for module, words in LESS.items() if module in command), "")
        line = shell.filled_in(command.replace("outputs/tiny/", "outputs/<name>/"))
        line = line.replace("~/.cache/gymexp", str(cache_dir()))
        done = shell.run(f"{line} {less}")
        said[command] = done.stdout + done.stderr
        assert done.returncode == 0, f"{line}\n{said[command]}"
        assert "Traceback" not in said[command]

    [shown] = [text for command, text in said.items() if "envs show" in command]
    assert "resources_servers/between, responses_api_agents/simple_agent" in shown
    [prepared] = [text for command, text in said.items() if "prepare" in command]
    assert re.search(r"train +255 rows", prepared)  # 59 x 5 pairs but the 40 held out
    [tested] = [text for command, text in said.items() if "unittest" in command]
    assert "Ran 1 test" in tested
    [once, twice] = [text for command, text in said.items() if "policy=probe" in command]
    rewards = re.findall(r"^probe: \w+ +(\w+) +4 +1 +4/4 +0 +([\d.]+) ", once + twice, re.MULTILINE)
    assert len(rewards) == 15, once + twice
    assert {reward for _, reward in rewards} == {"0.000"}, "a canned reply is paid for"

    [_, both] = sorted((tmp_path / "outputs" / "tiny").iterdir())
    played = load_index(both / "rollouts")
    assert {row["env"] for row in played} == {"between", "between_twice"}
    assert {row["outcome"] for row in played} <= {"completed", "truncated"}
