"""A conversation that grows passes, whatever its template does to it; one that was rewritten does not."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import string
import subprocess
from collections.abc import Callable

import pytest
from chat_tokenizers import TEMPLATES, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled_rollouts import TOOLS, TRL_TEMPLATES, rollouts, sampled, tool_message
from scripted_engine import CALL, END, FakeEngine, chat, gateway

from gymexp.errors import TokenMismatch
from gymexp.gateway.history import Conversation, History
from gymexp.gateway.reply import Reply, ReplyParser
from gymexp.rollout.tokens import encode


def calling(arguments) -> dict:
    return {"id": "call12345", "type": "function", "function": {"name": "search", "arguments": arguments}}


CALLS = [calling('{"q": "x"}')]
OTHER_TOOLS = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "name": "delete"}}]


def answer(history: History, tokenizer, conversation: Conversation, generation_ids, reply=None) -> dict:
    """As the gateway answers: verified, continued, remembered. Returns the sampled message."""
    history.verify(conversation)
    prompt_ids = conversation.prompt_ids(tokenizer)
    reply = reply or Reply("what the parser made of it")
    history.remember(conversation, prompt_ids, generation_ids, reply)
    message = sampled(prompt_ids, generation_ids, content=reply.content, tool_calls=reply.tool_calls)
    return message | ({"reasoning_content": reply.reasoning} if reply.reasoning else {})


@settings(max_examples=150, deadline=None)
@given(rollouts(), st.sampled_from(["remembered", "restarted", "written anew", "parts"]))
def test_a_conversation_that_only_grows_passes_with_or_without_memory(rollout, how):
    _, tokenizer, messages, tools, turns = rollout
    history = History(tokenizer)
    for generation_ids, _, after in turns:
        messages = [*messages, answer(history, tokenizer, Conversation(messages, tools), generation_ids)]
        for number, (role, text) in enumerate(after):
            messages.append(tool_message(text, number) if role == "tool" else {"role": role, "content": text})
        if how == "restarted":
            history = History(tokenizer)
        if how == "written anew":
            messages = [dict(reversed(message.items())) for message in messages]
        if how == "parts":
            messages = [
                m | {"content": [{"type": "text", "text": m["content"]}]}
                if m["role"] != "assistant" and isinstance(m["content"], str)
                else m
                for m in messages
            ]
    history.verify(Conversation(messages, tools))


def dialogue(tokenizer, history: History, between: str = "tool") -> list[dict]:
    """System, user, a call, its result, a call, its result: two sampled turns, reasoning in the first."""
    end = encode(tokenizer, "x")[-1:]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which mails came from the manager?"},
    ]
    for number, result in enumerate(("three mails of the manager", "and one of the helpdesk")):
        reply = Reply("I look.", "hm" if number == 0 else "", CALLS if between == "tool" else [])
        said = answer(history, tokenizer, Conversation(messages, TOOLS), [*end, 70 + number], reply)
        after = (
            {"role": "tool", "content": result, "tool_call_id": "call12345", "name": "search"}
            if between == "tool"
            else {"role": "user", "content": result}
        )
        messages = [*messages, said, after]
    return messages


def changed(index: int, **fields) -> Callable[[list[dict]], list[dict]]:
    return lambda messages: [m | fields if i == index else m for i, m in enumerate(messages)]


REWRITES = {
    "another system prompt": changed(0, content="Be long."),
    "no system prompt": lambda messages: messages[1:],
    "another question": changed(1, content="Which mails came from the helpdesk?"),
    "an edited tool result": changed(3, content="three mails"),
    "a removed turn": lambda messages: [*messages[:2], *messages[4:]],
    "a removed tool result": lambda messages: [*messages[:3], *messages[4:]],
    "a summary in place of a turn": lambda messages: [
        *messages[:2],
        {"role": "user", "content": "So far: three mails."},
        *messages[4:],
    ],
    "the last turn alone": lambda messages: messages[4:],
    "a message put in": lambda messages: [*messages[:2], {"role": "user", "content": "Now!"}, *messages[2:]],
    "two turns in another order": lambda messages: [*messages[:2], *messages[4:], *messages[2:4]],
    "the ids of an earlier turn": lambda messages: changed(2, generation_token_ids=[71, 70])(messages),
    "an earlier turn without its ids": lambda messages: [
        {k: v for k, v in m.items() if i != 2 or "token" not in k} for i, m in enumerate(messages)
    ],
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_rewritten_history_is_a_token_mismatch(template, rewrite, restarted):
    tokenizer = build_tokenizer(template)
    history = History(tokenizer)
    messages = dialogue(tokenizer, history)
    if restarted:
        history = History(tokenizer)
    history.verify(Conversation(messages, TOOLS))
    with pytest.raises(TokenMismatch, match="the history was rewritten"):
        history.verify(Conversation(rewrite(messages), TOOLS))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_other_tools_than_those_in_the_prompt_are_a_token_mismatch(template, restarted):
    tokenizer = build_tokenizer(template)
    history = History(tokenizer)
    messages = dialogue(tokenizer, history)
    if restarted:
        history = History(tokenizer)
    for tools in (OTHER_TOOLS, [*TOOLS, *OTHER_TOOLS], None):
        with pytest.raises(TokenMismatch, match="these tools"):
            history.verify(Conversation(messages, tools))
    plain = build_tokenizer("plain")  # shows no tools: the prompt is the same without
    history = History(plain)
    history.verify(Conversation(dialogue(plain, history), None))


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_every_template_of_trls_collection_that_can_be_continued_passes_and_shows_what_was_rewritten(path):
    tokenizer = copy.copy(build_tokenizer("plain"))
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    tokenizer.bos_token = "<|im_start|>"
    played = 0
    for between in ("tool", "user"):
        history = History(tokenizer)
        try:
            messages = dialogue(tokenizer, history, between)
            Conversation(messages, TOOLS).prompt_ids(tokenizer)
        except (ValueError, TokenMismatch) as error:
            assert "rewritten" not in str(error)
            continue
        played += 1
        for one in (history, History(tokenizer)):
            one.verify(Conversation(messages, TOOLS))
            for name in ("another question", "an edited tool result", "a removed turn"):
                with pytest.raises(TokenMismatch, match="the history was rewritten"):
                    one.verify(Conversation(REWRITES[name](messages), TOOLS))
    assert played or path.stem not in ("qwen2_5", "qwen3", "qwen3_5_think", "llama3", "nemotron_3_nano")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"reasoning_content": None}, "reasoning"),
        ({"reasoning_content": "hm, no"}, "reasoning"),
        ({"content": "I looked."}, "content"),
        ({"content": ""}, "content"),
        ({"tool_calls": []}, "tool calls"),
        (
            {"tool_calls": [CALLS[0] | {"function": {"name": "search", "arguments": '{"q": "y"}'}}]},
            "tool calls",
        ),
    ],
)
def test_a_sampled_message_that_says_something_else_is_a_token_mismatch(fields, what):
    tokenizer = build_tokenizer("qwen3")
    history = History(tokenizer)
    messages = dialogue(tokenizer, history)
    rewritten = changed(2, **fields)(messages)
    for end in (3, 4, 6):  # as the last sampled message, and as an earlier one
        with pytest.raises(TokenMismatch, match=rf"the {what} of messages\[2\] must be what was sampled"):
            history.verify(Conversation(rewritten[:end], TOOLS))


@pytest.mark.parametrize("thought", [*string.ascii_lowercase, "0", "none", "null"])
def test_no_thought_is_so_short_that_its_loss_goes_unnoticed(thought):
    tokenizer = build_tokenizer("qwen3")
    history = History(tokenizer)
    user = {"role": "user", "content": "Go on."}
    said = answer(history, tokenizer, Conversation([user]), [70], Reply("fine", thought))
    history.verify(Conversation([user, said, user]))
    with pytest.raises(TokenMismatch, match="the reasoning of"):
        history.verify(Conversation([user, said | {"reasoning_content": None}, user]))


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": None, "reasoning": "hm"},
        {"reasoning_content": None, "content": "<think>hm</think>I look."},
        {"content": " I  look.\n", "reasoning_content": "\nhm\n"},
        {"content": [{"type": "text", "text": "I look."}]},
        {"tool_calls": [calling('{ "q" : "x" }')]},
        {"tool_calls": [calling({"q": "x"}) | {"id": "other"}]},
    ],
)
def test_a_sampled_message_that_is_written_in_another_way_passes(fields):
    tokenizer = build_tokenizer("qwen3")
    history = History(tokenizer)
    messages = changed(2, **fields)(dialogue(tokenizer, history))
    for end in (3, 4, 6):
        history.verify(Conversation(messages[:end], TOOLS))


@pytest.mark.parametrize(
    ("reply", "sent"),
    [
        (Reply("<think>a</think>b<think>c</think>d"), {"reasoning_content": "a", "content": "bd"}),
        (Reply("b<think>c</think>d", "a"), {"reasoning_content": "a", "content": "bd"}),
        (Reply("<think></think>b<think>c</think>"), {"reasoning_content": "c", "content": "b"}),
        (Reply("<th<think>a</think>ink>b</think>c"), {"reasoning_content": "a", "content": "c"}),
        (Reply("<think>\na\nb</think>"), {"reasoning_content": "a b", "content": None}),
    ],
)
def test_thoughts_that_nemo_gym_takes_out_of_a_text_may_be_missing_but_for_the_first(reply, sent):
    """As its model server does: it makes them a reasoning item each, and sends the first one back."""
    tokenizer = build_tokenizer("qwen3")
    history = History(tokenizer)
    user = {"role": "user", "content": "Go on."}
    said = answer(history, tokenizer, Conversation([user]), [70], reply)
    history.verify(Conversation([user, said | sent, user]))
    for wrong in ({"reasoning_content": "z"}, {"content": "z"}, {"reasoning_content": None}):
        with pytest.raises(TokenMismatch):
            history.verify(Conversation([user, said | sent | wrong, user]))


def test_turns_that_nemo_gym_merges_pass():
    """A turn of reasoning alone, with nothing after it: the next one comes back in the same message."""
    tokenizer = build_tokenizer("qwen3")
    history = History(tokenizer)
    user = {"role": "user", "content": "Go on."}
    first = answer(history, tokenizer, Conversation([user]), [70], Reply("", "hm"))
    second = answer(history, tokenizer, Conversation([user, first]), [71], Reply("fine"))
    merged = second | {"content": "fine", "reasoning_content": "hm"}
    history.verify(Conversation([user, first, second, user]))
    third = answer(history, tokenizer, Conversation([user, merged, user]), [72])
    history.verify(Conversation([user, merged, user, third, user]))
    for rewritten in ([merged, user], [user | {"content": "Stop."}, merged, user]):
        with pytest.raises(TokenMismatch):
            history.verify(Conversation(rewritten))
    other = first | {"prompt_token_ids": [1, 2, 3]}
    with pytest.raises(TokenMismatch):
        history.verify(Conversation([user, other, second, user]))


def test_a_conversations_prompt_ends_where_the_reply_begins_unless_it_is_told_not_to():
    tokenizer = build_tokenizer("plain")
    user = [{"role": "user", "content": "x"}]
    whole, bare = Conversation(user), Conversation(user, add_generation_prompt=False)
    text = "<|im_start|>user\nx<|im_end|>\n"
    assert tokenizer.decode(whole.prompt_ids(tokenizer)) == text + "<|im_start|>assistant\n"
    assert tokenizer.decode(bare.prompt_ids(tokenizer)) == text
    variants = [whole, bare, Conversation(user, TOOLS), Conversation(user, None, {"a": 1}), Conversation([])]
    assert len({one.key() for one in variants}) == 5
    assert bare.until(0) == Conversation([], add_generation_prompt=False)


def test_what_is_remembered_is_bounded_and_the_newest():
    tokenizer = build_tokenizer("qwen3")
    history = History(tokenizer, capacity=2)
    kept = [
        answer(history, tokenizer, Conversation([{"role": "user", "content": text}]), [70], Reply(text))
        for text in ("a", "b", "a", "c")
    ]
    for text, message in zip("abac", kept, strict=True):
        conversation = Conversation([{"role": "user", "content": text}, message | {"content": "other"}])
        if text == "b":
            history.verify(conversation)  # forgotten: its text alone is not compared
        else:
            with pytest.raises(TokenMismatch):
                history.verify(conversation)


def test_numbers_of_any_size_and_in_any_order_in_a_calls_arguments_are_no_error():
    tokenizer = build_tokenizer("qwen3")
    history = History(tokenizer)
    call = calling('{"n": 99999999999999999999, "a": 1}')
    user = {"role": "user", "content": "x"}
    said = answer(history, tokenizer, Conversation([user]), [70], Reply("", tool_calls=[call]))
    turned = said | {"tool_calls": [calling('{"a": 1, "n": 99999999999999999999}')]}
    for one in (said, turned):
        history.verify(Conversation([user, one, tool_message("y", 0)]))


def test_the_gateway_answers_a_rewritten_history_with_a_400_that_nemo_gym_does_not_hide():
    async def run():
        async with (
            FakeEngine("One." + END, "Two." + END, "Three." + END).serve() as url,
            gateway(url) as http,
        ):
            messages = [{"role": "user", "content": "maximum context length, max_tokens"}]
            for _ in range(2):
                status, answer = await chat(http, messages)
                assert status == 200
                messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "More."}]
            refused = [await chat(http, some) for some in (messages[1:], changed(0, content="Hi.")(messages))]
            return refused, await chat(http, messages)

    refused, (status, _) = asyncio.run(run())
    assert status == 200
    for status, answer in refused:
        assert (status, answer["error"]["type"]) == (400, "token_mismatch")
        assert "the history was rewritten" in answer["error"]["message"]
        assert not any(text in answer["error"]["message"] for text in ("context length", "max_tokens"))


AGENTS_TURN = """
import json, sys
from nemo_gym.config_types import BaseServerConfig
from nemo_gym.openai_utils import NeMoGymChatCompletion, NeMoGymResponseCreateParamsNonStreaming
from nemo_gym.server_utils import ServerClient
from omegaconf import OmegaConf
from responses_api_models.vllm_model.app import VLLMModel, VLLMModelConfig

address = {"host": "127.0.0.1", "port": 0}
values = {"name": "policy_model", "entrypoint": "app.py", "base_url": "http://x/v1", "api_key": "none"}
values |= {"model": "policy", "return_token_id_information": True, "uses_reasoning_parser": True}
client = ServerClient(
    head_server_config=BaseServerConfig.model_validate(address), global_config_dict=OmegaConf.create()
)
server = VLLMModel(config=VLLMModelConfig.model_validate(values | address), server_client=client)
converter = server._converter
prepare = server._preprocess_chat_completion_create_params
for completion in json.load(sys.stdin):
    message = completion["choices"][0]["message"]
    if reasoning := message.pop("reasoning_content", None):  # as its chat_completions does
        message["content"] = converter._wrap_reasoning_in_think_tags([reasoning]) + (message["content"] or "")
    choice = NeMoGymChatCompletion.model_validate(completion).choices[0]
    output = [item.model_dump() for item in converter.postprocess_chat_response(choice)]
    items = [{"role": "user", "content": "Go on."}, *output]
    calls = [item for item in output if item["type"] == "function_call"]
    items += [{"type": "function_call_output", "call_id": c["call_id"], "output": "x"} for c in calls]
    items += [] if calls else [{"role": "user", "content": "More."}]
    params = NeMoGymResponseCreateParamsNonStreaming(input=items)
    again = converter.responses_to_chat_completion_create_params(params)
    print("RESULT" + json.dumps(prepare(None, again.model_dump(exclude_unset=True))))
"""


@pytest.mark.gym
def test_whatever_the_policy_says_comes_back_from_nemo_gym_as_it_was(tmp_path, gym_python):
    (tmp_path / "agents_turn.py").write_text(AGENTS_TURN)
    tokenizer = build_tokenizer("qwen3")
    draw = random.Random(0)
    pieces = [
        "<think>",
        "</think>",
        "<think>hm</think>",
        CALL,
        "<tool_call>",
        "</tool_call>",
        "I look.",
        "\n",
    ]
    pieces += [" ", "東京 🙂", '{"name": 1}', "<thi", "nk>", "\\ud800", "<|im_start|>"]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 7))) for _ in range(400)]
    parser, history = ReplyParser(tokenizer), History(tokenizer)
    first = Conversation([{"role": "user", "content": "Go on."}], TOOLS)
    answers = []
    for text in texts:
        ids = encode(tokenizer, text)
        reply = parser.parse(ids, first.prompt_ids(tokenizer), TOOLS)
        message = answer(history, tokenizer, first, ids, reply)
        message["generation_log_probs"] = [-0.5] * len(ids)
        message["content"] = reply.content or (None if reply.tool_calls else "")
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        envelope = {"id": "x", "object": "chat.completion", "created": 0, "model": "policy"}
        answers.append(envelope | {"choices": [choice]})
    process = subprocess.run(
        [gym_python, tmp_path / "agents_turn.py"],
        input=json.dumps(answers),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    requests = [json.loads(line) for line in process.stdout.split("RESULT")[1:]]
    assert len(requests) == len(texts)
    for request in requests:
        history.verify(Conversation(request["messages"], TOOLS))
    with_ids = [any("generation_token_ids" in m for m in request["messages"]) for request in requests]
    assert sum(with_ids) > 350, "those that say nothing at all come back as nothing"
