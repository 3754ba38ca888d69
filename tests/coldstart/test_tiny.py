"""The tiny policy's tokenizer, template and (once shipped) weights."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gymexp.coldstart.tiny import ASSETS, boilerplate, build_model, build_tokenizer, chat_template, render
from gymexp.config.schema import ModelConfig
from gymexp.policy.model import end_token_ids, load_model, load_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"desk_{verb}_record",
            "description": f"Call this one to {verb} a record of the front desk.",
            "parameters": {
                "type": "object",
                "properties": {"record_id": {"type": "string", "description": "Its id"}},
                "required": ["record_id"],
            },
        },
    }
    for verb in ("find", "drop", "sort")
]


def conversation(record: str, system: str = "The desk opens at nine; be brief and exact.") -> list[dict]:
    call = {"name": "desk_find_record", "arguments": json.dumps({"record_id": record})}
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Where is record {record}, from the 2023-11-30 list?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": json.dumps({"output": [{"record_id": record, "shelf": "b 4"}]})},
        {"role": "assistant", "content": "On shelf b 4."},
    ]


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    texts = [render(conversation(f"{rng.randrange(1000):08d}"), TOOLS) for _ in range(40)]
    return build_tokenizer(texts, vocab_size=700)


@pytest.fixture(scope="module")
def shipped():
    if not (ASSETS / "config.json").exists():
        pytest.skip("no weights yet")
    return ModelConfig(name="tiny", path="gymexp/assets/tiny", dtype="float32")


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def pieces(tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]


def test_sudoku_cells_are_the_same_token_wherever_they_stand(tokenizer):
    rows = ["1 _ _ 4", "_ _ 2 _", "3 _ 1 _", "_ 2 _ 3"]
    board = "\n".join(rows)
    cells = [cell + sep for row in rows for cell, sep in zip(row.split(), "   \n", strict=True)]
    cells[-1] = cells[-1].strip()
    assert pieces(tokenizer, board) == cells
    among_text = pieces(tokenizer, f"Solve this:\n{board}\nNow.")
    first = among_text.index("1 ")
    assert among_text[first : first + 16] == [*cells[:15], cells[15] + "\n"]


def test_digits_stand_alone(tokenizer):
    assert pieces(tokenizer, "00000057") == ["00000", "0", "5", "7"]
    assert pieces(tokenizer, '"4711"')[1:5] == ["4", "7", "1", "1"]
    assert pieces(tokenizer, "2023-11-30")[-5:] == ["1", "1", "-", "3", "0"]


def test_a_word_is_the_same_token_after_a_quote_and_after_a_space(tokenizer):
    quoted, spaced = pieces(tokenizer, '"record of'), pieces(tokenizer, "the record of")
    assert quoted[-len(spaced[-2:]) :] == spaced[-2:]


def test_lines_of_every_prompt_are_one_token_each(tokenizer):
    ids = tokenizer.encode(render(conversation("00000123")[:2], TOOLS))
    assert len(ids) < 60
    assert tokenizer.decode(ids) == render(conversation("00000123")[:2], TOOLS)


def test_boilerplate_leaves_out_what_assistants_and_tools_say():
    found = boilerplate([render(conversation("00000001"), TOOLS)] * 20)
    assert any("desk_find_record" in line and "function" in line for line in found)
    assert not any("shelf" in line or "00000001" in line for line in found if "Where" not in line)


def test_tools_render_the_same_whatever_their_key_order_and_strictness():
    def turned(value):
        return {k: turned(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

    other = [turned(tool) for tool in TOOLS]
    for tool in other:
        tool["function"]["strict"] = False
    flat = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    messages = conversation("00000001")
    assert render(messages, TOOLS) == render(messages, other) == render(messages, flat)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_fewer_messages_render_to_a_prefix_of_more(tokenizer, tools):
    messages = [*conversation("00000001"), *conversation("00000002")[1:]]
    messages[4]["reasoning_content"] = "It was found."
    whole = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    for k in range(1, len(messages) + 1):
        start = tokenizer.apply_chat_template(messages[:k], tools=tools, return_dict=False)
        assert whole[: len(start)] == start
        if k < len(messages) and messages[k]["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                messages[:k], tools=tools, return_dict=False, add_generation_prompt=True
            )
            assert whole[: len(prompt)] == prompt


def test_only_what_the_assistant_wrote_is_marked(tokenizer):
    encoded = tokenizer.apply_chat_template(
        conversation("00000123"), tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, said in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if said]
    call = '{"name": "desk_find_record", "arguments": {"record_id": "00000123"}}'
    assert tokenizer.decode(marked) == (f"<tool_call>\n{call}\n</tool_call><|im_end|>On shelf b 4.<|im_end|>")


def test_a_sampled_call_is_parsed(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(_directory(tmp_path))
    prompt = again.apply_chat_template(
        conversation("00000123")[:2], tools=TOOLS, return_dict=False, add_generation_prompt=True
    )
    call = '{"name": "desk_find_record", "arguments": {"record_id": "00000123"}}'
    text = f"I look.\n<tool_call>\n{call}\n</tool_call><|im_end|>"
    message = again.parse_response(again.encode(text), prefix=prompt)
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "desk_find_record", "arguments": {"record_id": "00000123"}}}
    ]


def _directory(path) -> ModelConfig:
    (path / "config.json").write_text('{"model_type": "qwen3"}')
    return ModelConfig(name="x", path=str(path))


def test_content_may_come_in_parts(tokenizer):
    parts = [{"type": "text", "text": text} for text in "ab"]
    assert render([{"role": "user", "content": parts}]) == render([{"role": "user", "content": "ab"}])


def test_a_built_model_is_small_and_ends_where_the_tokenizer_says(tokenizer):
    model = build_model(tokenizer)
    assert 1e6 < model.num_parameters() < 4e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_shipped_model_loads_in_float32_and_is_small(shipped):
    model = load_model(shipped)
    assert {p.dtype.__str__() for p in model.parameters()} == {"torch.float32"}
    assert 1e6 <= model.num_parameters() <= 4e6
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= 8 * 2**20
    tokenizer = load_tokenizer(shipped)
    assert end_token_ids(tokenizer, str(ASSETS)) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


SUDOKU = """In 4x4 Mini Sudoku:
- Each row must contain each number from 1-4 exactly once
- Each column must contain each number 1-4 exactly once
- Each 2x2 subgrid must contain each number 1-4 exactly once
Solve this 4x4 Mini Sudoku puzzle:
_ _ 3 _
4 _ 2 _
1 _ _ 3
_ _ _ _
Format your response as the puzzle above, with spaces separating each number within a row, \
and newlines separating rows.
"""


def test_the_shipped_tokenizer_makes_a_sudoku_prompt_short(shipped):
    tokenizer = load_tokenizer(shipped)
    messages = [{"role": "user", "content": SUDOKU}]
    assert len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)) < 40


def test_the_shipped_template_is_the_one_in_use(shipped):
    assert load_tokenizer(shipped).chat_template == chat_template()
