"""The HTTP side: OpenAI's completions and chat completions over `model.serve.engine`, and a page to try them on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from model.config import ModelError
from model.inference.sampling import Sampling
from model.serve.engine import Busy, Engine, Event, Text
from model.serve.loopback import own_pages_only
from model.serve.protocol import ApiError, Body, ChatBody, CompletionBody, event, read

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
SECONDS_TO_END = 3


class ServedModel(NamedTuple):
    """A model under its name; `encode` puts a conversation into token ids, None for a model without a chat template."""

    name: str
    engine: Engine
    encode: Callable[[list[dict[str, str]]], list[int]] | None


class Completion:
    """A text that has been asked for, and the answer it becomes.

    Raises:
        ApiError: the prompt is empty, not of this model, or too long with what is to follow, or too many texts wait.
    """

    def __init__(self, engine: Engine, body: Body, ids: list[int], tokens: int):
        vocab_size, most = engine.decoder.model.config.vocab_size, engine.limits.max_length
        if not ids:
            raise ApiError(400, "The prompt is empty, and this model has no token to start from.", "prompt")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ApiError(400, f"The prompt has an id beyond the vocabulary of {vocab_size}.", "prompt")
        if len(ids) + tokens > most:
            raise ApiError(400, f"{len(ids)} tokens of prompt and {tokens} new ones are more than the {most} that this "
                                "server has room for. Ask for fewer, or start it with --max-length.",
                           "max_tokens", "context_length_exceeded")
        self.engine, self.body, self.chat = engine, body, isinstance(body, ChatBody)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._text = Text(
            ids, tokens, Sampling(body.temperature, max(0, body.top_k), body.top_p),
            secrets.randbits(62) if body.seed is None else body.seed,
            [body.stop] if isinstance(body.stop, str) else body.stop,
            [] if body.ignore_eos else engine.vocabulary.end_ids, self._emit)
        try:
            engine.submit(self._text)
        except Busy as error:
            raise ApiError(503 if engine.closing else 429, f"{error} Ask again later.", None, "busy") from None

    def _emit(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):         # the server has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _written(self) -> AsyncIterator[Event]:
        finish = None
        while finish is None:
            text, finish, error = await self._events.get()
            if error:
                raise ApiError(503, error)
            yield Event(text, finish)

    async def whole(self, request: Request) -> Response:
        """The answer in one piece, or none to a client that went."""
        collecting, gone = asyncio.create_task(self._collect()), asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await collecting) if collecting.done() else Response(status_code=499)
        finally:
            gone.cancel()
            collecting.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for the text any more."""
        self._text.cancelled = True

    async def _collect(self) -> dict[str, Any]:
        written = [event async for event in self._written()]
        text = "".join(event.text for event in written)
        part = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._object(False, [self._choice(part, written[-1].finish)]) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error is one of them, and the last."""
        base = self._object(True, [])
        try:
            if self.chat:
                yield event(base | {"choices": [self._choice({"delta": {"role": "assistant", "content": ""}}, None)]})
            async for text, finish, _ in self._written():
                part = {"delta": {"content": text}} if self.chat else {"text": text}
                yield event(base | {"choices": [self._choice(part, finish)]})
            if self.body.stream_options.include_usage:
                yield event(base | {"usage": self._usage()})
            yield event("[DONE]")
        except ApiError as error:
            yield event(error.content)

    def _object(self, part: bool, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if part else "chat.completion") if self.chat else "text_completion"
        return {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.body.model,
                "choices": choices}

    def _choice(self, written: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **written, "logprobs": None, "finish_reason": finish}

    def _usage(self) -> dict[str, Any]:
        prompt, new = len(self._text.ids), len(self._text.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": self._text.cached}}


class Events(StreamingResponse):
    """An answer in events to a client, which may go before the first of them or after any."""

    def __init__(self, answer: Completion):
        super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.answer = answer

    async def __call__(self, *arguments: Any) -> None:
        """As a response's."""
        try:
            await super().__call__(*arguments)
        finally:
            self.answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def application(models: dict[str, ServedModel], port: int) -> Any:
    """The ASGI application at 127.0.0.1:`port`, for its own pages and programs."""
    started = int(time.time())

    def served(body: Body) -> ServedModel:
        if body.model not in models:
            raise ApiError(404, f"There is no model {body.model!r}, but {', '.join(models)}.", "model",
                           "model_not_found")
        return models[body.model]

    async def answer(request: Request, body: Body, ids: list[int], tokens: int) -> Response:
        asked = Completion(served(body).engine, body, ids, tokens)
        return Events(asked) if body.stream else await asked.whole(request)

    async def complete(request: Request) -> Response:
        body = await read(request, CompletionBody)
        encode, prompt = served(body).engine.vocabulary.encode, body.prompt
        return await answer(request, body, encode(prompt) if isinstance(prompt, str) else prompt, body.max_tokens)

    async def chat(request: Request) -> Response:
        body = await read(request, ChatBody)
        name, engine, encode = served(body)
        if encode is None:
            raise ApiError(400, f"{name} is a base model: its tokenizer has no chat template. Ask /v1/completions.",
                           "messages")
        try:
            ids = encode([message.model_dump() for message in body.messages])
        except ModelError as error:
            raise ApiError(400, str(error), "messages") from None
        rest = max(1, engine.limits.max_length - len(ids))
        return await answer(request, body, ids, min(filter(None, (body.max_tokens, body.max_completion_tokens)),
                                                    default=rest))

    async def list_models(request: Request) -> Response:
        data = [{"id": name, "object": "model", "created": started, "owned_by": "here",
                 "max_model_len": served.engine.limits.max_length} for name, served in models.items()]
        return JSONResponse({"object": "list", "data": data})

    async def metrics(request: Request) -> Response:
        figures = {name: served.engine.figures() for name, served in models.items()}
        return PlainTextResponse("".join(f'nemotron_h_{key}{{model="{name}"}} {value}\n'
                                         for name, own in figures.items() for key, value in own.items()))

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": POLICY})

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        elif not isinstance(error, ApiError):
            error = ApiError(500, f"The server failed: {type(error).__name__}.")
        return JSONResponse(error.content, error.status)

    get = {"/": page, "/health": health, "/metrics": metrics, "/v1/models": list_models}
    post = {"/v1/completions": complete, "/v1/chat/completions": chat}
    routes = [Route(path, does, methods=[method]) for method, paths in (("GET", get), ("POST", post))
              for path, does in paths.items()]
    handlers = dict.fromkeys((HTTPException, ApiError, Exception), refuse)
    return own_pages_only(Starlette(routes=routes, exception_handlers=handlers), port)


class Server(uvicorn.Server):
    """uvicorn with the engines' threads. On Ctrl-C the engines end first, so that clients are told and go."""

    def __init__(self, models: dict[str, ServedModel], port: int):
        super().__init__(uvicorn.Config(application(models, port), log_level="warning",
                                        timeout_graceful_shutdown=SECONDS_TO_END))
        self.engines = [served.engine for served in models.values()]

    def handle_exit(self, *arguments: Any) -> None:
        """As uvicorn's: a signal handler, which may not wait for a lock."""
        threading.Thread(target=self._end).start()
        super().handle_exit(*arguments)

    def run(self, sockets: Any = None) -> None:
        """Serve until Ctrl-C."""
        threads = [threading.Thread(target=engine.run) for engine in self.engines]
        for thread in threads:
            thread.start()
        try:
            super().run(sockets)
        finally:
            self._end()
            for thread in threads:
                thread.join()

    def _end(self) -> None:
        for engine in self.engines:
            engine.close()
