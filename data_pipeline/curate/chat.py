"""Questions to a language model behind an OpenAI-compatible endpoint, and a file that remembers every answer.

`answer` sends what the cache does not hold to BASE_URL/chat/completions (vLLM, TensorRT-LLM, SGLang, llama.cpp, Ollama,
OpenAI and others speak it). An answer is appended to the cache the moment it arrives: after Ctrl-C, SIGKILL or a power
cut the same call goes on where it was, and once all is answered it needs neither network nor key.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx

from data_pipeline.config import DataError, SynthesisConfig

FIRST_WAIT_SECONDS = 0.5        # before the first retry; doubled for each one after it
LONGEST_WAIT_SECONDS = 60.0     # of the back-off
LONGEST_RETRY_AFTER = 600.0     # a server that asks for more has run out of quota: the question fails instead
SECONDS_BETWEEN_WORDS = 60.0    # on what is asked again: a question may take a quarter of an hour to fail for good
PATIENCE = 32                   # questions in a row without an answer, each with all its retries: the server is gone
FAILED_SHARE = 0.1              # of all questions: as many may go unanswered, those the server refuses aside
RETRIED = {408, 425, 429}       # and 5xx: may pass by itself
REFUSED = {400, 403, 413, 422}  # this question is at fault, not the next
ADVICE = {
    401: "Put a valid key into the environment variable {key_variable} (synthesis.key_variable).",
    402: "The account behind {key_variable} is out of credit.",
    404: "Check synthesis.base_url (it usually ends in /v1) and synthesis.model in params.yaml.",
}
KEPT = "Run the same command again when that is mended: every answer so far is kept in {cache}."

Progress = Callable[..., None]


class Reply(NamedTuple):
    """What the model wrote, and how it ended."""

    text: str
    finish: str                 # the endpoint's finish_reason: "stop", or "length" where it was cut off, ...


class Question(NamedTuple):
    """What the model is asked."""

    key: str                    # equal questions, equal keys
    body: Mapping[str, Any]     # JSON for /chat/completions
    about: Mapping[str, str]    # kept beside the answer, for a reader of the cache


@dataclass
class Answers:
    """What came of the questions."""

    replies: dict[str, Reply]                                       # by key
    cached: int = 0                                                 # replies that were in the cache
    failures: Counter[str] = field(default_factory=Counter)         # reason -> questions without a reply


class ReplyCache:
    """Append-only JSONL, a reply a line. A line that a kill cut short is passed over: its question is asked again."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, keys: set[str]) -> dict[str, Reply]:
        """The replies to these questions. Others stay on disk, so memory is bounded by what is asked for."""
        if not self.path.exists():
            return {}
        with self.path.open("rb") as lines:
            found = (_reply_of_line(line) for line in lines)
            return {key: reply for key, reply in found if key in keys}

    @contextmanager
    def appending(self) -> Iterator[Callable[[Question, Reply], None]]:
        """A function that adds one reply, whole and at once handed to the operating system."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            _end_last_line(file)

            def append(question: Question, reply: Reply) -> None:
                entry = {"key": question.key, **question.about, **reply._asdict()}
                # Half a surrogate pair, which no file of UTF-8 can hold, is spelt as JSON came with it.
                file.write(json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
                file.flush()

            yield append


def _reply_of_line(line: bytes) -> tuple[str, Reply]:
    try:
        entry = json.loads(line)
        return entry["key"], Reply(entry["text"], entry["finish"])
    except (ValueError, KeyError, TypeError):
        return "", Reply("", "")


def _end_last_line(file: BinaryIO) -> None:
    """What follows a half-written line must not become part of it."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


class Unanswered(Exception):
    """One attempt brought no reply."""

    def __init__(self, reason: str, again: bool = True, wait: float = 0.0, status: int = 200):
        super().__init__(reason)
        self.again = again          # it may work another time
        self.wait = wait            # seconds, at least, that the server asks for
        self.status = status


def answer(
    questions: Sequence[Question], config: SynthesisConfig, seed: int, cache: Path, progress: Progress
) -> Answers:
    """The replies to `questions`, from the cache where it has them, else from the endpoint.

    At most `config.concurrency` questions are under way. 429, 5xx, time-outs, lost connections and answers that make
    no sense are tried again, `config.retries` times at most, after a wait that doubles each time, with jitter from
    `seed`, and is as long as Retry-After says at least. A question that fails for good is counted and the rest go on.
    `progress(done, total, ...)` is told replies a second and the numbers cached and failed.

    Raises DataError where the key or the URL is unusable, where the endpoint refuses every question (wrong key, no
    such model), stops answering, or fails for more than FAILED_SHARE of them. Replies so far are in the cache.
    """
    asked = {question.key: question for question in questions}
    answers = Answers(ReplyCache(cache).read(set(asked)))
    answers.cached = len(answers.replies)
    pending = [question for key, question in asked.items() if key not in answers.replies]
    if pending:
        headers = {"Authorization": f"Bearer {_key(config)}"}
        session = _Session(config, seed, cache, answers, len(pending), progress)
        try:
            asyncio.run(session.run(_endpoint(config), headers, iter(pending)))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
    return answers


def _key(config: SynthesisConfig) -> str:
    key = os.environ.get(config.key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise DataError(
            f"synthesis.key_variable: the environment variable {config.key_variable} holds no key for "
            f"{config.base_url}.\nSet {config.key_variable}; any word will do for a local server that asks for none."
        )
    return key


def _endpoint(config: SynthesisConfig) -> str:
    try:
        url = httpx.URL(config.base_url.rstrip("/") + "/chat/completions")
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise DataError(
            f"synthesis.base_url: {config.base_url!r} is no address of a server.\n"
            "Write it as in http://localhost:8000/v1, in params.yaml."
        )
    return str(url)


class _Session:
    """The pending questions of one call of `answer`."""

    def __init__(
        self, config: SynthesisConfig, seed: int, cache: Path, answers: Answers, pending: int, progress: Progress
    ):
        self.config, self.seed, self.cache, self.answers = config, seed, cache, answers
        self.pending, self.progress = pending, progress
        self.answered = self.unanswered = self.unanswered_in_a_row = 0
        self.started = self.next_word = time.monotonic()

    async def run(self, url: str, headers: dict[str, str], questions: Iterator[Question]) -> None:
        async with httpx.AsyncClient(headers=headers, timeout=None, limits=httpx.Limits()) as client:
            with ReplyCache(self.cache).appending() as append:

                async def work() -> None:
                    for question in questions:
                        await self.settle(client, url, question, append)

                self.report()
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.config.concurrency, self.pending)):
                        group.create_task(work())

    async def settle(
        self, client: httpx.AsyncClient, url: str, question: Question, append: Callable[[Question, Reply], None]
    ) -> None:
        """One question to its reply or its failure."""
        try:
            reply = await self.ask(client, url, question)
        except Unanswered as failure:
            self.count_failure(failure)
        else:
            append(question, reply)
            self.answers.replies[question.key] = reply
            self.answered += 1
            self.unanswered_in_a_row = 0
        self.report()

    async def ask(self, client: httpx.AsyncClient, url: str, question: Question) -> Reply:
        for attempt in range(self.config.retries + 1):
            try:
                return await self.attempt(client, url, question)
            except Unanswered as failure:
                if not failure.again or attempt == self.config.retries:
                    raise
                if time.monotonic() >= self.next_word:
                    print(f"Waiting for {self.config.base_url} (synthesis.base_url): {failure}; asked again.",
                          flush=True)
                    self.next_word = time.monotonic() + SECONDS_BETWEEN_WORDS
                jitter = random.Random(f"{self.seed}:{question.key}:{attempt}").uniform(0.5, 1.0)
                back_off = jitter * min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_WAIT_SECONDS)
                await asyncio.sleep(max(back_off, failure.wait))
        raise AssertionError("the last attempt returns or raises")

    async def attempt(self, client: httpx.AsyncClient, url: str, question: Question) -> Reply:
        seconds = self.config.timeout_seconds
        try:
            async with asyncio.timeout(seconds):        # httpx would only bound the pauses of a slow answer
                response = await client.post(url, json=question.body)
        except TimeoutError:
            raise Unanswered(f"no answer in {seconds:g} s") from None
        except httpx.RequestError as error:
            raise Unanswered(f"{type(error).__name__}: {error}".rstrip(":. ")) from None
        return parse(response)

    def count_failure(self, failure: Unanswered) -> None:
        """Raises DataError where there is no point in asking on.

        A question that the server can never answer must not count for more when, in a later run, only such are left.
        """
        answers = self.answers
        answers.failures[str(failure)] += 1
        if failure.status not in REFUSED:
            self.unanswered += 1
            self.unanswered_in_a_row += 1
        hopeless = not failure.again and failure.status not in REFUSED and failure.wait == 0
        unheard = not answers.replies and answers.failures.total() >= min(PATIENCE, self.pending)
        gone = self.answered > 0 and self.unanswered_in_a_row >= PATIENCE
        too_many = self.unanswered > max(1.0, FAILED_SHARE * (answers.cached + self.pending))
        if hopeless or unheard or gone or too_many:
            cure = ADVICE.get(failure.status, "").format(key_variable=self.config.key_variable)
            raise DataError(
                f"{self.config.base_url} (synthesis.base_url) does not answer for model {self.config.model}: "
                f"{failure}.\n" + f"{cure} {KEPT.format(cache=self.cache)}".strip()
            )

    def report(self) -> None:
        answers, seconds = self.answers, time.monotonic() - self.started
        failed = answers.failures.total()
        self.progress(
            answers.cached + self.answered + failed, answers.cached + self.pending,
            **{"req/s": (self.answered + failed) / max(seconds, 1e-3), "cached": answers.cached, "failed": failed},
        )


def parse(response: httpx.Response) -> Reply:
    """The reply in an answer of /chat/completions; an empty one is a reply too.

    Raises Unanswered for any other status than 200 and for a body that is not what the API promises.
    """
    status = response.status_code
    if status != 200:
        wait = _retry_after(response)
        again = (status in RETRIED or status >= 500) and wait <= LONGEST_RETRY_AFTER
        raise Unanswered(f"HTTP {status}{_message(response)}", again, wait, status)
    try:
        choice = response.json()["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Unanswered(f"not an answer of /chat/completions{_message(response)}") from None
    if not isinstance(text, str | None) or not isinstance(finish, str | None):
        raise Unanswered("not an answer of /chat/completions")
    return Reply(text or "", finish or "stop")


def _retry_after(response: httpx.Response) -> float:
    """Seconds that Retry-After asks for, as a number or as a date; 0 without it (RFC 9110, section 10.2.3)."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _message(response: httpx.Response) -> str:
    """The server's own words, in short, without the key should they repeat it."""
    try:
        error = response.json()["error"]
        words = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        words = response.text
    key = response.request.headers["Authorization"].removeprefix("Bearer ")
    words = " ".join(str(words).replace(key, "***").split())[:160].encode(errors="backslashreplace").decode()
    return f" ({words})" if words else ""
