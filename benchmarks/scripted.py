"""A scripted policy for benchmarks/environments.py: a script of replies, and two fake servers that send them.

    python benchmarks/scripted.py chat|engine --fd FD --script FILE [--reply-s SECONDS]

`write_script` writes the policy's replies for each row, turn by turn. "chat" is an OpenAI endpoint for NeMo
Gym's model server; "engine" takes and returns token ids like vLLM. Both reply after `--reply-s` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

ROUTES = {"engine": "/inference/v1/generate", "chat": "/v1/chat/completions"}
START, END = "<|im_start|>", "<|im_end|>"
LOGPROB = -0.12345678


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = row["responses_create_params"]["input"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def question(row: dict[str, Any]) -> str:
    return next(text_of(m) for m in messages_of(row) if m["role"] == "user")


def text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def write_script(path: Path, tokenizer: Any, rows: Sequence[dict[str, Any]], wrong_every: int = 4) -> None:
    """Writes the script of `rows` to `path`. Every `wrong_every`-th row gets a wrong reply.

    rows: each with a different question. tokenizer: one with ChatML and <tool_call>, as Qwen's.
    """
    written = [write_row(tokenizer, row, number % wrong_every == 3) for number, row in enumerate(rows)]
    path.write_bytes(orjson.dumps({"start": tokenizer.convert_tokens_to_ids(START), "rows": written}))


def write_row(tokenizer: Any, row: dict[str, Any], is_wrong: bool) -> dict[str, Any]:
    """Returns a row's script: keys to recognise its prompts, its first prompt, and its replies by turn."""
    from gymexp.rollout.tokens import encode, render

    tools = row["responses_create_params"].get("tools") or []
    tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in tools]
    ids = encode(tokenizer, render(tokenizer, messages_of(row)))
    marks = positions(ids, tokenizer.convert_tokens_to_ids(START))
    turns = []
    for number, reply in enumerate(replies(row, is_wrong)):
        message: dict[str, Any] = {"role": "assistant", "content": reply}
        text = reply
        if isinstance(reply, dict):
            call = {"id": f"call_{number}", "type": "function", "function": reply}
            message |= {"content": None, "tool_calls": [call]}
            text = f'{{"name": {json.dumps(reply["name"])}, "arguments": {reply["arguments"]}}}'
            text = f"<tool_call>\n{text}\n</tool_call>"
        turns.append({"ids": encode(tokenizer, text + END), "message": message})
    sample = json.dumps(row.get("ground_truth") or row["answer"])
    return {
        "question": question(row),
        "question_ids": ids[marks[-2] : marks[-1]],
        "prompt_ids": encode(tokenizer, render(tokenizer, messages_of(row), tools)),
        "chars_an_id": len(sample) / len(encode(tokenizer, sample)),
        "turns": turns,
    }


def replies(row: dict[str, Any], is_wrong: bool) -> list[Any]:
    """Returns the replies to a row, texts and calls: the correct ones, or with `is_wrong` a text that is no
    answer, or the calls without the first."""
    if "ground_truth" not in row:
        return ["I do not know." if is_wrong else row["answer"]]
    truth = row["ground_truth"]
    calls = json.loads(truth) if isinstance(truth, str) else truth
    return [*calls[int(is_wrong) :], "Done."]


def positions(ids: list[int], token_id: int) -> list[int]:
    """Returns the indices of `token_id` in `ids`."""
    indices, index = [], -1
    for _ in range(ids.count(token_id)):
        index = ids.index(token_id, index + 1)
        indices.append(index)
    return indices


def build_engine(script: dict[str, Any]) -> Callable[[bytes], bytes]:
    """Returns the fake engine: a function from request body to reply body.

    It finds the row by the token ids of its question, and the turn by the number of messages in the prompt.
    """

    def body(ids: list[int]) -> bytes:
        content = [{"logprob": LOGPROB}] * len(ids)
        choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}
        return orjson.dumps({"choices": [choice]})

    bodies = {tuple(row["question_ids"]): [body(t["ids"]) for t in row["turns"]] for row in script["rows"]}

    def answer(request: bytes) -> bytes:
        ids = orjson.loads(request)["token_ids"]
        marks = positions(ids, script["start"])
        for first in (0, 1):  # the question is the first message, or the second after a system message
            turns = bodies.get(tuple(ids[marks[first] : marks[first + 1]]))
            if turns:
                return turns[min((len(marks) - first - 2) // 2, len(turns) - 1)]
        raise LookupError("prompt ids")

    return answer


def build_chat(script: dict[str, Any]) -> Callable[[bytes], bytes]:
    """Returns the fake chat endpoint: a function from request body to reply body.

    It finds the row by the text of its question, and the turn by the number of tool results. The prompt ids
    of a later turn are the last turn's prompt and generation, and about as many ids as the tool result has.
    """
    rows = {row["question"]: row for row in script["rows"]}

    def answer(request: bytes) -> bytes:
        messages = orjson.loads(request)["messages"]
        row = rows[next(text_of(m) for m in messages if m["role"] == "user")]
        results = [m for m in messages if m["role"] == "tool"]
        turn = row["turns"][min(len(results), len(row["turns"]) - 1)]
        prompt_ids = row["prompt_ids"]
        if results:
            last = next(m for m in reversed(messages) if m["role"] == "assistant")
            filler = [1] * (int(len(text_of(results[-1])) / row["chars_an_id"]) + 8)
            prompt_ids = last["prompt_token_ids"] + last["generation_token_ids"] + filler
        num, num_prompt = len(turn["ids"]), len(prompt_ids)
        message = turn["message"] | {
            "prompt_token_ids": prompt_ids,
            "generation_token_ids": turn["ids"],
            "generation_log_probs": [LOGPROB] * num,
        }
        reason = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num, "total_tokens": num + num_prompt}
        facts = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "policy"}
        return orjson.dumps(facts | {"choices": [choice], "usage": usage})

    return answer


def main() -> None:
    from gymexp.processes.parent_watch import die_with_parent
    from gymexp.processes.ports import adopt

    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=ROUTES)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--reply-s", type=float, default=0.0, help="seconds that a reply takes")
    args = parser.parse_args()
    script = orjson.loads(args.script.read_bytes())
    answer = (build_engine if args.kind == "engine" else build_chat)(script)

    async def handle(request: web.Request) -> web.Response:
        await asyncio.sleep(args.reply_s)
        try:
            return web.Response(body=answer(await request.read()), content_type="application/json")
        except LookupError as error:
            return web.Response(status=400, text=f"the script has no such row: {error}")

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=1 << 28)
    app.add_routes([web.post(ROUTES[args.kind], handle), web.get("/health", health)])
    web.run_app(app, sock=adopt(args.fd), shutdown_timeout=0.2, access_log=None, print=lambda *_: None)


if __name__ == "__main__":
    main()
