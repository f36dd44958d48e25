"""OpenAI's completions and chat completions: what comes in, and what goes out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from lococo_runtime import LLM, CompletionChunk, CompletionOutput, Grammar, SamplingParams, TokenLogprobs
from lococo_runtime.sampling import MAX_STOP_BYTES, MAX_STOPS
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from .errors import ApiError

Json = dict[str, Any]
_DEFAULT_TOKENS = 16  # of a completion, as OpenAI's
_MAX_PROMPTS, _MAX_CHOICES = 256, 128  # of a request; each choice is remembered until all have ended


def _integer(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _false(value: bool) -> bool:
    if value:
        raise ValueError("Only false is supported")
    return value


Whole = BeforeValidator(_integer)  # behind the bounds, which are described otherwise no more
No = Annotated[bool, AfterValidator(_false), WithJsonSchema({"const": False})]  # 0 would be a Literal[False]
NonNegative = Annotated[int, Field(ge=0, lt=2**31), Whole]
TokenId = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"format": "token-id"}), Whole]


class _Model(BaseModel):
    """Unknown fields are refused, null is a field that is not given, and no type is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describes that nulls are allowed."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return reference


class TextPart(_Model):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    """Something that was said. `developer` is another word for `system`; parts are joined by line ends."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""
    name: str | None = None

    def for_template(self) -> Json:
        """As chat templates read it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message: Json = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class StreamOptions(_Model):
    """With include_usage, a last chunk has the usage."""

    include_usage: bool = False
    include_obfuscation: No = False


class NamedSchema(_Model):
    """A JSON schema. It is always enforced, `strict` or not."""

    name: str
    schema_: Json = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Model):
    """Text, any JSON object, or JSON that is valid under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self) -> Grammar | None:
        """What the answer is held to. Raises ApiError."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ApiError(400, "response_format: json_schema goes with type json_schema", param="response_format")
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema.schema_)
        return Grammar.json_schema({"type": "object"}) if self.type == "json_object" else None


class _Request(_Model):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES), Whole] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]
    ] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), Whole] | None = None
    stop: str | list[str] = []
    # labels, and values that ask for nothing
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: No = False
    service_tier: Literal["auto", "default"] = "auto"
    # of ours, under the names that other servers have given them
    top_k: NonNegative = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False

    def _params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only with stream", param="stream_options")
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token_id): bias for token_id, bias in self.logit_bias.items()},
            seed=(secrets.randbits(64) if self.seed is None else self.seed) % 2**64,
            max_tokens=max_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def _allowed(max_tokens: int, limit: int, name: str) -> int:
    if max_tokens > limit:
        raise ApiError(400, f"{name}: expected at most {limit}, got {max_tokens}", param=name, code="invalid_value")
    return max_tokens


class CompletionRequest(_Request):
    """The body of /v1/completions. A prompt is a text or token ids, or a list of such."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: NonNegative | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    best_of: Annotated[int, Whole] | None = None
    echo: bool = False

    def params(self, limit: int) -> SamplingParams:
        """For the runtime. Raises ApiError, InvalidArgumentError."""
        if self.best_of not in (None, self.n):
            raise ApiError(400, f"best_of: expected n, which is {self.n}, got {self.best_of}", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo: not with logprobs, as a prompt's tokens have none here", param="echo")
        max_tokens = min(_DEFAULT_TOKENS, limit) if self.max_tokens is None else self.max_tokens
        return self._params(_allowed(max_tokens, limit, "max_tokens"), self.logprobs)

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several. Raises ApiError."""
        prompt: Any = self.prompt
        if not isinstance(prompt, list):
            return [prompt]
        if not prompt or isinstance(prompt[0], int):
            return [prompt]
        if len(prompt) > _MAX_PROMPTS:
            message = f"prompt: expected at most {_MAX_PROMPTS} in a list, got {len(prompt)}"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return prompt


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    max_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Json = {}
    cache_prompt: bool = True

    def params(self, limit: int) -> SamplingParams:
        """For the runtime. Raises ApiError, InvalidArgumentError."""
        given = {k: v for k in ("max_completion_tokens", "max_tokens") if (v := getattr(self, k)) is not None}
        if len(set(given.values())) > 1:
            raise ApiError(400, "max_tokens: expected one of max_tokens and max_completion_tokens", param="max_tokens")
        max_tokens = limit
        for name, value in given.items():
            max_tokens = _allowed(value, limit, name)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
        return self._params(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)


def describe_requests(schemas: Json, *, models: list[str], max_tokens: int, vocab_size: int, min_prompt: int) -> None:
    """Adds to JSON schemas what fields alone do not say: the server's limits, and what goes with what."""
    for number in _find(schemas, "type", "integer"):  # FastAPI writes bounds as 0.0
        number |= {k: int(v) for k, v in number.items() if k.lower().endswith("imum")}
    for name in ("CompletionRequest", "ChatRequest"):
        fields = schemas[name]["properties"]
        fields["model"]["enum"] = models
        for limited in {"max_tokens", "max_completion_tokens"} & fields.keys():
            _options(fields[limited])[0]["maximum"] = max_tokens
        for ids in _find(fields, "format", "token-id"):
            ids["exclusiveMaximum"] = vocab_size
        for stop in _find(fields["stop"], "type", "string"):
            stop |= {"minLength": 1, "maxLength": MAX_STOP_BYTES, "pattern": r"^[^\u0000]*$"}
        for stops in _find(fields["stop"], "type", "array"):
            stops["maxItems"] = MAX_STOPS
        (biases,) = _find(fields["logit_bias"], "type", "object")
        ((_, bias),) = biases.pop("patternProperties").items()
        biases |= {"patternProperties": {_integers_below(vocab_size): bias}, "additionalProperties": False}
        schemas[name]["allOf"] = [_either(_null("stream_options"), _true("stream"))]
    fields = schemas["CompletionRequest"]["properties"]
    for text in _find(fields["prompt"], "type", "string"):
        text["minLength"] = min_prompt
    for texts in _find(fields["prompt"], "type", "array"):
        texts["minItems"] = 1
        if texts["items"].get("type") != "integer":
            texts["maxItems"] = _MAX_PROMPTS
    fields["max_tokens"]["default"] = min(_DEFAULT_TOKENS, max_tokens)
    fields["best_of"] = {"enum": [1, None]}  # as many as n would do, which is nothing to ask for
    both = _either(_null("best_of"), {"properties": {"n": {"enum": [1, None]}}})
    unread = _either({"properties": {"echo": {"enum": [False, None]}}}, _null("logprobs"))
    schemas["CompletionRequest"]["allOf"] += [both, unread]
    own = {"not": {"enum": ["messages", "tools", "documents", "add_generation_prompt"]}}
    _options(schemas["ChatRequest"]["properties"]["chat_template_kwargs"])[0]["propertyNames"] = own
    schemas["ChatRequest"]["allOf"] += [
        _either(_null("max_tokens"), _null("max_completion_tokens")),
        _either(_null("top_logprobs"), _true("logprobs")),
    ]
    form = schemas["ResponseFormat"]
    without = {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}}
    of_schema = {"properties": {"type": {"const": "json_schema"}, "json_schema": {"type": "object"}}}
    form["allOf"] = [_either(without, {**of_schema, "required": ["json_schema"]})]


def _options(schema: Json) -> list[Json]:
    options: list[Json] = schema.get("anyOf", [schema])
    return options


def _find(tree: Any, key: str, value: str) -> list[Json]:
    """The objects in a JSON value where `key` is `value`."""
    inner = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    found = [tree] if isinstance(tree, dict) and tree.get(key) == value else []
    return found + [each for part in inner for each in _find(part, key, value)]


def _either(*schemas: Json) -> Json:
    return {"anyOf": list(schemas)}


def _null(name: str) -> Json:
    return {"properties": {name: {"type": "null"}}}


def _true(name: str) -> Json:
    return {"properties": {name: {"const": True}}, "required": [name]}


def _integers_below(end: int) -> str:
    """A regular expression for the integers from 0 on."""
    last = str(end - 1)
    forms = ["0", *(f"[1-9][0-9]{{{more}}}" for more in range(len(last) - 1))]
    for i, digit in enumerate(last):
        first, rest = 0 if i else 1, len(last) - i - 1
        if int(digit) > first:
            forms.append(f"{last[:i]}[{first}-{int(digit) - 1}][0-9]{{{rest}}}")
    return f"^({'|'.join([*forms, last])})$"


class _Answer:
    """Makes the JSON of one answer, whole or chunk by chunk.

    Args:
        llm: the bundle.
        request: the body.
        params: what was made of it.
        num_choices: `request.n` for each prompt.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, llm: LLM, request: _Request, params: SamplingParams, num_choices: int) -> None:
        self._detokenizer = llm.detokenizer
        self._ends = {*params.stop_token_ids, *(() if params.ignore_eos else llm.model.manifest.model.eos_token_ids)}
        self._with_logprobs = params.logprobs is not None
        self._with_usage = request.include_usage
        self._n, self._num_choices = request.n, num_choices
        self._head: Json = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"lococo-{llm.model.manifest.bundle_id[:16]}",
        }

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        body = {**self._head, "object": self.chunk_object, "choices": choices}
        return {**body, "usage": usage} if self._with_usage else body

    def _entries(self, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Those of text: a token that ends an answer has none."""
        return [entry for entry in logprobs if entry.token_id not in self._ends]

    def _token(self, token_id: int) -> tuple[str, bytes]:
        """A token's text, and its bytes, which may be a part of a character."""
        raw = self._detokenizer.token_bytes(token_id)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def begin(self) -> list[Json]:
        """What a stream begins with."""
        return []

    def chunk(self, index: int, chunk: CompletionChunk) -> Json | None:
        """A chunk of a stream, or None if the token adds nothing yet."""
        logprobs = None if chunk.logprobs is None else self._entries([chunk.logprobs])
        if not (chunk.text or logprobs or chunk.finish_reason):
            return None
        choice = {**self._delta(chunk.text), **self._tail(index, logprobs), "finish_reason": chunk.finish_reason}
        return self._chunk([choice])

    def end(self, outputs: Sequence[CompletionOutput]) -> list[Json]:
        """What a stream ends with: the usage, if it was asked for."""
        return [self._chunk([], self._usage(outputs))] if self._with_usage else []

    def whole(self, outputs: Sequence[CompletionOutput]) -> Json:
        """The answer."""
        choices = []
        for index, output in enumerate(outputs):
            logprobs = None if output.logprobs is None else self._entries(output.logprobs)
            tail = self._tail(index, logprobs)
            choices.append({**self._message(index, output.text), **tail, "finish_reason": output.finish_reason})
        return {**self._head, "object": self.object, "choices": choices, "usage": self._usage(outputs)}

    def _usage(self, outputs: Sequence[CompletionOutput]) -> Json:
        """Tokens read, each prompt once, and generated; the token that ended an answer counts."""
        prompts = outputs[:: self._n]
        num_prompt = sum(output.num_prompt_tokens for output in prompts)
        num_generated = sum(len(output.token_ids) for output in outputs)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in prompts)},
        }

    def _tail(self, index: int, logprobs: list[TokenLogprobs] | None) -> Json:
        found = self._logprobs(index, logprobs or []) if logprobs or self._with_logprobs else None
        return {"index": index, "logprobs": found}

    def _delta(self, text: str) -> Json:
        raise NotImplementedError

    def _message(self, index: int, text: str) -> Json:
        raise NotImplementedError

    def _logprobs(self, index: int, entries: list[TokenLogprobs]) -> Json:
        raise NotImplementedError


class CompletionAnswer(_Answer):
    """Of /v1/completions; `echoes` are the choices' prompts, if they are to be shown before the text."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(
        self, llm: LLM, request: CompletionRequest, params: SamplingParams, num_choices: int, echoes: Sequence[str] = ()
    ) -> None:
        super().__init__(llm, request, params, num_choices)
        self._echoes = echoes
        self._offsets = [0] * num_choices

    def begin(self) -> list[Json]:
        """The prompts, if they are to be shown."""
        return [
            self._chunk([{"text": echo, **self._tail(index, None), "finish_reason": None}])
            for index, echo in enumerate(self._echoes)
        ]

    def _delta(self, text: str) -> Json:
        return {"text": text}

    def _message(self, index: int, text: str) -> Json:
        return {"text": self._echoes[index] + text if self._echoes else text}

    def _logprobs(self, index: int, entries: list[TokenLogprobs]) -> Json:
        tokens = [self._token(entry.token_id)[0] for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._token(i)[0]: p for i, p in entry.top.items()} for entry in entries],
            "text_offset": offsets,
        }


class ChatAnswer(_Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def begin(self) -> list[Json]:
        """The role, for each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(self._num_choices)
        ]

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _message(self, index: int, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, index: int, entries: list[TokenLogprobs]) -> Json:
        def entry(token_id: int, logprob: float) -> Json:
            text, raw = self._token(token_id)
            return {"token": text, "logprob": logprob, "bytes": list(raw)}

        return {
            "content": [
                {**entry(e.token_id, e.logprob), "top_logprobs": [entry(i, p) for i, p in e.top.items()]}
                for e in entries
            ],
            "refusal": None,
        }
