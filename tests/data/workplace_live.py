"""Asks the real workplace server, over HTTP in one process, about generated tasks. Runs in NeMo Gym's venv.

<gym python> workplace_live.py DIR    reads the files of DIR, prints one JSON object of what the server said
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import MagicMock

from fastapi.testclient import TestClient
from nemo_gym.server_utils import ServerClient
from resources_servers.workplace_assistant.app import (
    WorkbenchResourcesServer,
    WorkbenchResourcesServerConfig,
)

EMPTY_RESPONSE = {
    "id": "r", "created_at": 0, "model": "m", "object": "response", "output": [],
    "parallel_tool_calls": False, "tool_choice": "auto", "tools": [],
}  # fmt: skip


def start_session() -> TestClient:
    config = WorkbenchResourcesServerConfig(
        host="127.0.0.1", port=1, entrypoint="app.py", name="w", domain="agent"
    )
    server = WorkbenchResourcesServer(config=config, server_client=MagicMock(spec=ServerClient))
    client = TestClient(server.setup_webserver())
    client.post("/seed_session", json={}).raise_for_status()
    return client


def verify(client: TestClient, row: dict, calls: list[dict]) -> float:
    output = [{"type": "function_call", "call_id": str(n), **call} for n, call in enumerate(calls)]
    answer = client.post("/verify", json=row | {"response": EMPTY_RESPONSE | {"output": output}})
    answer.raise_for_status()
    return answer.json()["reward"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


folder = Path(sys.argv[1])
rows = {row["id"]: row for name in ("train", "validation") for row in read(folder / f"{name}.jsonl")}
judge = start_session()
said: dict = {"rewards": [], "idle_rewards": [], "expert_rewards": [], "outputs": []}
for row in rows.values():
    said["rewards"].append(verify(judge, row, row["ground_truth"]))
    said["idle_rewards"].append(verify(judge, row, []))
for demonstration in read(folder / "demonstrations.jsonl"):
    session, calls = start_session(), []
    messages = demonstration["messages"]
    for message, answer in pairwise(messages):
        for call in message.get("tool_calls", []):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            said["outputs"].append([session.post(f"/{name}", json=arguments).text, answer["content"]])
            calls.append({"name": name, "arguments": json.dumps(arguments)})
    said["expert_rewards"].append(verify(judge, rows[demonstration["id"]], calls))
print("SAID " + json.dumps(said))
