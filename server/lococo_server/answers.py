"""The JSON that goes out, for the OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    """Any answer that is no success; in a stream, its last event."""

    error: ErrorDetail


class Health(_Answer):
    """Requests are taken."""

    status: Literal["ok"]


class ModelCard(_Answer):
    """A model: the bundle, or the bundle behind a pack. `num_read` tokens come before every prompt."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    state_bytes: Count
    num_slots: Count
    num_read: Count


class ModelList(_Answer):
    """The bundle, then the packs."""

    object: Literal["list"]
    data: list[ModelCard]


class PromptTokensDetails(_Answer):
    """Of a prompt's tokens, those that a kept state or a pack had read."""

    cached_tokens: Count


class Usage(_Answer):
    """Tokens, of all choices together."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(_Answer):
    """Of a completion, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[Count]


class TextChoice(_Answer):
    """One answer to one prompt."""

    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class _Envelope(_Answer):
    id: str
    created: Count
    model: str
    system_fingerprint: str


class Completion(_Envelope):
    """The answer."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TopLogprob(_Answer):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, lt=256)]]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """Of a message, one entry a token."""

    content: list[TokenLogprob]
    refusal: None


class Message(_Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One answer."""

    index: Count
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Envelope):
    """The answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
