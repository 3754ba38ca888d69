"""Writes rollouts as a log of Inspect's (https://inspect.aisi.org.uk), for `inspect view` and other readers.

Inspect's file format is not a public specification, but its Python API is. inspect-ai's dependencies conflict
with gymexp's, so `inspect_writer.py` runs in an environment of its own, which uv makes on first use and keeps
in its cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from gymexp.errors import GymexpError
from gymexp.export.chosen import open_run
from gymexp.export.public_text import hosts_of, public_text
from gymexp.export.selection import select, step_of
from gymexp.files import replacing
from gymexp.printable import printable_in, say
from gymexp.record.run_state import read_run
from gymexp.rollout.items import text_of
from gymexp.rollout.rollout_files import read_outcome, read_train_index
from gymexp.view.run_files import RunFiles
from gymexp.view.task_rows import TaskRows

# The versions whose API the writer uses. Tested with 0.3.285.
INSPECT = "inspect-ai>=0.3.200,<0.4"
_WRITER = Path(__file__).parent / "inspect_writer.py"
_TIMEOUT_S = 1800.0


def write_log(run: Path, args: Namespace) -> None:
    """Writes the selected rollouts to `args.inspect`. Raises GymexpError if nothing is selected, or if
    inspect-ai cannot be had."""
    config = open_run(run)
    rows = select(run, args)
    advantages = {
        (row["file"], row["number"]): row.get("advantage") for row in read_train_index(run / "rollouts")
    }
    tasks = TaskRows(RunFiles(run))
    # Inspect's log needs a time for its name and its header: that of the first rollout.
    began = min((row["began"] for row in rows if row.get("began")), default=0.0)
    head = {
        "task": f"{config.name}: {_title(rows)}",
        "model": f"gymexp/{public_text(config.model.name)}",
        "began": began,
        "envs": sorted({row["env"] for row in rows}),
        "metadata": {
            "run": run.name,
            "state": read_run(run).state,
            "model_path": public_text(config.model.path, hosts_of(run)),
            "seed": config.seed,
        },
    }
    target = args.inspect.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gymexp-inspect-") as directory:
        samples = Path(directory) / "samples.jsonl"
        with samples.open("wb") as file:
            file.write(orjson.dumps(printable_in(head)) + b"\n")
            for row in rows:
                record = read_outcome(run / "rollouts", row)
                advantage = advantages.get((row["file"], row["number"]))
                sample = sample_of(row, record, tasks.read(row["key"]), advantage)
                # `inspect view` obeys direction marks.
                file.write(orjson.dumps(printable_in(sample)) + b"\n")
        with replacing(target) as part:
            made = Path(directory) / "rollouts.eval"
            _run_writer(samples, made)
            part.write_bytes(made.read_bytes())
    say(f"{len(rows)} rollouts ({_title(rows)}) in {target}; look at them with: inspect view")


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = sorted({step_of(dict(row)) for row in rows})
    if rows[0]["file"].startswith("eval-"):
        return f"evaluation after step {steps[0]}"
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def sample_of(
    row: Mapping[str, Any],
    record: Mapping[str, Any],
    task_row: Mapping[str, Any] | None,
    advantage: float | None,
) -> dict[str, Any]:
    """Returns a rollout in the form that `inspect_writer.py` reads: plain JSON, without Inspect's types.

    row: its line of the index. record: the outcome, as `read_outcome` returns it.
    """
    is_eval = row["file"].startswith("eval-")
    params = task_row.get("responses_create_params") if task_row else None
    asked = params.get("input", []) if isinstance(params, dict) else []
    prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    facts = ("env", "key", "outcome", "limit", "cause", "failures", "turns", "tokens", "prompt_tokens", "nll")
    facts += ("tool_calls", "tool_errors", "seed", "replica", "weights_version", "seconds", "group", "number")
    sample: dict[str, Any] = {
        "id": row["key"] if is_eval else f"{row['file']}:{row['key']}",
        "epoch": row["index"] + 1,
        "input": list(_messages(prompt)),
        "messages": [],
        "score": None,
        "success": row.get("success"),
        "limit": row.get("limit"),
        "error": None,
        "seconds": row.get("seconds", {}).get("total"),
        "tokens": [row.get("prompt_tokens", 0), row.get("tokens", 0)],
        "verdict": {},
        "metadata": {name: row[name] for name in facts if name in row}
        | {"step": step_of(dict(row)), "advantage": advantage},
    }
    if record["outcome"] == "failed":
        return sample | {"error": f"{record['cause']}: {record['detail']}"}
    rollout = record["rollout"]
    verdict = dict(rollout.get("verdict") or {})
    if rollout.get("refused"):
        verdict["refused"] = rollout["refused"]
    sample |= {"messages": list(_messages(rollout["items"])), "score": rollout["reward"]}
    return sample | {"verdict": verdict}


def _messages(items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields items of OpenAI's Responses API as chat messages: tool calls and reasoning go to the assistant's
    message that they belong to."""
    open_: dict[str, Any] | None = None  # an assistant's message that may get more calls
    for item in items:
        kind = item.get("type", "message")
        role = str(item.get("role") or "assistant")
        if kind == "function_call_output":
            if open_:
                yield open_
                open_ = None
            call_id = item.get("call_id")
            yield {"role": "tool", "content": text_of(item.get("output")), "call_id": call_id}
            continue
        if kind == "message" and role != "assistant":
            if open_:
                yield open_
                open_ = None
            yield {"role": role, "content": text_of(item.get("content"))}
            continue
        if open_ is None or (kind != "function_call" and (open_["calls"] or open_["content"])):
            if open_:
                yield open_
            open_ = {"role": "assistant", "content": "", "reasoning": "", "calls": []}
        if kind == "function_call":
            arguments = _printable_arguments(item.get("arguments"))
            call = {"id": item.get("call_id"), "name": item.get("name"), "arguments": arguments}
            open_["calls"].append({key: str(value or "") for key, value in call.items()})
        elif kind == "reasoning":
            open_["reasoning"] += text_of(item.get("summary") or item.get("content") or "")
        else:
            of_text = kind == "message"
            open_["content"] += text_of(item.get("content")) if of_text else orjson.dumps(item).decode()
    if open_:
        yield open_


def _printable_arguments(arguments: Any) -> Any:
    """Returns the JSON text of a tool call's arguments without escapes of unsafe characters, which the writer
    would take for the characters; another text as it is."""
    try:
        return orjson.dumps(printable_in(orjson.loads(arguments))).decode()
    except (TypeError, ValueError):
        return arguments


def _run_writer(samples: Path, made: Path) -> None:
    """Runs the writer with inspect-ai. Raises GymexpError, in one line, if it cannot be had or fails."""
    from uv import find_uv_bin

    command = [find_uv_bin(), "run", "--isolated", "--no-project", "--quiet", "--python", sys.executable]
    command += ["--with", INSPECT, "python", str(_WRITER), str(samples), str(made)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=samples.parent, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise GymexpError(f"--inspect: no log was written within {_TIMEOUT_S:.0f} s: say --limit") from None
    if done.returncode and not made.exists():
        lines = [line.strip(" ×│╰─▶") for line in done.stderr.splitlines() if line.strip()] or ["no reason"]
        if "Traceback" in done.stderr:
            raise GymexpError(f"--inspect: {INSPECT} cannot write the log: {lines[-1]}")
        raise GymexpError(
            f"--inspect needs {INSPECT}, which uv fetches once from the package index, but uv says: "
            f"{' '.join(lines)[:500]}. Set UV_INDEX_URL to an index that can be reached, or try again with a "
            "network"
        )
