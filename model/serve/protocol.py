"""The part of OpenAI's HTTP protocol that is served. What is not, is refused by name: nothing that is asked for is left
out in silence."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from starlette.requests import Request

from model.config import first_problem

BODY_BYTES = 16 * 2**20         # of a request at most

Nothing = Annotated[float, Field(ge=0, le=0)]
Off = Annotated[bool, Field(le=False)]          # Literal[False] takes 0: `logprobs: 0` asks for the chosen tokens'
Stop = Annotated[str, Field(min_length=1)]


class ApiError(Exception):
    """An answer with OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel):
    """An unknown field is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Of a stream: whether its last event holds the usage."""

    include_usage: bool = False


class Body(Strict):
    """What both kinds of completion take. `top_k` (0 or -1: all) and `ignore_eos` are other servers', not OpenAI's."""

    model: str
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    user: str = ""                                              # has no effect, there or here
    n: Literal[1] = 1
    presence_penalty: Nothing = 0
    frequency_penalty: Nothing = 0
    logprobs: Off = False

    @field_validator("stream_options")
    @classmethod
    def of_a_stream(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        """Raise ValueError for options of a stream that is not asked for."""
        if not info.data.get("stream"):
            raise ValueError("only with `stream`: true")
        return options


class CompletionBody(Body):
    """POST /v1/completions: a text, or its token ids, to go on from."""

    prompt: str | list[int]
    max_tokens: int = Field(16, ge=1)


class Message(Strict):
    """A turn of a conversation. A chat template may leave out a role that it does not know."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatBody(Body):
    """POST /v1/chat/completions: turns that the tokenizer's chat template puts into words."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B]) -> B:
    """The body of `request`. Raises ApiError."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > BODY_BYTES:
            raise ApiError(413, f"The request has more than {BODY_BYTES:,} bytes.")
    try:
        values = json.loads(bytes(raw))
        json.dumps(values, ensure_ascii=False).encode()         # fails for half a character
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError too
        raise ApiError(400, f"The request is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The request is no JSON object.")
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise ApiError(400, f"{first_problem(error)}.", str(error.errors()[0]["loc"][0])) from None


def event(content: dict[str, Any] | Literal["[DONE]"]) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n"
