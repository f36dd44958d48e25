"""Chat templates: messages to the text that the model was trained on, rendered as transformers renders them.

A template comes with the bundle and is a program, so it runs in Jinja's immutable sandbox, and within limits: of time,
of the text it makes, and of the values it computes on the way.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._exceptions import ChatTemplateError, CorruptError, InvalidArgumentError, LococoError, NotFoundError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | ..., "content": ...} and what else the template reads."""

_TIME_LIMIT_S = 5.0
_MAX_CHARS = 1 << 26  # of the rendered text, and of any string or list that an operator makes
_MAX_NUMBER = 10_000_000  # "x".center(10**10) is one call and ten gigabytes
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The chat templates of a bundle and the special tokens they mention.

    Args:
        templates: by name; "default", and "tool_use" for conversations with tools, if the model has one of its own.
        special_tokens: {"bos_token": "<s>", ...}, variables of the template.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens)
        self._compiled: dict[str, Template] = {}

    @classmethod
    def from_bundle(cls, bundle: Path) -> ChatTemplate:
        """Reads chat_template.jinja, or else tokenizer_config.json. A bundle without a template gives an empty one.

        Raises:
            CorruptError: tokenizer_config.json or special_tokens_map.json is malformed.
        """
        config = _read_json(bundle / "tokenizer_config.json")
        special_map = _read_json(bundle / "special_tokens_map.json")
        tokens = {}
        for name in _TOKEN_NAMES:
            value = config.get(name, special_map.get(name))
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
        found = config.get("chat_template")
        if (file := bundle / "chat_template.jinja").is_file():
            try:
                found = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as e:
                raise CorruptError(f"{file}: expected UTF-8 text: {e}") from e
        if found is None:
            return cls({}, tokens)
        if isinstance(found, str):
            found = [{"name": "default", "template": found}]
        try:
            return cls({str(t["name"]): str(t["template"]) for t in found}, tokens)
        except (TypeError, KeyError) as e:
            raise CorruptError(
                f"{bundle / 'tokenizer_config.json'}: chat_template: expected a string or a list of name and template"
            ) from e

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, special tokens included: tokenize it without adding any.

        Args:
            messages: at least one, each with a role. Keys whose value is None count as absent.
            add_generation_prompt: end with what begins the assistant's turn.
            tools, documents: passed to the template, as JSON values.
            variables: more of the template's own, such as enable_thinking; not those above.

        Raises:
            ChatTemplateError: no template, or one that raises, does not compile or exceeds the limits.
            InvalidArgumentError: messages that are none, or hold something else than JSON values; variables that are
                arguments of their own.
        """
        name = self.select(tools)
        arguments = {
            "messages": [_message(m, i) for i, m in enumerate(_at_least_one(messages))],
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        more = _plain(variables, "chat_template_kwargs") or {}
        if taken := sorted(arguments.keys() & more.keys()):
            raise InvalidArgumentError(
                f"chat_template_kwargs: expected the template's own names, got {', '.join(taken)}"
            )
        values = {**self.special_tokens, **more, **arguments}
        return _run_bounded(lambda: self._render(name, values))

    def select(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The name of the template for a conversation with these tools. Raises ChatTemplateError if there is none."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ChatTemplateError(
                f"chat template {name!r}: not found, this bundle has {sorted(self.templates) or 'none'}; use generate"
                " with a prompt, or export the model with a chat_template.jinja beside its tokenizer.json"
            )
        return name

    def _render(self, name: str, values: dict[str, Any]) -> str:
        if name not in self._compiled:
            self._compiled[name] = _compile(self.templates[name])
        pieces, total = [], 0
        for piece in self._compiled[name].generate(values):
            pieces.append(piece)
            total += len(piece)
            if total > _MAX_CHARS:
                raise ChatTemplateError(f"the chat template wrote more than {_MAX_CHARS:,} characters")
        return "".join(pieces)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise CorruptError(f"{path}: expected JSON: {e}") from e
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


# --- what a template sees --------------------------------------------------------------------------------------------


def _at_least_one(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgumentError(f"messages: expected a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise InvalidArgumentError("messages: expected at least one, got none")
    return messages


def _message(message: Message, i: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidArgumentError(f"messages[{i}]: expected a dict with a role, got {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise InvalidArgumentError(f"messages[{i}]: role: expected a string, got {message.get('role')!r}")
    plain: dict[str, Any] = _plain({k: v for k, v in message.items() if v is not None}, f"messages[{i}]")
    # the several names that templates know a message's reasoning by
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any, where: str) -> Any:
    """A copy of a JSON value. Objects with methods stay out of the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise InvalidArgumentError(f"{where}: expected JSON values, got {type(value).__name__}")


# --- the sandbox -----------------------------------------------------------------------------------------------------


class _Deadline(Exception):
    """Raised in the thread of a template whose time is over."""


def _run_bounded(render: Callable[[], str]) -> str:
    """Runs a template in a thread of its own, which can be ended: loops, filters, macros and recursion alike."""
    result: list[str | Exception] = []

    def work() -> None:
        try:
            result.append(render())
        except Exception as e:  # whatever a template makes Python raise
            result.append(e)

    thread = threading.Thread(target=work, name="lococo-chat-template", daemon=True)
    thread.start()
    thread.join(_TIME_LIMIT_S)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Deadline))
        thread.join(_TIME_LIMIT_S)
    value = result[0] if result else _Deadline()
    if isinstance(value, str):
        return value
    if isinstance(value, LococoError):
        raise value
    if isinstance(value, _Deadline):
        raise ChatTemplateError(f"chat template: stopped after {_TIME_LIMIT_S:g} s; does it end?") from value
    line = getattr(value, "lineno", None)
    what = str(value) if type(value).__name__ == "TemplateError" else f"{type(value).__name__}: {value}"
    raise ChatTemplateError(f"chat template{f', line {line}' if line else ''}: {what}") from value


def _check(value: Any) -> Any:
    """The value of an operator, if it is of a sane size."""
    from jinja2.exceptions import SecurityError

    if isinstance(value, (str, list, tuple)) and len(value) > _MAX_CHARS:
        raise SecurityError(f"a value of {len(value):,} characters or items; at most {_MAX_CHARS:,} are allowed")
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise SecurityError(f"the number {value}; at most {_MAX_NUMBER:,} is allowed")
    return value


def _compile(source: str) -> Template:
    from jinja2 import Template, nodes

    environment = _environment()
    tree = environment.parse(source)
    for const in tree.find_all(nodes.Const):
        _check(const.value)
    for node in list(tree.find_all(nodes.Concat)):  # the ~ operator, which a sandbox cannot intercept
        inner = nodes.Concat(node.nodes, lineno=node.lineno, environment=environment)
        node.nodes = [nodes.Filter(inner, "_check", [], [], None, None, lineno=node.lineno, environment=environment)]
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: the environment of transformers.utils.chat_template_utils."""
    try:
        import jinja2
        from jinja2 import ext, nodes
        from jinja2.exceptions import SecurityError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as e:
        raise NotFoundError("chat templates need the jinja2 package: pip install 'lococo-export[text]'") from e

    class Generation(ext.Extension):
        """{% generation %} marks what the assistant says, for training: its body is rendered like any other."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 64):
                raise SecurityError(f"the power {right}; at most 64 is allowed")
            for value, times in ((left, right), (right, left)):
                if operator == "*" and isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    _check(len(value) * times)
            return _check(super().call_binop(context, operator, left, right))

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    to_int = environment.filters["int"]
    environment.filters.update(
        tojson=tojson, _check=_check, int=lambda *args, **kwargs: _check(to_int(*args, **kwargs))
    )
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=lambda pattern: datetime.now().strftime(pattern)
    )
    return environment
