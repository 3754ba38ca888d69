import json

import pytest
from chat_tokenizers import MISTRAL_LIKE, build_tokenizer
from trl import chat_template_utils as trl_templates
from trl.chat_template_utils import add_response_schema, llama3_1_chat_template, qwen3_5_think_chat_template

from gymexp.gateway.reply import ReplyParser, known_response_template
from gymexp.rollout.tokens import encode, end_of_turn_ids, render

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
a_tokenizer = build_tokenizer.__wrapped__  # of its own, to be changed


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


TRLS = sorted(
    name
    for name, value in vars(trl_templates).items()
    if name.endswith("_chat_template")
    and not name.endswith("_training_chat_template")
    and isinstance(value, str)
)
# Templates that show no call, or none that TRL has a format for, or that want what no text model has.
UNREADABLE = """
    cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 idefics3 lfm2 llama3 llava_next muse_glimmer
    phi3 phi3_5 qwen2_5_vl smolvlm
"""


@pytest.mark.parametrize("name", TRLS)
def test_a_call_is_read_as_the_chat_template_writes_it(name):
    """The template itself says what a policy that has learnt it would sample."""
    tokenizer = a_tokenizer(vars(trl_templates)[name])
    tokenizer.bos_token = "<think>"  # some templates want one; any token serves
    parser = ReplyParser(tokenizer)
    if name.removesuffix("_chat_template") in UNREADABLE.split():
        assert not parser.reads_calls
        return
    call = {"name": "search", "arguments": {"q": "naïve façade 7", "limit": 3}}
    said = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]
    whole = render(tokenizer, said, TOOLS, add_generation_prompt=False)
    prompt = render(tokenizer, USER, TOOLS)
    start = next(at for at, letter in enumerate(whole) if prompt[at : at + 1] != letter)
    assert parser.reads_calls
    reply = parser.parse(encode(tokenizer, whole[start:]), encode(tokenizer, whole[:start]), TOOLS)
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reply.tool_calls] == [
        ("search", call["arguments"])
    ]


def test_a_template_that_writes_calls_as_one_that_is_known_is_read_too():
    template = qwen3_5_think_chat_template.replace("You have access", "These are at hand: you have access")
    assert template != qwen3_5_think_chat_template
    assert ReplyParser(build_tokenizer(template)).reads_calls


def test_calls_that_are_written_in_an_unknown_way_are_not_read():
    assert not ReplyParser(build_tokenizer(MISTRAL_LIKE)).reads_calls
    assert not ReplyParser(build_tokenizer("plain")).reads_calls
    assert ReplyParser(build_tokenizer("llama3")).reads_calls


def test_of_several_chat_templates_the_one_for_tools_says_how_calls_are_read_and_where_turns_end():
    tokenizer = a_tokenizer("llama3")
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|python_tag|>' }}{% endfor %}"
    tokenizer.chat_template = {"default": plain, "tool_use": tokenizer.chat_template}
    assert arguments(parse(tokenizer, '{"name": "search", "parameters": {"q": "a"}}<|eot_id|>')) == [
        {"q": "a"}
    ]
    assert parse(tokenizer, '{"name": "search", "parameters": {}}<|eot_id|>', tools=None).tool_calls == []
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|python_tag|>")]
    assert end_of_turn_ids(tokenizer) == sorted(ends)
    tokenizer.chat_template = {"default": plain, "tool_use": plain}
    assert not ReplyParser(tokenizer).reads_calls


def test_a_developer_becomes_a_system_where_the_template_that_is_used_has_none():
    tokenizer = a_tokenizer("plain")
    knows = "{% for m in messages %}{{ m.role }} {% endfor %}{# developer #}"
    tokenizer.chat_template = {
        "default": "{% for m in messages %}{{ m.role }} {% endfor %}",
        "tool_use": knows,
    }
    said = [{"role": "developer", "content": "x"}]
    assert render(tokenizer, said) == "system " and render(tokenizer, said, TOOLS) == "developer "
