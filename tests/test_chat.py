"""Chat templates: what transformers renders, and what a hostile template does not get."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lococo_runtime import ChatTemplateError, CorruptError, InvalidArgumentError
from lococo_runtime import _chat_template as chat
from lococo_runtime._chat_template import ChatTemplate

ROOT = Path(__file__).parents[1]
SMOLLM2 = Path(os.environ.get("LOCOCO_SMOLLM2", ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"))

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# The shapes that published templates have: written for this test, after the formats they stand for.
TEMPLATES = {
    "chatml": """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "inst": """{% if messages[0]['role'] == 'system' %}
{%- set rest = messages[1:] %}{% set system = messages[0].content %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}
    {%- else %}{% set text = m.content %}{% endif %}
    {%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    "headers": """{{- bos_token }}
{%- if not date is defined %}{% set date = strftime_now('%Y') %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYear: ' + date + '\\n' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "roles-renamed": """{{ bos_token }}{% for m in messages %}
    {% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {% if role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
<start_of_turn>{{ role }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
""",
    "tools": """{%- macro show(x, depth=0) %}{{ '  ' * depth }}{% if x is mapping %}
{%- for k, v in x.items() %}{{ k }}: {{ show(v, depth + 1) }};{% endfor %}
{%- else %}{{ x | tojson }}{% endif %}{% endmacro %}
{%- set ns = namespace(last=0, calls=[]) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '# Tools\\n' }}{% for t in tools %}{{ t | tojson }}
{{ t | tojson(indent=2) }}
{{ show(t) }}
{% endfor %}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}<tool>{{ m.content }}</tool>
    {%- elif m.tool_calls is defined %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}
    {%- else %}<{{ m.role }}{{ ' last' if loop.index0 == ns.last }}>{{ m.content }}{% endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
{% endfor %}{{ documents | length if documents }}""",
    "parts": """{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}
{%- for p in m.content %}{{ p.text if p.type == 'text' }}{% endfor %}{% endif %}
{{ m.reasoning_content | default('-') }}|{{ m.thinking | default('-') }}|{{ m.name is defined }}
{% endfor %}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}
  {{ m.content }}{{ eos_token }}
{% endgeneration %}
{% else %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% continue %}{% endif %}
!{% endfor %}{{ enable_thinking is defined and enable_thinking }}{{ 7 // 2 ** 1 + 3 * 2 - 1 }}{{ '-' * 3 }}""",
}  # fmt: skip

TURNS = [
    {"role": "user", "content": "  Hi <b>&\"'</b>\n"},
    {"role": "assistant", "content": "Hello,\n\n  naïve 漢字 👩‍👩‍👧 "},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": TURNS[:1],
    "three": TURNS,
    "system": [{"role": "system", "content": "Be brief."}, *TURNS],
    "two-users": [TURNS[0], TURNS[0]],
    "ends-with-assistant": TURNS[:2],
    "tool-calls": [
        TURNS[0],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"ä": [1, 2.5, None]}}}],
        },
        {"role": "tool", "content": "12", "name": "f"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "reasoning": [TURNS[0], {"role": "assistant", "content": "4", "reasoning": "2+2"}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]


def reference(template: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=_words(), chat_template=template, **SPECIAL)


def _words() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))


@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS, "documents": [{"title": "t", "text": "x"}]}, {"date": "7"}])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str, conversation: str, prompt: bool, variables: dict[str, Any]) -> None:
    messages = CONVERSATIONS[conversation]
    lists = {k: v for k, v in variables.items() if k in ("tools", "documents")}
    others = {k: v for k, v in variables.items() if k not in lists}
    tokenizer = reference(TEMPLATES[name])
    ours = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL)
    try:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)
    except Exception:  # the template refuses this conversation: with whatever Python raises
        with pytest.raises(ChatTemplateError, match=r"must alternate|not supported|Error"):
            ours.render(messages, add_generation_prompt=prompt, variables=others, **lists)
    else:
        assert ours.render(messages, add_generation_prompt=prompt, variables=others, **lists) == expected


@pytest.mark.smollm2
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing: run scripts/fetch_smollm2.py")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_smollm2_template_and_tokens(conversation: str) -> None:
    from lococo_runtime.llm import load_tokenizer
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SMOLLM2)
    ours = ChatTemplate.from_bundle(SMOLLM2)
    assert ours.special_tokens == theirs.special_tokens_map
    try:
        expected = theirs.apply_chat_template(CONVERSATIONS[conversation], tokenize=False, add_generation_prompt=True)
    except Exception:
        with pytest.raises(ChatTemplateError):
            ours.render(CONVERSATIONS[conversation])
        return
    text = ours.render(CONVERSATIONS[conversation])
    assert text == expected
    ids = theirs.apply_chat_template(CONVERSATIONS[conversation], add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(SMOLLM2).encode(text, add_special_tokens=False).ids == ids


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "does it end"),
        ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError|does it end"),
        ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "RecursionError"),
        ("{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}", "does it end"),
        ("{{ range(10000000) }}", "OverflowError"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "number"),
        ("{{ 9 ** 9999999 }}", "power"),
        ("{{ 9999999999999 }}", "number"),
        ("{{ 'x' * (9999999 * 999) }}", "number"),
        ("{{ 'x' * 9999999 * 999 }}", "number"),
        ("{{ 'x'.center('9999999999' | int) }}", "number"),
        (
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "a value of|does it end",
        ),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "a value of|does it end",
        ),
        ("{% set x = 'x' * 60000 %}{% for i in range(99999) %}{{ x }}{% endfor %}", "characters|does it end"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError|Undefined"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('no') }}", "no$"),
        ("{{ nowhere.field }}", "UndefinedError"),
        ("{% include 'x' %}", "TypeError|Template"),
        ("\n{% for %}", "line 2"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ [][5].x }}", "Undefined"),
        ("(" * 5 + "{{ " + "(" * 100_000, "RecursionError|Syntax"),
    ],
)
def test_hostile_templates_end_in_a_typed_error(template: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_TIME_LIMIT_S", 0.3)
    with pytest.raises(ChatTemplateError, match=says):
        ChatTemplate({"default": template}, {}).render(TURNS)
    assert ChatTemplate({"default": "{{ messages | length }}"}, {}).render(TURNS) == "3"


def test_templates_come_from_the_jinja_file_first(tmp_path: Path) -> None:
    def read(config: object, jinja: str | None = None, special: object = None) -> ChatTemplate:
        for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (tmp_path / name).write_text(json.dumps(value)) if value is not None else (tmp_path / name).unlink(True)
        (tmp_path / "chat_template.jinja").write_text(jinja) if jinja else None
        return ChatTemplate.from_bundle(tmp_path)

    bos = {"content": "<s>", "special": True}
    named = [{"name": "default", "template": "d{{ bos_token }}"}, {"name": "tool_use", "template": "t"}]
    template = read({"chat_template": named, "bos_token": bos})
    assert (template.render(TURNS), template.render(TURNS, tools=TOOLS)) == ("d<s>", "t")
    assert read({"chat_template": "c", "bos_token": None}, special={"eos_token": bos}).special_tokens == {
        "eos_token": "<s>"
    }
    with pytest.raises(ChatTemplateError, match="tool_use"):
        read({"chat_template": named[1:]}).render(TURNS)
    with pytest.raises(CorruptError, match="chat_template"):
        read({"chat_template": [1]})
    with pytest.raises(CorruptError, match="object"):
        read([1])
    with pytest.raises(ChatTemplateError, match="none"):
        read(None).render(TURNS)
    assert read({"chat_template": "c"}, jinja="j").render(TURNS) == "j"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CorruptError, match="JSON"):
        ChatTemplate.from_bundle(tmp_path)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one"),
        ("hello", "list of dicts"),
        ({"role": "user"}, "list of dicts"),
        (["hello"], r"messages\[0\]"),
        ([{"content": "x"}], "role"),
        ([{"role": 1, "content": "x"}], "role"),
        ([{"role": "user", "content": object()}], r"messages\[0\]\.content: .*object"),
        ([{"role": "user", "content": [{"type": "text", "text": b"x"}]}], r"content\[0\]\.text"),
    ],
)
def test_messages_that_are_none(messages: Any, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        ChatTemplate({"default": TEMPLATES["chatml"]}, SPECIAL).render(messages)
