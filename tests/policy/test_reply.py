import json

import pytest
from chat_tokenizers import build_tokenizer
from trl.chat_template_utils import add_response_schema, llama3_1_chat_template, qwen3_5_think_chat_template

from gymexp.policy.reply import ReplyParser, known_response_template
from gymexp.policy.tokens import encode, render

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Finds mails.",
            "parameters": {
                "type": "object",
                "properties": {
                    "q": {"type": "string", "description": "text"},
                    "limit": {"type": "integer", "description": "how many"},
                },
                "required": ["q"],
            },
        },
    }
]
USER = [{"role": "user", "content": "x"}]


def parse(tokenizer, said, tools=TOOLS, **template_kwargs):
    prompt_ids = encode(tokenizer, render(tokenizer, USER, tools, template_kwargs))
    return ReplyParser(tokenizer).parse(encode(tokenizer, said), prompt_ids, tools)


def arguments(reply):
    return [json.loads(call["function"]["arguments"]) for call in reply.tool_calls]


@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        ('{"name": "search", "parameters": {"q": "a"}}<|eot_id|>', "", [{"q": "a"}]),
        ('<|python_tag|>{"name": "search", "parameters": {"q": "a"}}<|eot_id|>', "", [{"q": "a"}]),
        ('{"name": "search", "parameters": {"q": "a"}} and more<|eot_id|>', None, []),
        ('{"name": "search", "parameters": 3}<|eot_id|>', None, []),
        ("fine<|eot_id|>", "fine", []),
    ],
)
def test_llamas_calls_are_read(said, content, calls):
    tokenizer = build_tokenizer("llama3")
    reply = parse(tokenizer, said)
    assert arguments(reply) == calls
    assert reply.content == (said.removesuffix("<|eot_id|>") if content is None else content)


def test_what_the_template_wrote_ahead_belongs_to_the_reply():
    tokenizer = build_tokenizer("qwen3")
    assert parse(tokenizer, "fine<|im_end|>", enable_thinking=False).reasoning == ""
    tokenizer = build_tokenizer(qwen3_5_think_chat_template)
    add_response_schema(tokenizer)
    reply = parse(tokenizer, "hm, a plan\n</think>\n\nfine<|im_end|>")
    assert (reply.reasoning, reply.content) == ("hm, a plan", "fine")
    reply = parse(tokenizer, "hm, a pl")
    assert (reply.reasoning, reply.content) == ("hm, a pl", "")


def test_a_response_template_of_the_tokenizer_counts_and_types_xml_arguments_by_the_tools_schema():
    tokenizer = build_tokenizer(qwen3_5_think_chat_template)
    add_response_schema(tokenizer)
    call = "<tool_call>\n<function=search>\n<parameter=q>\n7\n</parameter>\n"
    call += "<parameter=limit>\n3\n</parameter>\n</function>\n</tool_call>"
    reply = parse(tokenizer, "hm</think>\nI look. " + call + "<|im_end|>")
    assert arguments(reply) == [{"q": "7", "limit": 3}]
    assert (reply.reasoning, reply.content) == ("hm", "I look.")


def test_text_on_both_sides_of_a_call_is_kept():
    tokenizer = build_tokenizer("qwen2_5")
    call = '<tool_call>{"name": "search", "arguments": {"q": "a"}}</tool_call>'
    reply = parse(tokenizer, f"before {call} after<|im_end|>")
    assert (reply.content, arguments(reply)) == ("before\nafter", [{"q": "a"}])


def test_a_template_without_calls_or_thoughts_gives_plain_text():
    assert known_response_template(build_tokenizer("plain").chat_template) is None
    assert known_response_template(None) is None
    assert known_response_template(llama3_1_chat_template) is not None
    assert (
        parse(build_tokenizer("plain"), "<tool_call>{}</tool_call><|im_end|>").content
        == "<tool_call>{}</tool_call>"
    )
