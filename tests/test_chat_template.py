"""Chat templates: the published ones render as Hugging Face renders them; hostile ones end in an error that says so."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llama_export.bundle.bundle import Bundle
from llama_export.errors import ConfigError, ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.runtime import chat_template
from llama_export.runtime.chat_template import ChatTemplate

Messages = list[dict[str, Any]]

ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."
# The published templates, as they stand in each checkpoint's tokenizer_config.json.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_1 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\n\n"}}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You have access to the following functions. To call a function, please respond with JSON for a function call." }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{#- Custom tools are passed in a user message with some extra guidance #}
{%- if tools_in_user_message and not tools is none %}
    {#- Extract the first user message so we can plug it in here #}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Given the following functions, please respond with a JSON for a function call " }}
    {{- "with its proper arguments that best answers the given prompt.\n\n" }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- "<|python_tag|>" + tool_call.name + ".call(" }}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' + arg_val + '"' }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- endif %}
                {%- endfor %}
            {{- ")" }}
        {%- else  %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- endif %}
        {%- if builtin_tools is defined %}
            {#- This means we're in ipython mode #}
            {{- "<|eom_id|>" }}
        {%- else %}
            {{- "<|eot_id|>" }}
        {%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"
    "\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_TOOLS = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
            {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""
# Not published: every corner of Jinja that templates on the Hub use.
CORNERS = r"""{%- macro line(role, text='') -%}
{{ role ~ ': ' ~ text ~ 1 ~ none ~ undefined_name }}
{%- endmacro -%}
{% set ns = namespace(count=0, seen=[]) %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index > 20 %}{% break %}{% endif %}
    {% set ns.count = ns.count + loop.length - loop.revindex %}
    {% set ns.seen = ns.seen + [message.role] %}
{{ line(message.role, text=message.content if message.content is string else message.content | tojson(ensure_ascii=true)) }}
    {% generation %}[{{ message.role | upper }}{% set inner = 1 %}]{% endgeneration %}
    {% for part in message.content if part is mapping and part.text %}
  {{ loop.index }}/{{ loop.length }} {{ part.text | replace('a', 'bb') | indent(3) }} {{ loop.previtem is defined }}
    {%- else %}
  none
    {%- endfor %}

{% endfor %}
{% set block %}{{ ns.seen | join('+') }} {{ '%s-%02d' % ('x', 7) }} {{ '%5.1f' | format(2.25) }} {{ "{:>5}|{a}".format('é', a=1) }}{% endset %}
{{ block }} {{ block | length }} {{ inner is defined }}
{{ {'b': 1, 'a': '<é>'} | tojson(indent=2, sort_keys=true, separators=(',', ': ')) }}
{{ dict(a=1) | items | list }} {{ dict.fromkeys is defined }} {{ range(3) | map('string') | join }} {{ [3, 1] | sort | first }}
{{ (messages | map(attribute='role') | unique | list) }} {{ 2 ** 10 }} {{ 'ab' * 3 }} {{ [0] * 2 }} {{ ('x', 'y') + ('z',) }}
{% for item in [[1, [2]], 3] recursive %}{{ item if item is number else '<' + loop(item) + '>' }}{{ loop.depth }}{% endfor %}
{{ messages[0].content[:3] }} {{ messages[-1].get('name', 'nobody') }} {{ messages | length == messages | count }}
{{ 'a,b'.split(',') | last }} {{ ' x '.strip() }}{{ 'x'.center(5) }}{{ 'A'.lower().zfill(3) }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 1e3 | int }}
{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{% for d in documents %}{{ d.title }}{% endfor %}{% endif %}
{{ cycler('a', 'b').next() }}{% set sep = joiner(',') %}{{ sep() }}{{ sep() }}{{ bos_token }}{{ pad_token }}{{ 'yes' if missing is defined else 'no' }}
{% filter upper %}add: {{ add_generation_prompt }}{% endfilter %}{% raw %}{{ raw }}{% endraw %} {{ "\u00e9" | e }} {{ '<b>' | escape }}
"""
TEMPLATES = {
    "llama-2": LLAMA_2, "llama-3": LLAMA_3, "llama-3.1": LLAMA_3_1, "zephyr": ZEPHYR, "smollm2": SMOLLM_2,
    "mistral": MISTRAL, "mistral-tools": MISTRAL_TOOLS, "corners": CORNERS,
}  # fmt: skip


def said(*contents: str, system: str | None = None) -> Messages:
    """User and assistant in turn, after a system message."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Says <the> "weather" & more',
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "Oslo"]}}, "required": ["city"]},
    },
}  # fmt: skip
CONVERSATIONS: dict[str, Messages] = {
    "one": said("Hello there"),
    "answered": said("Hello", "Hi! How can I help?"),
    "three": said("Hello", "Hi", "And now?"),
    "system": said("Who are you?", system="You are a pirate."),
    "system and turns": said("a", "b", "c", "d", "e", system="Be\nbrief."),
    "system alone": said(system="Only this"),
    "unicode": said("Grüße, 世界 👩🏽‍🚀 \u202e\u200d", "\ufeff ok \u2028", "é vs e\u0301", system="Ünïcode"),
    "empty": said("", "", ""),
    "blank": said("  \n\t padded \n ", "\n\n", " x "),
    "template text": said("{{ 7 * 7 }} {% raise %} {# no #}", "<|eot_id|></s>[INST]"),
    "markup": said("<b>&amp;\"quoted\" 'single' \\n</b>"),
    "carriage return": said("one\r\ntwo\rthree\n"),
    "two users": [*said("a"), *said("b")],
    "assistant first": [{"role": "assistant", "content": "I begin"}, *said("so?")],
    "late system": [*said("a", "b"), {"role": "system", "content": "late"}],
    "odd role": [{"role": "critic", "content": "hm"}],
    "call": [
        *said("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "abcdef123", "name": "weather"},
        {"role": "assistant", "content": "It rains."},
    ],
    "two calls": [*said("Weather?"), {"role": "assistant", "tool_calls": [CALL, CALL]}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "la la"}, {"type": "image"}, {"type": "text", "text": "b"}]}],
    "reasoning": [*said("why?"), {"role": "assistant", "content": "so", "reasoning": "because"}],
    "many": said(*(f"turn {index}" for index in range(40))),
}  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def folder_with(tmp_path: Path, template: object = ..., **config: Any) -> Path:
    """A folder with a tokenizer, and the template in its configuration."""
    Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")).save(
        str(tmp_path / "tokenizer.json")
    )
    stated = {} if template is ... else {"chat_template": template}
    data = {**TOKENS, "tokenizer_class": "PreTrainedTokenizerFast", **stated, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path


def of(tmp_path: Path, template: str) -> ChatTemplate:
    return ChatTemplate.from_folder(folder_with(tmp_path, template))


def check_same(folder: Path, messages: Messages, **arguments: Any) -> str | None:
    """Ours and Hugging Face's text are one, or both refuse."""
    theirs: str | None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except (TemplateError, TypeError):
        theirs = None
    try:
        ours = ChatTemplate.from_folder(folder).render(messages, **arguments)
    except ConfigError:
        ours = None
    assert ours == theirs
    return ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_render_as_hugging_face_renders_them(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, TEMPLATES[name])
    rendered = 0
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            rendered += check_same(folder, messages, add_generation_prompt=prompt) is not None
            rendered += check_same(folder, messages, add_generation_prompt=prompt, tools=[TOOL, TOOL]) is not None
    assert rendered >= 20, "too few conversations that this template takes"
    more = {
        "date_string": "01 Jan 2025",
        "custom_tools": [TOOL],
        "tools_in_user_message": False,
        "bos_token": "<other>",
    }
    check_same(folder, said("a", system="s"), add_generation_prompt=True, **more)
    check_same(folder, CONVERSATIONS["call"], add_generation_prompt=True, builtin_tools=["weather", "code_interpreter"])
    check_same(folder, said("a"), add_generation_prompt=True, documents=[{"title": "T", "text": "x"}])


def test_known_texts_of_the_published_templates(tmp_path: Path) -> None:
    """What the model cards show; Hugging Face is no witness here."""
    assert of(tmp_path, LLAMA_2).render(said("Hi", system="Be kind")) == (
        "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST]"
    )
    assert of(tmp_path, LLAMA_2).render(said("a", "b", "c")) == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]"
    assert of(tmp_path, ZEPHYR).render(said("Hi")) == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert of(tmp_path, LLAMA_3_1).render(said("Hi"), date_string="26 Jul 2024") == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


# ---- where the template comes from ------------------------------------------------------------------------------


def test_a_file_of_its_own_wins_over_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "of the configuration")
    (folder / "chat_template.jinja").write_bytes(b"{{ bos_token }}of the file: {{ messages[0].content }}\r\n")
    assert check_same(folder, said("ä")) == "<s>of the file: ä"


def test_a_template_file_needs_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("[{{ bos_token }}]{{ messages[0].role }}")
    assert ChatTemplate.from_folder(tmp_path).render(said("x")) == "[]user"


def test_templates_with_names(tmp_path: Path) -> None:
    both = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    folder = folder_with(tmp_path, both)
    assert check_same(folder, said("x")) == "D"
    assert check_same(folder, said("x"), tools=[TOOL]) == "T"
    assert ChatTemplate.from_folder(folder, "rag").render(said("x"), tools=[TOOL]) == "R"
    with pytest.raises(ConfigError, match="no chat template named 'best'") as caught:
        ChatTemplate.from_folder(folder, "best")
    assert caught.value.details["templates"] == "default, rag, tool_use"
    with pytest.raises(ConfigError, match="no chat template named 'default'"):
        ChatTemplate.from_folder(folder_with(tmp_path, both[1:]))


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}, "eos_token": None},
        {"bos_token": None, "pad_token": "</s>", "add_bos_token": True},
        {"image_token": "<image>"},
    ],
)
def test_special_tokens_are_variables(tmp_path: Path, config: dict[str, Any]) -> None:
    template = "[{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ image_token }}|{{ add_bos_token }}]"
    assert check_same(folder_with(tmp_path, template, **config), said("x"))


def test_special_tokens_of_older_checkpoints_have_a_file_of_their_own(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "{{ bos_token }}{{ eos_token }}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<unk>"}, "eos_token": "<s>"}))
    assert check_same(folder, said("x")) == "<unk><s>"
    folder_with(tmp_path, "{{ bos_token }}{{ eos_token }}", added_tokens_decoder={})
    assert ChatTemplate.from_folder(folder).render(said("x")) == "<s></s>"


def test_a_llama_tokenizer_has_tokens_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizerFast", "chat_template": "{{ bos_token + eos_token }}"})
    )
    assert ChatTemplate.from_folder(tmp_path).render(said("x")) == "<s></s>"


def test_the_template_of_a_processor_is_the_last_resort(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    assert ChatTemplate.from_folder(folder).render(said("x")) == "P"


@pytest.mark.parametrize("template", [..., None])
def test_no_template_points_to_run(tmp_path: Path, template: object) -> None:
    with pytest.raises(ConfigError, match="this model has no chat template") as caught:
        ChatTemplate.from_folder(folder_with(tmp_path, template))
    assert "run BUNDLE --prompt" in str(caught.value.hint)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "stated", [5, [], {}, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}], {"a": None}]
)
def test_a_template_of_another_type_is_refused(tmp_path: Path, stated: object) -> None:
    with pytest.raises(ConfigError, match="bad value for chat_template") as caught:
        ChatTemplate.from_folder(folder_with(tmp_path, stated))
    assert "tokenizer_config.json" in caught.value.details["file"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    for content in (b"\xff", b"x" * (2**20 + 1)):
        (folder / "chat_template.jinja").write_bytes(content)
        with pytest.raises(ConfigError, match=r"`chat_template\.jinja` cannot be read"):
            ChatTemplate.from_folder(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(ConfigError, match=r"`chat_template\.jinja` cannot be read"):
        ChatTemplate.from_folder(folder)


def test_an_export_takes_the_template_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    folder_with(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ bos_token }}T", encoding="utf-8")
    export_checkpoint(checkpoint, tmp_path / "bundle")
    assert ChatTemplate.from_folder(tmp_path / "bundle").render(said("x")) == "<s>T"


def test_a_bundle_without_a_tokenizer_has_no_template(tiny_bundles: dict[str, Bundle]) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.from_folder(tiny_bundles["float32"].folder)


# ---- errors -----------------------------------------------------------------------------------------------------


def test_a_syntax_error_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="syntax error") as caught:
        of(tmp_path, "one\n{% if %}\nthree")
    assert caught.value.details["line"] == "2"
    assert caught.value.exit_code == 2


def test_a_template_that_python_cannot_compile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be compiled|syntax error"):
        of(tmp_path, "{% if x %}" * 200 + "{% endif %}" * 200)
    with pytest.raises(ConfigError, match=r"cannot be compiled|syntax error"):
        of(tmp_path, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


def test_the_templates_own_refusal_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        of(tmp_path, LLAMA_2).render(CONVERSATIONS["two users"])
    assert caught.value.message == f"the chat template refuses this conversation: {ALTERNATE}"
    assert caught.value.exit_code == 2


def test_a_failing_template_has_its_line_and_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot render this conversation") as caught:
        of(tmp_path, "\n\n{{ messages[0].content.text + 1 }}").render(said("x"))
    assert caught.value.details["line"] == "3"
    assert caught.value.details["reason"].startswith("UndefinedError")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "not a list of at least one message"),
        ("hello", "not a list of at least one message"),
        ({"role": "user", "content": "x"}, "not a list of at least one message"),
        (["hello"], r"messages\[0\] is not an object"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([*said("x"), {"role": "user", "content": 5}], r"the content of messages\[1\] is neither"),
        ([{"role": "user", "content": [1]}], r"the content of messages\[0\] is neither"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\].content is not plain data"),
        ([{"role": "user", "content": "x", "file": Path("/")}], r"messages\[0\].file is not plain data"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\].content is not Unicode text"),
    ],
)
def test_messages_of_another_form_are_refused(tmp_path: Path, messages: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        of(tmp_path, SMOLLM_2).render(messages)
    assert caught.value.hint


def test_tools_and_documents_are_objects(tmp_path: Path) -> None:
    template = of(tmp_path, SMOLLM_2)
    for name in ("tools", "documents"):
        for wrong in ("x", [len], [1]):
            with pytest.raises(ConfigError, match=name):
                template.render(said("x"), **{name: wrong})


def test_messages_are_left_alone(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": None, "thinking": "y"}]
    before = json.dumps(messages)
    of(tmp_path, CORNERS).render(messages)
    assert json.dumps(messages) == before


# ---- hostile templates ------------------------------------------------------------------------------------------

INTERNALS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self.__init__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% set x = messages[0].pop('role') %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(_x=1) }}",
]
OTHER_TEMPLATES = [
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ lipsum(100) }}",
]
BOMBS = [
    "{{ 'a' * 10 ** 9 }}",
    "{% set x = ['a'] * 10 ** 9 %}",
    "{% set x = 10 ** 9 * 'a' %}",
    "{{ 2 ** 99999999 }}",
    "{% set ns = namespace(x=2) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ range(10 ** 9) | list }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{% set y = ns.x | string %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{% set y = ns.x | tojson %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{% set y = '%s' % ns.x %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{% set y = '{}'.format(ns.x) %}",
    "{{ 'a'.center(10 ** 9) }}",
    "{{ 'a' | center(1000000000) }}",
    "{% set x = 'a'.ljust(1000000000) %}",
    "{% set x = '\\t'.expandtabs(1000000000) %}",
    "{% set x = (1).to_bytes(1000000000) %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'aaaa' | indent(1000000000, true) }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{% set a = 'a' * 100000 %}{% set x = a.replace('a', a) %}",
    "{% set a = 'a' * 100000 %}{% set x = a | replace('a', a) %}",
    "{% set a = 'a' * 100000 %}{% set x = a.join(a) %}",
    "{% set a = 'a' * 100000 %}{% set x = a | join(a) %}",
    "{% set a = 'a ' * 50000 %}{% set x = a | wordwrap(1, wrapstring=a) %}",
    "{% set a = 'a' * 100000 %}{% set x = a.translate({97: a}) %}",
    "{% set a = 'a' * 100000 %}{% set x = range(100000) | map('replace', '', a) | join %}",
    "{% set a = 'a' * 100000 %}{% for i in range(1000) %}{{ a }}{% endfor %}",
    "{% set a = 'a' * 100000 %}{% set x %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endset %}",
    "{% set a = 'a' * 100000 %}{% macro m() %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endmacro %}{% set x = m() %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{% set x = m() ~ m() %}{% endmacro %}{{ m() }}",
]  # fmt: skip


@pytest.mark.parametrize("template", INTERNALS)
def test_templates_do_not_reach_python(tmp_path: Path, template: str) -> None:
    messages = said("x")
    with pytest.raises(ConfigError, match="tries what no template may do") as caught:
        of(tmp_path, template).render(messages)
    assert caught.value.exit_code == 2
    assert "do not trust this checkpoint" in str(caught.value.hint)
    assert messages == said("x")


@pytest.mark.parametrize("template", OTHER_TEMPLATES)
def test_templates_reach_nothing_beside_them(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="cannot render this conversation"):
        of(tmp_path, template).render(said("x"))


SAMPLE = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ 2 ** 99999999 ** 9 }}",
    "{{ range(10 ** 9) | list }}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{% set a = 'a' * 100000 %}{% for i in range(1000) %}{{ a }}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    # Ways round the meter that was inside the interpreter, from the review.
    "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = (ns.x[:] + ['a' * 9999])[:] %}{% endfor %}",
    "{{ (1).from_bytes('a'.encode() * 9999999, 'big') ** 9 }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{% set x = m(n - 1) + m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
]


@pytest.mark.parametrize("template", SAMPLE)
def test_waste_of_time_or_memory_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    good = of(tmp_path, "{{ messages[0].content }}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match="more time or memory than a template may") as caught:
        of(tmp_path, template).render(said("x"))
    assert "8,388,608 characters" in caught.value.details["limits"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB, of this process"
    assert good.render(said("and on")) == "and on"


@pytest.mark.slow
@pytest.mark.parametrize("template", BOMBS)
def test_every_bomb_stays_within_time_and_memory(tmp_path: Path, template: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(ConfigError):
        assert len(of(tmp_path, template).render(said("x"))) <= chat_template.MAX_CHARACTERS
    assert time.monotonic() - start < chat_template.MAX_SECONDS + 5


def test_a_template_that_takes_long_to_compile_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="more time or memory than a template may"):
        of(tmp_path, "{% macro m() %}x{% endmacro %}" * 30_000)


def test_one_process_renders_for_threads_and_forks(tmp_path: Path) -> None:
    template = of(tmp_path, "{{ messages[0].content }}")
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda number: template.render(said(str(number))), range(40)))
    assert texts == [str(number) for number in range(40)]
    process = chat_template._RENDERER._process
    pid = os.fork()
    if pid == 0:
        os._exit(template.render(said("child")) != "child" or chat_template._RENDERER._process is process)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert template.render(said("parent")) == "parent"
    assert chat_template._RENDERER._process is process


def test_an_interpreter_that_does_not_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for interpreter in ("/bin/true", str(tmp_path / "missing"), None):
        monkeypatch.setattr(chat_template, "_RENDERER", chat_template._Renderer())
        monkeypatch.setattr(sys, "executable", interpreter)
        with pytest.raises(ToolchainError, match="second Python interpreter") as caught:
            of(tmp_path, "x")
        assert caught.value.hint


def test_the_worker_ends_with_its_parent() -> None:
    code = "from llama_export.runtime.chat_template import _RENDERER; _RENDERER.ask('x', None); print(_RENDERER._process.pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_long_conversation_is_within_the_limits(tmp_path: Path) -> None:
    messages = said(*("word " * 1000 for _ in range(400)), system="s" * 100_000)
    for template in (LLAMA_2, LLAMA_3, LLAMA_3_1, ZEPHYR, SMOLLM_2, MISTRAL_TOOLS):
        start = time.monotonic()
        assert len(of(tmp_path, template).render(messages[:-1])) > 2_000_000
        assert time.monotonic() - start < 5
