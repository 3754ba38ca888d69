import copy
import hashlib
import json
import math

import pytest
from chat_tokenizers import FORGETFUL, NAMES_CALLS_BY_ID, ONLY_BEHIND_CALLS, PLAIN, build_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sampled_rollouts import END, TOOLS, TRL_TEMPLATES, rollouts, sampled, texts, tool_message
from tokenizers import processors

from gymexp.errors import TokenMismatch
from gymexp.rollout.outcome import Turn
from gymexp.rollout.tokens import (
    SENTINEL,
    encode,
    end_of_turn_ids,
    flatten,
    ids_digest,
    last_sampled,
    render,
    splice,
    verify_turns,
)

calls = st.lists(
    st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=2), max_size=3
)


def expected_tail(template, ended, after):
    """What each template puts behind a sampled turn, spelt out by hand. after: (role, text) of what came."""
    end = "" if ended else END[template]
    if template == "llama3":
        names = {"tool": "ipython"}
        turns = [
            f"<|start_header_id|>{names.get(role, role)}<|end_header_id|>\n\n{text.strip()}<|eot_id|>"
            for role, text in after
        ]
        return end + "".join(turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    if template == "plain":
        turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in after]
    else:
        turns, is_open = [], False
        for number, (role, text) in enumerate(after):
            if role == "tool":
                turns.append(
                    ("" if is_open else "<|im_start|>user") + f"\n<tool_response>\n{text}\n</tool_response>"
                )
                is_open = number + 1 < len(after) and after[number + 1][0] == "tool"
                turns.append("" if is_open else "<|im_end|>\n")
            else:
                turns.append(f"<|im_start|>{role}\n{text}<|im_end|>\n")
    return end + "\n" + "".join(turns) + "<|im_start|>assistant\n"


@settings(max_examples=300, deadline=None)
@given(rollouts(), st.booleans())
def test_every_prompt_is_what_was_sampled_before_and_then_the_templates_tail(rollout, as_parts):
    template, tokenizer, messages, tools, turns = rollout
    prompt_ids = encode(tokenizer, render(tokenizer, messages, tools))
    played = []
    for generation_ids, ended, after in turns:
        played.append(Turn(prompt_ids, generation_ids, [-0.5] * len(generation_ids)))
        messages = [*messages, sampled(prompt_ids, generation_ids, tool_calls=[])]
        for number, (role, text) in enumerate(after):
            content = [{"type": "text", "text": text}] if as_parts else text
            messages.append(
                tool_message(content, number) if role == "tool" else {"role": role, "content": content}
            )
        expected = prompt_ids + generation_ids + encode(tokenizer, expected_tail(template, ended, after))
        prompt_ids = splice(tokenizer, messages, tools)
        assert prompt_ids == expected

    verify_turns(played, len(tokenizer))
    first_ids, completion_ids, env_mask, logprobs = flatten(played)
    assert first_ids + completion_ids == played[-1].prompt_ids + played[-1].completion_ids
    assert len(completion_ids) == len(env_mask) == len(logprobs)
    by_policy = [i for i, mask in zip(completion_ids, env_mask, strict=True) if mask]
    assert by_policy == [i for turn in played for i in turn.completion_ids]
    assert all((lp == -0.5) == (mask == 1) for lp, mask in zip(logprobs, env_mask, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["plain", "qwen2_5", "llama3"]),
    st.booleans(),
    st.lists(st.tuples(texts, calls, texts), min_size=1, max_size=3),
)
@example("qwen2_5", False, [("grid", [{"q": "1"}, {"q": "2"}], "done\n")])
def test_splicing_equals_rendering_again_where_the_template_keeps_history(
    template, merges_cross_spaces, exchanges
):
    tokenizer = build_tokenizer(template, merges_cross_spaces)
    tools = None if template == "plain" else TOOLS
    plain = [{"role": "user", "content": "Go on."}]
    carried = list(plain)
    for said, arguments, answer in exchanges:
        said = said.strip()  # Llama's template trims
        for marker in ("<|im_end|>", "<|eot_id|>"):
            said = said.replace(marker, "")
        message = {"role": "assistant", "content": said}
        if template != "plain" and (arguments := arguments[: 1 if template == "llama3" else None]):
            function = [{"name": "search", "arguments": json.dumps(a)} for a in arguments]
            message["tool_calls"] = [
                {"id": f"call_{n}", "type": "function", "function": f} for n, f in enumerate(function)
            ]
        before_ids = encode(tokenizer, render(tokenizer, plain, tools))
        spoken_ids = encode(
            tokenizer, render(tokenizer, [*plain, message], tools, add_generation_prompt=False)
        )
        assume(spoken_ids[: len(before_ids)] == before_ids)  # else no model could have sampled this text
        end_id = tokenizer.convert_tokens_to_ids(END[template])
        generation_ids = spoken_ids[len(before_ids) : len(spoken_ids) - spoken_ids[::-1].index(end_id)]
        carried.append({**message, "prompt_token_ids": before_ids, "generation_token_ids": generation_ids})
        after = [tool_message(answer, n) for n in range(len(arguments))] or [
            {"role": "user", "content": answer}
        ]
        plain, carried = [*plain, message, *after], [*carried, *after]
        assert splice(tokenizer, carried, tools) == encode(tokenizer, render(tokenizer, plain, tools))


def test_reasoning_that_the_template_drops_stays_in_the_prompt():
    tokenizer = build_tokenizer("qwen3")
    messages = [{"role": "user", "content": "1+1?"}]
    prompt_ids = encode(tokenizer, render(tokenizer, messages))
    generation_ids = encode(tokenizer, "<think>\none and one\n</think>\n\n2<|im_end|>")
    answer = sampled(prompt_ids, generation_ids, content="2", reasoning_content="one and one")
    messages += [answer, {"role": "user", "content": "And 2+2?"}]
    assert "one and one" not in render(tokenizer, messages)
    assert tokenizer.decode(splice(tokenizer, messages)) == (
        tokenizer.decode(prompt_ids)
        + "<think>\none and one\n</think>\n\n2<|im_end|>\n"
        + "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_arguments_reach_the_generation_prompt_of_every_turn():
    tokenizer = build_tokenizer("qwen3")
    messages = [{"role": "user", "content": "1+1?"}]
    off = {"enable_thinking": False}
    prompt_ids = encode(tokenizer, render(tokenizer, messages, template_kwargs=off))
    messages += [sampled(prompt_ids, encode(tokenizer, "2<|im_end|>")), {"role": "user", "content": "2+2?"}]
    for ids in (prompt_ids, splice(tokenizer, messages, template_kwargs=off)):
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_the_last_message_with_ids_counts_and_messages_without_ids_after_it_are_the_environments():
    tokenizer = build_tokenizer("plain")
    user = {"role": "user", "content": "x"}
    old, new = sampled([1], [2]), sampled([3, 4], [5])
    messages = [user, old, user, new, user, {"role": "assistant", "content": "put in"}, user]
    assert last_sampled(messages) == 3
    tail = "<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nput in<|im_end|>\n"
    tail += "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert splice(tokenizer, messages) == [3, 4, 5, *encode(tokenizer, tail)]


def test_arguments_that_are_no_json_object_reach_the_template_as_they_are():
    tokenizer = build_tokenizer("qwen2_5")
    for arguments, shown in (
        ('{"q": "é"}', '{"q": "é"}'),
        ('{"q": ', '"{\\"q\\": "'),
        ("[1]", '"[1]"'),
        ("[" * 9999, "[["),
    ):
        call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        assert shown in render(tokenizer, messages, TOOLS)


def test_a_developer_message_is_a_system_message_where_the_template_knows_no_developer():
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert "Be brief." in render(build_tokenizer("qwen2_5"), messages)


def test_a_turn_that_the_template_ends_without_a_special_token_keeps_the_whole_tail():
    tokenizer = build_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    newline = encode(tokenizer, "\n")
    messages = [sampled([1], newline), {"role": "user", "content": "x"}]
    assert splice(tokenizer, messages) == [1, *newline, *encode(tokenizer, "\nuser: x\n")]


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_no_template_of_trls_collection_silently_loses_what_came_after(path):
    said = 'R 1\n"quoted" é'
    tokenizer = copy.copy(build_tokenizer("plain"))
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    tokenizer.bos_token = "<|im_start|>"
    call = {"id": "call12345", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}
    end_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    for role, fields in (("user", {}), ("tool", {"tool_calls": [call]})):
        after = {"role": role, "content": said, "tool_call_id": "call12345", "name": "search"}
        messages = [{"role": "user", "content": "x"}, sampled([1], end_ids, **fields), after]
        try:
            text = tokenizer.decode(splice(tokenizer, messages, TOOLS)[2:])
        except (ValueError, TokenMismatch):
            assert path.stem not in ("qwen2_5", "qwen3", "qwen3_5_think", "llama3", "nemotron_3_nano")
            continue
        assert said.strip() in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


def test_a_result_that_is_shown_only_behind_its_call_follows_the_sampled_call():
    tokenizer = build_tokenizer(ONLY_BEHIND_CALLS)
    call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [
        {"role": "user", "content": "x"},
        sampled([1], [2, end], tool_calls=[call]),
        tool_message("found", 0),
    ]
    tail = "[search] found<|im_end|>\n<|im_start|>assistant\n"
    assert splice(tokenizer, messages) == [1, 2, end, *encode(tokenizer, tail)]
    cut_by_length = [messages[0], {**messages[1], "generation_token_ids": [2]}, messages[2]]
    with pytest.raises(TokenMismatch, match=r"leaves out or changes the tool message at messages\[2\]"):
        splice(tokenizer, cut_by_length)


def test_each_of_several_results_follows_its_own_call():
    tokenizer = build_tokenizer(NAMES_CALLS_BY_ID)
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for number, name in enumerate(("search", "open", "delete"))
    ]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    results = [tool_message(text, number) for number, text in enumerate(("found", "read", "gone"))]
    messages = [{"role": "user", "content": "x"}, sampled([1], [2, end], tool_calls=calls), *results]
    tail = "[search] found<|im_end|>[open] read<|im_end|>[delete] gone<|im_end|><|im_start|>assistant\n"
    assert splice(tokenizer, messages) == [1, 2, end, *encode(tokenizer, tail)]


def test_what_a_template_leaves_out_of_an_assistants_message_that_was_not_sampled_is_the_templates_to_say():
    """As those of reasoning models do with the thoughts of earlier turns."""
    tokenizer = build_tokenizer(PLAIN.replace("m.content", "m.content.split('</think>')[-1]"))
    put_in = {"role": "assistant", "content": "<think>hm</think>fine"}
    user = {"role": "user", "content": "x"}
    tail = tokenizer.decode(splice(tokenizer, [user, sampled([1], [2]), put_in, user])[2:])
    assert "assistant\nfine<|im_end|>" in tail and "hm" not in tail


def test_a_template_that_drops_the_sampled_turn_is_a_token_mismatch():
    messages = [{"role": "user", "content": "x"}, sampled([1], [2]), {"role": "user", "content": "y"}]
    with pytest.raises(TokenMismatch, match=r"messages\[1\] once, it did 0 times"):
        splice(build_tokenizer(FORGETFUL), messages)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": "x"}], "needs an assistant message with prompt_token_ids"),
        ([{"role": "assistant", "content": "x", "generation_token_ids": [1]}], "no prompt_token_ids"),
        ([sampled([1], [2]), {"role": "user", "content": [{"type": "image_url"}]}], "type 'image_url'"),
        (
            [sampled([1], [2]), {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 2}],
            "one call a turn",
        ),
    ],
)
def test_conversations_that_cannot_be_spliced_are_value_errors_that_say_why(messages, text):
    with pytest.raises(ValueError, match=text):
        splice(build_tokenizer("llama3"), messages)


def test_sampling_ends_at_eos_and_at_the_templates_end_of_turn():
    tokenizer = build_tokenizer("plain")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_ids(tokenizer) == [end]
    base = build_tokenizer("plain", True)
    base.eos_token = "<think>"
    assert end_of_turn_ids(base) == sorted(base.convert_tokens_to_ids(["<|im_end|>", "<think>"]))
    base.eos_token = "<|im_end|>"


def with_templates(**templates: str):
    """A tokenizer with named chat templates: transformers takes "tool_use" where there are tools."""
    tokenizer = copy.deepcopy(build_tokenizer("plain"))
    tokenizer.chat_template = templates
    return tokenizer


def test_sampling_ends_at_the_end_of_turn_of_the_template_for_tools_too():
    tokenizer = with_templates(default=PLAIN, tool_use=PLAIN.replace("<|im_end|>", "</tool_call>"))
    assert end_of_turn_ids(tokenizer) == sorted(
        tokenizer.convert_tokens_to_ids(["<|im_end|>", "</tool_call>"])
    )


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        # Roles must alternate from the user's on, as in Mistral's and Gemma's, and the assistant's turn
        # alone is closed.
        (
            "{%- for m in messages %}{%- if m.role != ('user', 'assistant')[loop.index0 % 2] %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}"
            "{{- m.content }}{% if m.role == 'assistant' %}{{ '</think>' }}{% endif %}{% endfor %}",
            ["<|im_end|>", "</think>"],
        ),
        # Nothing closes a turn, and the next one begins with a special token.
        (
            "{%- for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
            ["<|im_end|>"],
        ),
        # Two special tokens: the first one is sampled, and then nothing more.
        (
            "{%- for m in messages %}{{ m.content + '</think><think>' }}{% endfor %}",
            ["<|im_end|>", "</think>"],
        ),
    ],
)
def test_what_ends_a_turn_is_the_first_token_behind_what_the_assistant_says(template, ends):
    tokenizer = build_tokenizer(template)
    assert end_of_turn_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(ends))


def test_no_conversation_contains_the_sentinel_by_chance():
    assert len(SENTINEL) > 32


GOOD = [Turn([1, 2], [3, 4], [-0.1, 0.0]), Turn([1, 2, 3, 4, 5], [6], [-2.0])]


def test_good_turns_pass():
    verify_turns(GOOD, 7)
    verify_turns([Turn([1], [2], [1e-6])], 7)
    assert flatten(GOOD) == ([1, 2], [3, 4, 5, 6], [1, 1, 0, 1], [-0.1, 0.0, 0.0, -2.0])


def test_a_digest_tells_lists_of_ids_apart_and_refuses_what_is_no_id():
    parts = [([1, 2], [3]), ([1], [2, 3]), ([1, 2, 3],), ([1, 2], [3], []), ([2**40], [3])]
    assert len({ids_digest(*of_parts) for of_parts in parts}) == len(parts)
    joined = (
        b"".join(number.to_bytes(8, "little") for number in (7, 5))
        + b"/"
        + (-1).to_bytes(8, "little", signed=True)
    )
    assert ids_digest([7, 5], [-1]) == hashlib.blake2b(joined, digest_size=16).digest()
    for ids in (["7"], [7.0], [None]):
        with pytest.raises(TypeError):
            ids_digest([5], ids)


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([], "at least one turn"),
        ([Turn([], [1], [0.0])], "turn 0: prompt_ids must not be empty"),
        ([Turn([1], [], [])], "turn 0: completion_ids must not be empty"),
        ([GOOD[0], Turn([1, 2, 3, 9], [6], [-2.0])], r"turn 1: .* turn 0; at position 3 expected 4, got 9"),
        ([GOOD[0], Turn([1, 2, 3], [6], [-2.0])], "at position 3 expected 4, got the end of the prompt"),
        ([Turn([1], [2, 3], [0.0])], r"as many as completion_ids \(2\), got 1"),
        ([Turn([1], [2], [math.nan])], r"logprobs\[0\] must be finite and <= 0, got nan"),
        ([Turn([1], [2], [-math.inf])], r"logprobs\[0\] .* -inf"),
        ([Turn([1], [2], [0.5])], r"logprobs\[0\] .* 0.5"),
        ([Turn([1], [2], [None])], r"logprobs\[0\] .* None"),
        ([Turn([1], [2, 10], [0.0, 0.0])], r"completion_ids\[1\] must be an int in \[0, 10\), got 10"),
        ([Turn([1, -1], [2], [0.0])], r"prompt_ids\[1\] .* -1"),
        ([Turn([1, True], [2], [0.0])], r"prompt_ids\[1\] .* True"),
        ([Turn([1, 2.0], [2], [0.0])], r"prompt_ids\[1\] .* 2.0"),
        ([GOOD[0], Turn([1, 2, 3, 4, 10, 5], [6], [-2.0])], r"turn 1: prompt_ids\[4\] .* got 10"),
        ([GOOD[0], Turn([1, 2, 3, 4, True], [6], [-2.0])], r"turn 1: prompt_ids\[4\] .* True"),
        ([GOOD[0], Turn([1, -2, 9], [6], [-2.0])], r"turn 1: prompt_ids\[1\] .* -2"),
    ],
)
def test_turns_that_contradict_each_other_are_a_token_mismatch_that_says_where(turns, text):
    with pytest.raises(TokenMismatch, match=text):
        verify_turns(turns, 10)


def test_the_prompt_has_the_tools_that_the_request_names_and_ends_where_the_reply_begins():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}]
    system = "<|im_start|>system\nBe brief."
    tools = f"\n# Tools\n{json.dumps(TOOLS[0])}\n<|im_end|>\n"
    user = "<|im_start|>user\nGo.<|im_end|>\n"
    tokenizer = build_tokenizer("qwen2_5")
    assert render(tokenizer, messages, TOOLS) == system + tools + user + "<|im_start|>assistant\n"
    assert render(tokenizer, messages, []) == system + "<|im_end|>\n" + user + "<|im_start|>assistant\n"
    assert render(tokenizer, messages, TOOLS, add_generation_prompt=False) == system + tools + user
    spoken = [*messages, sampled([1], [2]), {"role": "user", "content": "On."}]
    behind_a_user = build_tokenizer(TOOLS_BEHIND_THE_LAST_USER)
    tail = behind_a_user.decode(splice(behind_a_user, spoken, TOOLS, {"mark": "!"})[2:])
    assert tail.endswith("On." + json.dumps(TOOLS[0]) + "!"), "of a template that shows them late"


TOOLS_BEHIND_THE_LAST_USER = """{%- for m in messages %}{{ m.role + ': ' + m.content }}
{%- if loop.last and tools %}{{ tools[0] | tojson }}{% endif %}{% endfor %}{{ mark }}"""


def test_parts_are_joined_with_newlines_and_what_a_template_knows_of_a_message_reaches_it():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    shown = build_tokenizer(
        "{%- for m in messages %}{{ m.role ~ '|' ~ m.content ~ '|' ~ m.name ~ '|' ~ m.tool_call_id ~ '|' ~ "
        "m.reasoning_content ~ '|' ~ m.reasoning ~ '|' ~ m.tool_calls[0].function.arguments.q ~ '|' ~ "
        "(m.prompt_token_ids is defined) }}\n{% endfor %}"
    )
    call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"q": 7}'}}
    message = {"name": "n", "tool_call_id": "t", "reasoning_content": "hm", "reasoning": "aha"}
    messages = [sampled([1], [2], content=parts, tool_calls=[call], **message)]
    assert render(shown, messages).strip() == "assistant|one\ntwo|n|t|hm|aha|7|False"


def test_a_developer_stays_one_where_the_template_knows_the_role():
    template = "{%- for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    messages = [{"role": "developer", "content": "Be brief."}]
    assert render(build_tokenizer(template), messages) == "[system]Be brief."
    knows = template + "{# developer #}"
    assert render(build_tokenizer(knows), messages) == "[developer]Be brief."


def test_whether_the_role_is_known_is_said_by_the_template_that_the_tools_choose():
    plain = "{%- for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    knows = plain + "{# developer #}"
    messages = [{"role": "developer", "content": "Be brief."}]
    for default, tool_use in ((plain, knows), (knows, plain)):
        tokenizer = with_templates(default=default, tool_use=tool_use)
        for tools, template in ((None, default), ([], default), (TOOLS, tool_use)):
            role = "developer" if template == knows else "system"
            assert render(tokenizer, messages, tools) == f"[{role}]Be brief."


def test_a_template_gets_what_a_message_says_in_the_order_in_which_it_says_it():
    tokenizer = build_tokenizer("{{- messages[0] | tojson }}")
    for message in (
        {"role": "user", "content": "x", "name": "n"},
        {"content": "x", "name": "n", "role": "user"},
    ):
        assert render(tokenizer, [message]) == json.dumps(message)


def test_rendered_text_gets_no_special_tokens_but_those_that_the_template_wrote():
    tokenizer = copy.deepcopy(build_tokenizer("plain"))
    begin = tokenizer.convert_tokens_to_ids("<think>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<think> $A", special_tokens=[("<think>", begin)]
    )
    assert tokenizer.encode("x")[0] == begin, "as Llama's and Gemma's do"
    assert begin not in encode(tokenizer, "x<|im_end|>")
    messages = [sampled([1], [2]), {"role": "user", "content": "x"}]
    assert begin not in splice(tokenizer, messages)


@pytest.mark.parametrize(
    ("closing", "is_end"),
    [("<|im_end|>", True), (" \n<|im_end|>", True), ("\n", False), (" The end.", False), ("</s>", False)],
)
def test_only_a_special_token_that_closes_a_turn_ends_a_generation(closing, is_end):
    """An ordinary token, such as a newline, would end a reply at its first line."""
    tokenizer = copy.copy(
        build_tokenizer(
            "{%- for m in messages %}{{ m.role + ': ' + m.content + '" + closing + "' }}{% endfor %}"
        )
    )
    tokenizer.eos_token = "<think>"
    eos = tokenizer.convert_tokens_to_ids("<think>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_ids(tokenizer) == sorted([eos, end] if is_end else [eos])
    tokenizer.eos_token = None
    assert end_of_turn_ids(tokenizer) == ([end] if is_end else [])


def test_a_template_that_refuses_a_conversation_of_two_leaves_the_tokenizers_own_end():
    tokenizer = build_tokenizer("{{ raise_exception('no') }}")
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("position", range(4))
def test_every_id_of_the_turn_before_is_compared(position):
    prompt = [1, 2, 3, 4, 5]
    prompt[position] = 6
    with pytest.raises(TokenMismatch, match=rf"turn 1: .* at position {position} expected .*, got 6"):
        verify_turns([GOOD[0], Turn(prompt, [6], [-2.0])], 7)
    third = Turn([1, 2, 3, 4, 5, 6, 0], [1], [-1.0])
    verify_turns([*GOOD, third], 7)
    third.prompt_ids[position] = 0
    with pytest.raises(TokenMismatch, match=rf"turn 2: .* of turn 1; at position {position} "):
        verify_turns([*GOOD, third], 7)


def test_a_certain_token_may_be_above_zero_by_rounding_and_no_more():
    for logprob in (1e-5, 0, 0.0, -1, -1e30):
        verify_turns([Turn([1], [2], [logprob])], 7)
    for logprob in (1.1e-5, math.inf, "0"):
        with pytest.raises(TokenMismatch):
            verify_turns([Turn([1], [2], [logprob])], 7)


def test_what_came_after_counts_as_shown_only_behind_the_sampled_turn_and_may_be_escaped():
    """The same text stands before it: that the template drops the second one must not go unnoticed."""
    each = "{%- for m in messages %}ONE{% endfor %}"
    drops = each.replace("ONE", "{% if m.role != 'tool' or loop.first %}{{ m.content }}{% endif %}")
    result = tool_message("found", 0)
    with pytest.raises(TokenMismatch, match=r"leaves out or changes the tool message at messages\[2\]"):
        splice(build_tokenizer(drops), [result, sampled([1], [2]), result])
    as_json = (
        "{%- for m in messages %}{{ m.content if m.content == sentinel else m.content | tojson }}{% endfor %}"
    )
    said = [sampled([1], [2]), tool_message('é "x"\n', 0)]
    tokenizer = build_tokenizer(as_json)
    assert tokenizer.decode(splice(tokenizer, said, None, {"sentinel": SENTINEL})[2:]) == '"é \\"x\\"\\n"'
