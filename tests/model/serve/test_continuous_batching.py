"""Continuous batching against the decoder of one text alone, in float64: another batch rounds otherwise, and no verdict
may hang on that. The likeliest two tokens of random weights are never 1e-12 apart."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from model.inference.sampling import Sampling
from model.inference.text import Vocabulary
from model.serve import engine as serving
from model.serve.engine import Busy, Engine, Event, Limits, Text
from tests.model.inference.test_inference import HYBRID, TRANSFORMER, random_model
from tests.model.inference.test_text_generation import WORDS, byte_tokenizer

LONGEST = 48
VOCABULARY = Vocabulary(byte_tokenizer(WORDS), None, [])
MODELS = {
    pattern: HybridLM.from_state(config, random_model(config).state_dict(), torch.float64)
    for pattern, like in (("M*M-", HYBRID), ("*-", TRANSFORMER))
    for config in [like.model_copy(update={"pattern": pattern})]
}
HYBRID_MODEL = MODELS["M*M-"]
CONFIGS = pytest.mark.parametrize("model", MODELS.values(), ids=["hybrid", "transformer"])


def engine(model: HybridLM, rows: int = 3, piece: int = 8, megabytes: float = 4, queue: int = 99) -> Engine:
    return Engine(model, VOCABULARY, Limits(LONGEST, rows, queue, piece, int(megabytes * 1e6)), torch.float64)


def text(ids: list[int], tokens: int, events: list[Event] | None = None, **options: object) -> Text:
    asked = {"sampling": Sampling(), "seed": 0, "stops": [], "end_ids": []} | options
    return Text(ids, tokens, emit=[].append if events is None else events.append, **asked)


def alone(model: HybridLM, asked: Text) -> list[int]:
    generator = torch.Generator().manual_seed(asked.seed)
    decoder = Decoder(model, LONGEST, 1, torch.float64)
    return decoder.generate(torch.tensor([asked.ids]), asked.max_tokens, asked.sampling, generator)[0].tolist()


def submit(running: Engine, *texts: Text) -> None:
    for one in texts:
        running.submit(one)


def finish(running: Engine) -> None:
    while running.waiting or running.reading or running.running:
        running.turn()


@contextlib.contextmanager
def reads(running: Engine) -> Iterator[list[list[tuple[int, ...]]]]:
    """The shapes of what is read in each turn."""
    turns: list[list[tuple[int, ...]]] = []
    turn = running.turn

    def recorded(read, ids, *arguments):
        turns[-1].append(tuple(ids.shape))
        return read(ids, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "turn", lambda: turns.append([]) or turn())
        for caches in (running.decoder, running.reader):
            patch.setattr(caches, "read_rows", functools.partial(recorded, caches.read_rows))
        yield turns


# A text that is asked for: the turn before which it comes, what its prompt begins with, its own part, tokens wanted.
ASKED = st.tuples(st.integers(0, 8), st.sampled_from([0, 8, 13, 16]), st.integers(0, 14), st.integers(1, 9)).filter(
    lambda asked: asked[1] + asked[2])


def arrivals(drawn: list[tuple[int, int, int, int]]) -> list[tuple[int, Text]]:
    """Prompts begin alike, so that some of their pieces are found."""
    ids = torch.randint(0, 97, (len(drawn) + 1, 16), generator=torch.Generator().manual_seed(len(drawn))).tolist()
    return [(turn, text(ids[-1][:shared] + ids[index][:own], tokens))
            for index, (turn, shared, own, tokens) in enumerate(drawn)]


def serve(running: Engine, asked: list[tuple[int, Text]]) -> None:
    for turn in range(9):
        for _, one in (arrived for arrived in asked if arrived[0] == turn):
            running.submit(one)
        running.turn()
    finish(running)


@CONFIGS
@settings(max_examples=6, deadline=None)
@given(drawn=st.lists(ASKED, min_size=1, max_size=9), rows=st.integers(1, 6), piece=st.sampled_from([1, 5, 8, 64]),
       megabytes=st.sampled_from([0, 0.05, 4]), rounded=st.booleans())
@example(drawn=[(0, 8, 9, 9), (5, 8, 5, 9), (5, 0, 5, 9)], rows=4, piece=8, megabytes=4, rounded=False)
@example(drawn=[(0, 8, 0, 9), (5, 8, 0, 9), (5, 8, 1, 9), (8, 8, 0, 9)], rows=4, piece=8, megabytes=4, rounded=False)
@example(drawn=[(0, 16, 13, 5), (0, 16, 0, 5)], rows=4, piece=8, megabytes=4, rounded=False)
@example(drawn=[(0, 0, own, 9) for own in (14, 3, 9, 5)], rows=4, piece=64, megabytes=0, rounded=True)
@example(drawn=[(0, 0, 8, 2)] * 8, rows=8, piece=8, megabytes=0, rounded=False)
def test_a_text_is_the_one_it_is_alone(model, drawn, rows, piece, megabytes, rounded):
    """Also when groups are rounded as on a GPU; and no more is read between two steps than may be."""
    running, asked = engine(model, rows, piece, megabytes), arrivals(drawn)
    running._on_gpu = rounded
    with reads(running) as turns:
        serve(running, asked)
    assert all(sum(rows * width for rows, width in turn) <= 2 * piece for turn in turns)
    for _, one in asked:
        assert one.tokens == alone(model, one)
    assert running.prefixes.nbytes == sum(piece.nbytes for piece in running.prefixes._kept.values()) <= megabytes * 1e6


FAULTS = {
    "positions of the longest": ("decode_rows", lambda original: lambda self, ids, positions: original(
        self, ids, [max(positions)] * len(positions))),
    "states of another row": ("states", lambda original: lambda self, row: original(self, 0)),
    "keys of another row": ("keys_values", lambda original: lambda self, row, *places: original(self, 0, *places)),
    "padding that is read": ("read_rows", lambda original: lambda self, ids, rows, start, lengths: original(
        self, ids, rows, start)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_batch_that_is_mixed_up_would_be_seen(fault, monkeypatch):
    """The control: what the test above must find."""
    name, change = FAULTS[fault]
    asked = arrivals([(0, 0, 3, 9), (0, 0, 9, 9), (1, 0, 14, 9), (2, 16, 5, 9), (3, 16, 14, 9)])
    running = engine(HYBRID_MODEL, piece=64 if name == "read_rows" else 8)
    monkeypatch.setattr(serving.Decoder, name, change(getattr(serving.Decoder, name)))
    serve(running, asked)
    monkeypatch.undo()
    assert any(one.tokens != alone(HYBRID_MODEL, one) for _, one in asked)


def test_a_seed_draws_the_tokens_it_draws_alone():
    running = engine(HYBRID_MODEL)
    asked = [text([5, 6, 7 + seed], 12, sampling=Sampling(1.5, top_k, 0.9), seed=seed)
             for seed, top_k in ((1, 0), (2, 20), (3, 0))]
    submit(running, *asked, text([1, 2], 20))
    finish(running)
    assert [one.tokens for one in asked] == [alone(HYBRID_MODEL, one) for one in asked]
    assert len({tuple(one.tokens) for one in asked}) == 3


def held(running: Engine, tokens: int) -> list[torch.Tensor]:
    return [*running.decoder.states(0), *running.decoder.keys_values(0, 0, tokens)]


@CONFIGS
def test_a_prompt_that_was_kept_leaves_the_same_bits(model):
    """Up to its last whole piece, and all of it; a token within a piece makes another prompt."""
    ids = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    model = model.float()
    caching, plain = engine(model), engine(model, megabytes=0)
    other = [*ids[:11], (ids[11] + 1) % 97, *ids[12:]]
    for prompt, cached in ((ids, 0), (ids, 40), (ids[:30], 24), (ids[:16] + ids[:9], 16), (other, 8), (ids[:24], 24)):
        found = []
        for running in (caching, plain):
            one = text(prompt, 4)
            submit(running, one)
            finish(running)
            found.append((one, [tensor.clone() for tensor in held(running, len(prompt))]))
        (one, bits), (cold, expected) = found
        assert (one.cached, cold.cached) == (cached, 0) and one.tokens == cold.tokens
        assert all(torch.equal(bit, other) for bit, other in zip(bits, expected, strict=True))
    assert caching.counts["cached_tokens"] == 112 and not plain.prefixes.nbytes
    model.double()


def test_prompts_used_longest_ago_are_forgotten_from_their_ends():
    running = engine(HYBRID_MODEL)
    generator = torch.Generator().manual_seed(1)

    def read(ids: list[int]) -> int:
        one = text(ids, 1)
        submit(running, one)
        finish(running)
        return one.cached

    first, second, third = torch.randint(0, 97, (3, 24), generator=generator).tolist()
    read(first)
    size = running.prefixes.nbytes
    running.prefixes.most_bytes = 2 * size
    assert [read(ids) for ids in (second, first, third, first)] == [0, 24, 0, 24]
    running.prefixes.most_bytes = int(1.7 * size)               # both have three pieces
    read(second)
    assert running.prefixes.nbytes <= running.prefixes.most_bytes
    assert read(second) == 24 and read(first) == 16             # its last piece went; reading it again takes another's
    assert read(second) == 16
    running.prefixes.most_bytes = size // 4                     # less than a piece
    before = running.prefixes.nbytes
    assert read(torch.randint(0, 97, (8,), generator=generator).tolist()) == 0 and running.prefixes.nbytes == before


def test_a_text_that_nobody_waits_for_leaves_its_row():
    """While it waits, is read, and runs; the others are what they are alone."""
    running = engine(HYBRID_MODEL, rows=2)
    texts = [text([9 + index] * (30 if index == 1 else 4), 12) for index in range(5)]
    submit(running, *texts)
    running.turn()
    assert running.running == [texts[0]] and running.reading is texts[1]
    texts[1].cancelled = texts[2].cancelled = True
    running.turn()
    assert texts[0] in running.running and running.reading is None and texts[3] in running.running
    texts[0].cancelled = True
    finish(running)
    for index, one in enumerate(texts):
        assert one.tokens == alone(HYBRID_MODEL, one) if index > 2 else len(one.tokens) < 12
    assert running.counts["cancelled"] == 3 and running.counts["finished_length"] == 2


def test_a_long_prompt_holds_the_others_up_by_a_piece():
    running, events = engine(HYBRID_MODEL), []
    submit(running, text([1, 2], 20, events), text([3] * 40, 2))
    running.turn()
    for turns in range(1, 4):
        running.turn()
        assert running.reading and running.position == 8 + 8 * turns
        assert len(running.running[0].tokens) == 2 + turns


def test_those_that_wait_are_read_together():
    """What is alike in length, as far as there are rows; of two that are the same the second finds the first."""
    running = engine(HYBRID_MODEL, rows=6, piece=64)
    texts = [text([index + 1] * size, 9) for index, size in enumerate((12, 30, 16, 29, 9, 1, 12))]
    twin = text(texts[0].ids, 9)
    submit(running, texts[0], twin, *texts[1:])
    with reads(running) as turns:
        finish(running)
    assert turns[:2] == [[(3, 16), (2, 30)], []] and turns[8] == [(1, 1), (1, 12)]
    assert twin.cached == 12
    for one in (twin, *texts):
        assert one.tokens == alone(HYBRID_MODEL, one)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    running = engine(HYBRID_MODEL)
    long, short = text([3] * 40, 2), text([1, 2], 20)
    submit(running, long, short, text([4] * 20, 2))
    running.turn()
    assert running.reading is long and running.position == 8 and len(short.tokens) == 2
    for _ in range(4):
        running.turn()
    assert running.reading is None and long.tokens == alone(HYBRID_MODEL, long) and len(short.tokens) == 6


def test_no_more_wait_than_may_and_none_after_the_end():
    running, events = engine(HYBRID_MODEL, queue=3), []
    submit(running, *(text([1], 1, events) for _ in range(3)))
    with pytest.raises(Busy, match="3 texts wait, and no more may"):
        submit(running, text([1], 1))
    assert len(running.waiting) == 3 and running.counts["refused"] == 1
    running.close()
    running.run()
    assert [event.error for event in events] == ["The server ends."] * 3
    with pytest.raises(Busy, match="ends"):
        submit(running, text([1], 1))


def test_a_failure_is_told_and_those_that_waited_are_written(monkeypatch, capsys):
    running, events = engine(HYBRID_MODEL, rows=2), []
    original, failures = serving.Decoder.decode_rows, iter([RuntimeError("out of memory")])

    def fail_once(*arguments):
        for failure in failures:
            raise failure
        return original(*arguments)

    monkeypatch.setattr(serving.Decoder, "decode_rows", fail_once)
    waits = text([4, 5], 3)
    waits.emit = lambda event: running.close() if event.finish else None
    submit(running, text([1, 2], 5, events), text([3], 5, events), waits)
    running.run()
    assert [event.error for event in events if event.error] == ["The model failed: RuntimeError."] * 2
    assert waits.tokens == alone(HYBRID_MODEL, waits)
    assert "out of memory" in capsys.readouterr().err and running.counts["failed"] == 2


@pytest.mark.parametrize("tokens", [4, 20])
def test_a_text_that_fails_as_it_begins_is_told(tokens, monkeypatch):
    """Of a prompt that is read at once, and of one of which pieces are."""
    running, events = engine(HYBRID_MODEL), []
    fails = text([1] * tokens, 5, events)
    monkeypatch.setattr(fails, "start", lambda *_: 1 / 0)
    submit(running, fails)
    with pytest.raises(ZeroDivisionError):
        running.turn()
    assert not running.waiting and running._under_way() == [fails]


def test_no_text_has_ended_and_failed(monkeypatch):
    """A token that cannot be chosen is seen before any is given."""
    running, tokens = engine(HYBRID_MODEL), iter([torch.tensor(1)])
    monkeypatch.setattr(serving, "choose", lambda *_: next(tokens))
    submit(running, *(text([index, 2], 1, sampling=Sampling(1.0)) for index in range(2)))
    with pytest.raises(StopIteration):
        running.turn()
    assert len(running._under_way()) == 2 and not running.counts["finished_length"]


def test_a_text_that_comes_while_others_leave_is_not_among_the_cancelled(monkeypatch):
    running, comes = engine(HYBRID_MODEL), text([1, 2], 1)
    monkeypatch.setattr(running, "_leave", lambda rows: submit(running, comes))
    running._drop_cancelled()
    assert running.counts["cancelled"] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_a_failure(temperature):
    running, events = engine(HYBRID_MODEL), []
    running.decoder.logits = lambda x: x.new_full((len(x), 97), float("nan"))
    submit(running, text([1, 2], 5, events, sampling=Sampling(temperature)))
    with pytest.raises(ModelError, match="Logits are not finite"):
        finish(running)
    assert events == []


def test_a_failure_that_no_log_can_take_is_told(monkeypatch):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    running, events = engine(HYBRID_MODEL), []
    monkeypatch.setattr(running.decoder, "decode_rows", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "stderr", Full())
    fails = text([1, 2], 5)
    fails.emit = lambda event: events.append(event.error) or (running.close() if event.error else None)
    submit(running, fails)
    running.run()
    assert events[-1] == "The model failed: ZeroDivisionError."


def written(words: list[str], stops: list[str], end_ids: list[int]) -> tuple[list[str], str | None]:
    events: list[Event] = []
    one = text([1], len(words), events, stops=stops, end_ids=end_ids)
    one.start(VOCABULARY, torch.device("cpu"))
    finish = None
    for word in words:
        finish = one.add(WORDS.index(word))
        if finish:
            break
    assert [event.finish for event in events if event.finish] == [finish]
    return [event.text for event in events], finish


@pytest.mark.parametrize(("stops", "expected", "finish"), [
    ([], "thetheth!", "length"), (["he"], "t", "stop"), (["x", "eth"], "th", "stop"),
    (["ethz", "!?"], "thetheth!", "length"), (["!"], "thetheth", "stop"), (["eth!", "the!"], "theth", "stop"),
])
def test_stops_end_a_text_wherever_tokens_end(stops, expected, finish):
    texts, ended = written(["the", "the", "th", "<0x21>"], stops, [])
    assert ("".join(texts), ended) == (expected, finish)


def test_a_stop_longer_than_any_text_costs_no_more_than_the_text():
    """Compared with each of its beginnings, 10 MB of it would hold up everybody's texts for hours."""
    assert written(["the", "the"], ["t" * 10**7], []) == (["the", "the"], "length")


def test_what_may_begin_a_stop_waits_and_a_character_is_whole():
    assert written(["t", "t", "h", "e", "h"], ["th!", "hex"], [])[0] == ["t", "t", "heh"]
    assert written(["t", "<0xC3>", "<0xA9>", "h"], [], [])[0] == ["t", "é", "h"]
    assert written(["t", "<0xC3>", "</s>", "h"], ["x"], [2]) == (["t", "\ufffd"], "stop")
