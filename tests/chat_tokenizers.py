"""Small real tokenizers with chat templates of the kinds that models ship, written for these tests."""

# ruff: noqa: E501 (templates read better unbroken)

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]

TEXTS = [
    "You are a helpful assistant. Solve the puzzle, and answer with the grid.\n\n",
    "Which mails came from the manager today? Look them up, then delete them.\n",
    '{"name": "search_emails", "arguments": {"query": "manager", "limit": 3}}\n',
    "user\nassistant\nsystem\ntool\nipython\n\n",
    "naïve façade, 東京, Привет, 🙂 👩‍👩‍👧 and the rest\n",
    "The answer is 1 2 3 4\n2 1 4 3\n" * 3,
]

PLAIN = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen2.5's kind: tools in the system turn, calls as JSON lines, tool results gathered in one user turn.
QWEN2_5 = """{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') + '\\n# Tools\\n' }}
{%- for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + m.content }}
{%- for c in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- (c.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen3's kind: reasoning shown only behind the last user message, an empty thought written ahead where it is off.
QWEN3 = (
    QWEN2_5.replace(
        "{%- if tools %}",
        "{%- set ns = namespace(last=-1) %}"
        "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{%- if tools %}",
        1,
    )
    .replace(
        "{{- '<|im_start|>assistant\\n' + m.content }}",
        "{{- '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.last and m.reasoning_content %}"
        "{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{- m.content }}",
    )
    .replace(
        "{{- '<|im_start|>assistant\\n' }}{% endif %}",
        "{{- '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
    )
)

# Llama 3's kind: a header for each turn, content trimmed, one call at most, tool results from "ipython".
LLAMA3 = """{{- bos_token }}
{%- for m in messages %}
{%- set header = '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call a turn') }}{% endif %}
{{- header + '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '}' }}
{%- else %}{{- header + m.content | trim }}{% endif %}
{{- '<|eot_id|>' }}
{%- if loop.first and tools %}{{- header }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Forgets every assistant turn but the last message.
FORGETFUL = PLAIN.replace(
    "{{ '<|im_start|>'",
    "{% if m.role == 'assistant' and not loop.last %}{% continue %}{% endif %}{{ '<|im_start|>'",
)

# Shows a tool's result only where the message before it made the call, as gpt-oss and Gemma 4 do.
ONLY_BEHIND_CALLS = """{%- for m in messages %}
{%- if m.role == 'tool' %}{% if loop.previtem.tool_calls %}{{- '[' + loop.previtem.tool_calls[0].function.name + '] ' + m.content + '<|im_end|>\n' }}{% endif %}
{%- elif m.role == 'assistant' and m.tool_calls %}{{- '<|im_start|>assistant\n' + (m.tool_calls[0].function.arguments | tojson) + '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# The same with the call's name found by its id, and no text beside calls, as Mistral's.
NAMES_CALLS_BY_ID = """{%- set ns = namespace(calls=[]) %}{%- for m in messages %}
{%- if m.role == 'tool' %}{% for c in ns.calls if c.id == m.tool_call_id %}{{- '[' + c.function.name + '] ' + m.content + '<|im_end|>' }}{% endfor %}
{%- elif m.role == 'assistant' and m.tool_calls %}{% set ns.calls = m.tool_calls %}
{%- if m.content %}{{ raise_exception('text or calls, not both') }}{% endif %}
{%- for c in m.tool_calls %}{{- c.function.arguments | tojson }}{% endfor %}{{- '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Tool calls in a form that no response template is known for.
MISTRAL_LIKE = """{%- if tools %}[AVAILABLE_TOOLS]{{ tools|tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls|tojson }}{% endif %}{{ '<|im_end|>' }}{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"""

TEMPLATES = {"plain": PLAIN, "qwen2_5": QWEN2_5, "qwen3": QWEN3, "llama3": LLAMA3}


@cache
def build_tokenizer(template: str, merges_cross_spaces: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE over TEXTS. With merges_cross_spaces the text is not split into words first."""
    tokenizer = Tokenizer(models.BPE())
    if merges_cross_spaces:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\n+"), "merged_with_previous"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    is_llama = template == "llama3"
    special = LLAMA_TOKENS if is_llama else CHATML_TOKENS[:2]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>" if is_llama else None,
        eos_token="<|eot_id|>" if is_llama else "<|im_end|>",
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    if not is_llama:
        fast.add_tokens(CHATML_TOKENS[2:])
    fast.chat_template = TEMPLATES.get(template, template)
    return fast
