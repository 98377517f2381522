"""The benchmark stage at toy size, the timing's arithmetic, and the published models' figures against other sources."""

import csv
import json
from pathlib import Path

import pytest
import torch

from model.benchmark import decode as decode_benchmark
from model.benchmark import serving as serving_benchmark
from model.benchmark.decode import decode_seconds, measure, prefill_seconds
from model.benchmark.serving import published_pairs
from model.config import ModelConfig, ModelError
from model.costs import Ceilings, decode_floor, prefill_floor, sequence_bytes
from model.inference.decoder import Decoder
from model.inference.random_weights import random_model
from stages.benchmark import benchmark, published_models
from stages.frame.common import Stage
from stages.frame.params import load_params

CPU = torch.device("cpu")
SLOW = Ceilings(1e3, 1e4, 1e5)
ROOT = Path(__file__).resolve().parents[2]
TINY = ModelConfig(
    pattern="M*-", hidden_size=32, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=1, head_dim=16,
    mamba_num_heads=2, mamba_head_dim=16, mamba_state_dim=16, mamba_num_groups=1, chunk_size=16, sequence_length=64,
    vocab_size=32,
)


def quiet(*_: object, **__: object) -> None:
    pass


def test_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load_params(ROOT / "params.yaml", (
        "benchmark.contexts=[32,64]", "benchmark.decode_tokens=2", "benchmark.repeats=2", "benchmark.longest_prompt=32",
        "benchmark.output_tokens=16", "tokenizer.vocab_size=512",
    ))
    stage = Stage("benchmark", params, None, None, ())
    model = tmp_path / "runs" / params.profile / "compress" / "model.json"
    model.parent.mkdir(parents=True)
    model.write_text(TINY.model_dump_json())
    monkeypatch.setattr(decode_benchmark, "measure_ceilings", lambda *_, **__: SLOW)
    metrics = benchmark(stage)

    rows = list(csv.DictReader((stage.records / "decode.csv").open()))
    assert [(row["model"], row["context"]) for row in rows] == [
        (name, context) for context in ("32", "64") for name in ("hybrid", "transformer", "compressed")]
    speed = {(row["model"], row["context"]): float(row["tokens_per_second"]) for row in rows}
    for context in ("32", "64"):
        assert metrics[f"decode_ratio_{context}"] == pytest.approx(
            speed["hybrid", context] / speed["transformer", context], rel=1e-4)
        assert metrics[f"compressed_decode_ratio_{context}"] == pytest.approx(
            speed["compressed", context] / speed["hybrid", context], rel=1e-4)
    for row in rows:
        if row["context"] == "32":
            first = float(row["time_to_first_token_seconds"])
            assert float(row["prefill_tokens_per_second"]) == pytest.approx(32 / first, rel=1e-4)
            assert float(row["output_tokens_per_second"]) == pytest.approx(
                16 / (first + 16 / float(row["tokens_per_second"])), rel=1e-4)
            if row["model"] == "compressed":
                assert float(row["prefill_of_floor"]) == pytest.approx(prefill_floor(TINY, 32, SLOW) / first, rel=1e-4)
        else:
            assert row["time_to_first_token_seconds"] == row["output_tokens_per_second"] == ""
    cache = {(row["model"], row["context"]): float(row["cache_mib"]) * 2**20 for row in rows}
    assert cache["transformer", "64"] == 2 * cache["transformer", "32"] == 8 * 64 * 2 * 64 * 2     # BF16 keys, values
    assert cache["hybrid", "64"] - cache["hybrid", "32"] == pytest.approx(32 * 2 * 64 * 2, rel=1e-3)
    json.dumps(metrics)


def test_median_spread_and_turns(monkeypatch):
    turns: list[decode_benchmark.Decoder] = []
    seconds = iter([9.0, 9.0, 2.0, 30.0, 4.0, 10.0, 8.0, 20.0])      # by turns: first repeat untimed

    def scripted(decoder, position, tokens):
        assert position == 32 - tokens and all(cache.std() > 0.5 for cache in decoder.caches)
        turns.append(decoder)
        return next(seconds)

    monkeypatch.setattr(decode_benchmark, "decode_tokens", scripted)
    monkeypatch.setattr(decode_benchmark, "measure_ceilings", lambda *_, **__: SLOW)
    wider = TINY.model_copy(update={"ffn_hidden_size": 64})
    (one, ones), (two, twos) = measure({"one": TINY, "two": wider}, [32], 2, 4, 3, 0, 8, 0, torch.float32, CPU, quiet)
    assert (one.model, one.context) == ("one", 32)
    assert one.tokens_per_second == pytest.approx(2 * 4 / 4.0)
    assert one.decode_of_floor == pytest.approx(
        decode_floor(TINY, 2, 32, torch.float32, torch.float32, False, SLOW) / (4.0 / 4))
    assert one.seconds_per_token_spread == pytest.approx((8.0 - 2.0) / 2 / (2 * 4))
    assert two.tokens_per_second == pytest.approx(2 * 4 / 20.0)
    assert ones == pytest.approx([2 / 8, 4 / 8, 8 / 8])
    assert twos == pytest.approx([30 / 8, 10 / 8, 20 / 8])
    assert turns[0::2] == [turns[0]] * 4 and turns[1::2] == [turns[1]] * 4 and turns[0] is not turns[1]


def test_decoding_fills_the_context(monkeypatch):
    decoders = []
    decode = decode_benchmark.decode_tokens

    def watched(decoder, position, tokens):
        elapsed = decode(decoder, position, tokens)
        decoders.append(decoder)
        assert decoder.position == decoder.max_length == 32
        return elapsed

    monkeypatch.setattr(decode_benchmark, "decode_tokens", watched)
    [(speed, _)] = measure({"tiny": TINY}, [32], 1, 4, 1, 0, 8, 0, torch.bfloat16, CPU, quiet)
    assert len(decoders) == 2 and speed.tokens_per_second > 0


def test_seconds_of_a_step(monkeypatch):
    runs = iter([90.0, 8.0, 4.0, 16.0])
    monkeypatch.setattr(decode_benchmark, "decode_tokens", lambda *_: next(runs))
    assert decode_seconds(TINY, 2, 64, "cpu", 4, 3, 0) == 4.0 / 4       # the fastest, but for the first


def test_seconds_of_a_prompt_are_the_fastest_repeats(monkeypatch):
    pieces = []
    decoder = Decoder(random_model(TINY, torch.float32), 64, 1)
    prefill = decoder.prefill_rows
    monkeypatch.setattr(decoder, "prefill_rows", lambda ids, rows: pieces.append(ids.shape) or prefill(ids, rows))
    assert 0 < prefill_seconds(decoder, 48, 2) < 60
    assert pieces == [(1, 48)] * 3


def test_context_shorter_than_what_is_decoded():
    with pytest.raises(ModelError, match="contexts: 16 is shorter"):
        list(measure({"tiny": TINY}, [16, 64], 1, 32, 1, 0, 8, 0, torch.float32, CPU, quiet))


def test_published_pairs_need_a_gpu():
    assert published_pairs([], CPU) == {}
    with pytest.raises(ModelError, match=r"benchmark\.published: 8b needs a GPU"):
        published_pairs(["8b"], CPU)


def test_published_pairs_become_metrics(monkeypatch):
    """Tiny models in place of the published ones, which only a GPU holds."""
    tiny = {name: TINY.model_copy(update={"mamba_num_heads": 16}) for name in ("nemotron_h_47b", "nemotron_h_56b")}
    size = serving_benchmark.Size(context=32, output=8, steps=2, repeats=2, largest_batch=2)
    serve_pair = serving_benchmark.serve_pair
    monkeypatch.setattr(serving_benchmark, "PAPER", size)
    monkeypatch.setattr(serving_benchmark, "serve_pair",
                        lambda name, size, _, ceilings, ranks: serve_pair(name, size, CPU, ceilings, tiny, ranks))
    monkeypatch.setattr(serving_benchmark, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9, 1e9))
    figures = published_pairs(["47b"], torch.device("cuda"))
    rate = "served_output_tokens_per_second"
    assert figures["output_ratio_47b"] == figures[f"nemotron_h_47b_{rate}"] / figures[f"nemotron_h_56b_{rate}"]
    assert figures["nemotron_h_56b_served_weights"] == "fp8" and figures["nemotron_h_56b_served_batch"] == 2
    json.dumps(figures)


def test_prompts_are_served_one_by_one_and_decoded_together(monkeypatch):
    monkeypatch.setattr(serving_benchmark, "prefill_seconds", lambda *_: 0.5)
    monkeypatch.setattr(serving_benchmark, "step_seconds", lambda _, position, *__: {36: 0.25}[position])
    size = serving_benchmark.Size(context=32, output=8, steps=2, repeats=2, largest_batch=2)
    row = serving_benchmark.serve("tiny", TINY, False, size, CPU, Ceilings(1e9, 1e9, 1e9))
    assert row.output_tokens_per_second == 2 * 8 / (2 * 0.5 + 8 * 0.25)
    assert (row.prefill_tokens_per_second, row.decode_tokens_per_second, row.step_milliseconds) == (64, 8, 250)


def test_as_many_sequences_as_caches_and_logits_fit():
    one = sequence_bytes(TINY, 40, torch.bfloat16, torch.float32) + 6 * TINY.vocab_size
    assert [serving_benchmark.fitting_batch("tiny", TINY, 40, free) for free in (one, 3 * one - 1)] == [1, 2]
    with pytest.raises(ModelError, match="tiny: 40 tokens need"):
        serving_benchmark.fitting_batch("tiny", TINY, 40, one - 1)


def test_published_models():
    """Parameter counts of the released checkpoints; caches worked out by hand from the paper's Table 1."""
    figures = published_models()
    counts = {"nemotron_h_8b": 8_100_852_736, "nemotron_h_56b": 56_324_350_464, "nemotron_h_47b": 46_791_554_816}
    assert {name: figures[f"{name}_parameters"] for name in counts} == counts
    assert figures["nemotron_h_8b_weights_gib"] == pytest.approx(8_100_852_736 * 2 / 2**30)
    convolution = 24 * 10_240 * 3 * 2 / 2**20
    assert figures["nemotron_h_8b_cache_mib_at_65536"] == pytest.approx(1024 + 96 + convolution)
    assert figures["nemotron_t_8b_cache_mib_at_65536"] == figures["llama_3_1_8b_cache_mib_at_65536"] == 8192
