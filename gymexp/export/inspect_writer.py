"""Writes a log of Inspect's through its Python API: `python inspect_writer.py SAMPLES.jsonl FILE.eval`.

A script for an environment of its own, which has inspect-ai; it imports nothing of gymexp. The first line of
SAMPLES is the log's head, each other line a sample, both as gymexp/export/inspect_log.py makes them.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any

from inspect_ai.log import (  # pyright: ignore[reportMissingImports]
    EvalConfig,
    EvalDataset,
    EvalError,
    EvalLog,
    EvalMetric,
    EvalResults,
    EvalSample,
    EvalSampleLimit,
    EvalScore,
    EvalSpec,
    EvalStats,
    write_eval_log,
)
from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.scorer import Score  # pyright: ignore[reportMissingImports]
from inspect_ai.tool import ToolCall  # pyright: ignore[reportMissingImports]


def message_of(message: dict[str, Any], model: str) -> Any:
    """Returns Inspect's message. A role that Inspect does not know becomes a user's, with its name."""
    content = message["content"]
    match message["role"]:
        case "assistant":
            calls = [tool_call_of(call) for call in message.get("calls", [])]
            if message.get("reasoning"):
                content = [ContentReasoning(reasoning=message["reasoning"]), ContentText(text=content)]
            return ChatMessageAssistant(content=content, tool_calls=calls or None, model=model)
        case "system" | "developer":
            return ChatMessageSystem(content=content)
        case "tool":
            return ChatMessageTool(content=content, tool_call_id=message.get("call_id"))
        case "user":
            return ChatMessageUser(content=content)
        case other:
            return ChatMessageUser(content=f"{other}: {content}")


def tool_call_of(call: dict[str, str]) -> Any:
    """Returns Inspect's tool call; arguments that are no JSON object are kept as a text, with the error."""
    try:
        arguments = json.loads(call["arguments"] or "{}")
        if not isinstance(arguments, dict):
            raise ValueError("the arguments are no JSON object")
        return ToolCall(id=call["id"], function=call["name"], arguments=arguments)
    except ValueError as error:
        arguments = {"arguments": call["arguments"]}
        return ToolCall(id=call["id"], function=call["name"], arguments=arguments, parse_error=str(error))


def sample_of(line: dict[str, Any], model: str) -> Any:
    """Returns Inspect's sample of a rollout. The score is the reward; the verdict explains it."""
    prompt = [message_of(message, model) for message in line["input"]]
    played = [message_of(message, model) for message in line["messages"]]
    last = next((m for m in reversed(played) if isinstance(m, ChatMessageAssistant)), None)
    scores = None
    if line["score"] is not None:
        explanation = "\n".join(
            f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for name, value in line["verdict"].items()
        )
        scores = {
            "reward": Score(
                value=line["score"],
                answer=last.text if last else None,
                explanation=explanation or None,
                metadata={"success": line["success"], "verdict": line["verdict"]},
            )
        }
    error = line["error"]
    prompt_tokens, tokens = line["tokens"]
    usage = ModelUsage(input_tokens=prompt_tokens, output_tokens=tokens, total_tokens=prompt_tokens + tokens)
    return EvalSample(
        id=line["id"],
        epoch=line["epoch"],
        input=prompt,
        target="",
        messages=[*prompt, *played],
        output=ModelOutput.from_message(last) if last else ModelOutput(model=model),
        scores=scores,
        metadata=line["metadata"],
        model_usage={model: usage},
        error=error and EvalError(message=error, traceback=error, traceback_ansi=error),
        limit=EvalSampleLimit(type="token", limit=tokens) if line["limit"] == "length" else None,
        total_time=line["seconds"],
    )


def main() -> None:
    source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        head = json.loads(file.readline())
        model = head["model"]
        lines = [json.loads(line) for line in file]
    samples = [sample_of(line, model) for line in lines]
    rewards = [line["score"] for line in lines if line["score"] is not None]
    began = datetime.fromtimestamp(head["began"], UTC).isoformat(timespec="seconds")
    metrics = {"mean": EvalMetric(name="mean", value=sum(rewards) / len(rewards))} if rewards else {}
    score = EvalScore(
        name="reward",
        scorer="reward",
        metrics=metrics,
        scored_samples=len(rewards),
        unscored_samples=len(lines) - len(rewards),
    )
    ids = list(dict.fromkeys(line["id"] for line in lines))
    log = EvalLog(
        status="success",
        eval=EvalSpec(
            created=began,
            task=head["task"],
            model=model,
            dataset=EvalDataset(name=", ".join(head["envs"]), samples=len(ids), sample_ids=ids),
            config=EvalConfig(epochs=max(line["epoch"] for line in lines)),
            metadata=head["metadata"],
        ),
        results=EvalResults(total_samples=len(lines), completed_samples=len(rewards), scores=[score]),
        stats=EvalStats(started_at=began, completed_at=began),
        samples=samples,
    )
    write_eval_log(log, target, format="eval")


if __name__ == "__main__":
    main()
