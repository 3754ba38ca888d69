"""What a chat request may ask for, what the engine is told, and what the answer looks like."""

from __future__ import annotations

import time

import pytest

from gymexp.gateway import chat
from gymexp.gateway.reply import Reply
from gymexp.rollout.generation import Generation

CALL = {"id": "c", "type": "function", "function": {"name": "search", "arguments": "{}"}}

# OpenAI's defaults, and vLLM's "all tokens": each leaves the distribution as it is.
NEUTRAL = [
    ("n", 1),
    ("stream", False),
    ("top_logprobs", 0),
    ("presence_penalty", 0),
    ("frequency_penalty", 0),
    ("logit_bias", {}),
    ("response_format", {"type": "text"}),
    ("tool_choice", "auto"),
    ("tool_choice", "none"),
]
CHANGING = [
    ("n", 2),
    ("n", 0),
    ("stream", True),
    ("top_logprobs", 1),
    ("presence_penalty", 0.5),
    ("presence_penalty", -1),
    ("frequency_penalty", 0.5),
    ("logit_bias", {"5": 1}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {}),
    ("tool_choice", "required"),
    ("tool_choice", ""),
]


@pytest.mark.parametrize(("name", "value"), [*NEUTRAL, *((name, None) for name, _ in NEUTRAL)])
def test_what_changes_nothing_passes(name, value):
    chat.check_neutral({name: value})


@pytest.mark.parametrize(("name", "value"), CHANGING)
def test_what_would_change_the_distribution_and_is_not_carried_out_is_refused_by_name(name, value):
    with pytest.raises(chat.BadRequest, match=rf"^{name} must be .* for this gateway, got "):
        chat.check_neutral({name: value})


def test_a_request_that_says_nothing_is_sampled_at_temperature_1_from_all_tokens_in_all_that_fits():
    for body in ({}, dict.fromkeys(("temperature", "top_p", "seed", "stop", "max_tokens"))):
        assert chat.sampling_params(body, 10, 30) == {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 20,
            "logprobs": 0,
        }


def test_what_a_request_says_is_what_the_engine_is_told():
    body = {"temperature": 0, "top_p": 0.5, "max_tokens": 7, "stop": "x", "seed": -3}
    assert chat.sampling_params(body, 10, None) == {
        "temperature": 0,
        "top_p": 0.5,
        "max_tokens": 7,
        "logprobs": 0,
        "stop": ["x"],
        "seed": -3,
    }


@pytest.mark.parametrize("value", [-0.1, "1", True, [1], {}])
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_a_number_is_a_number_that_is_not_negative(name, value):
    with pytest.raises(chat.BadRequest, match=f"^{name} must be a number >= 0, got "):
        chat.sampling_params({name: value}, 1, 10)


@pytest.mark.parametrize("seed", [1.0, "1", True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(chat.BadRequest, match=r"^seed must be an integer, got "):
        chat.sampling_params({"seed": seed}, 1, 10)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("asked", "prompt", "fits", "given"),
    [(5, 10, 30, 5), (20, 10, 30, 20), (21, 10, 30, 20), (1, 29, 30, 1), (9, 29, 30, 1), (50, 10, None, 50)],
)
def test_as_many_tokens_as_were_asked_for_or_as_many_as_fit(name, asked, prompt, fits, given):
    assert chat.room({name: asked}, prompt, fits) == given


def test_the_newer_name_for_the_number_of_tokens_comes_first():
    assert chat.room({"max_tokens": 5, "max_completion_tokens": 3}, 1, 30) == 3


@pytest.mark.parametrize("asked", [0, -1, 1.0, "5", True])
def test_a_number_of_tokens_is_an_integer_of_1_at_least(asked):
    with pytest.raises(chat.BadRequest, match=r"^max_completion_tokens must be an integer >= 1, got "):
        chat.room({"max_tokens": asked}, 1, 30)


@pytest.mark.parametrize("prompt", [30, 31])
def test_a_prompt_without_room_for_a_reply_says_so_in_the_words_that_nemo_gym_knows(prompt):
    with pytest.raises(chat.BadRequest, match=rf"{prompt} tokens, and the maximum context length is 30 "):
        chat.room({}, prompt, 30)


def test_without_a_limit_of_its_own_a_request_needs_the_gateways():
    with pytest.raises(chat.BadRequest, match="as the gateway was started without --max-model-len"):
        chat.room({}, 1, None)


@pytest.mark.parametrize(
    ("stop", "texts"), [(None, []), ("", []), ([], []), ("a", ["a"]), (["a", "b"], ["a", "b"])]
)
def test_stop_is_a_text_or_several(stop, texts):
    assert chat.read_stop({"stop": stop}) == texts


@pytest.mark.parametrize("stop", [[""], [1], 5, {"a": 1}])
def test_a_stop_that_is_no_text_is_refused(stop):
    with pytest.raises(chat.BadRequest, match=r"^stop must be a text or a list of texts, got "):
        chat.read_stop({"stop": stop})


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"null"])
def test_a_body_is_a_json_object(data):
    with pytest.raises(chat.BadRequest, match=r"^the body must be "):
        chat.read_object(data)


def test_a_play_is_a_text_or_nothing():
    assert chat.read_play({"play": "x"}) == "x" and chat.read_play({}) is None
    with pytest.raises(chat.BadRequest, match=r"^play must be a text, got 5"):
        chat.read_play({"play": 5})


@pytest.mark.parametrize(
    ("reply", "ended", "content", "reason"),
    [
        (Reply("fine"), "stop", "fine", "stop"),
        (Reply(""), "stop", "", "stop"),
        (Reply("fine"), "length", "fine", "length"),
        (Reply("", tool_calls=[CALL]), "stop", None, "tool_calls"),
        (Reply("I look.", tool_calls=[CALL]), "stop", "I look.", "tool_calls"),
        (Reply("", tool_calls=[CALL]), "length", None, "length"),
    ],
)
def test_an_answer_says_what_was_said_and_why_it_ended(reply, ended, content, reason):
    answer = chat.completion("policy", [1, 2], Generation([3, 4, 5], [-0.1, -0.2, -0.3], ended), reply, None)
    [choice] = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, reason, None)
    wanted = {
        "role": "assistant",
        "content": content,
        "prompt_token_ids": [1, 2],
        "generation_token_ids": [3, 4, 5],
        "generation_log_probs": [-0.1, -0.2, -0.3],
    }
    assert choice["message"] == wanted | ({"tool_calls": [CALL]} if reply.tool_calls else {})
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert (answer["object"], answer["model"]) == ("chat.completion", "policy")
    assert answer["id"].startswith("chatcmpl-") and answer["created"] == pytest.approx(time.time(), abs=60)


def test_reasoning_and_the_texts_of_the_tokens_are_there_if_they_are():
    generation = Generation([3, 4], [-0.1, -0.2], "stop")
    answer = chat.completion("policy", [1], generation, Reply("a", "hm"), ["é", "b"])
    [choice] = answer["choices"]
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["logprobs"] == {
        "content": [
            {"token": "é", "logprob": -0.1, "bytes": [0xC3, 0xA9], "top_logprobs": []},
            {"token": "b", "logprob": -0.2, "bytes": [0x62], "top_logprobs": []},
        ]
    }
    ids = {chat.completion("policy", [1], generation, Reply("a"), None)["id"] for _ in range(3)}
    assert len(ids) == 3
