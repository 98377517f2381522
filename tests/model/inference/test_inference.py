"""Cached decoding against the model's own full forward pass and, for the cache's size, against the cost model."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelError
from model.costs import Deployment, memory
from model.hybrid_lm import HybridLM, rotary_factors, rotate
from model.inference.decoder import Decoder
from model.inference.fp8_weights import quantize_weights
from model.inference.sampling import Sampling, choose
from tests.held_bytes import HeldBytes
from tests.model.test_hybrid_lm import HYBRID, TRANSFORMER
from tests.tiny_engine import random_model

CONFIGS = pytest.mark.parametrize("config", [HYBRID, TRANSFORMER], ids=["hybrid", "transformer"])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(5))


MODELS = {config.position_embedding: random_model(config) for config in (HYBRID, TRANSFORMER)}


@CONFIGS
@pytest.mark.parametrize(("prefill_tokens", "prompt"), [
    (None, 1), (None, 2), (None, 17), (None, 39),       # shorter than the convolution, ragged and over a chunk
    (1, 9), (7, 33), (16, 32), (70, 33),                # in pieces like that; last, two prompts of three at once
])
def test_decoding_equals_the_full_forward(config, prefill_tokens, prompt, ids):
    model = random_model(config)
    decoder = Decoder(model, max_length=40, batch=3, **({"prefill_tokens": prefill_tokens} if prefill_tokens else {}))
    if prefill_tokens:
        decoder.prefill(ids)                            # something to forget
    with torch.no_grad():
        full = model(ids)
    steps = [decoder.prefill(ids[:, :prompt])] + [decoder.decode(ids[:, i]) for i in range(prompt, 40)]
    torch.testing.assert_close(torch.stack(steps, 1), full[:, prompt - 1 :], rtol=1e-4, atol=1e-4)


def read_unlike(model: HybridLM, ids: torch.Tensor, start: int, lengths: list[int], padded: bool) -> torch.Tensor:
    """Logits (rows, 4, vocab) of the prompts' last tokens and of three that follow; `start` tokens are read before."""
    decoder, rows = Decoder(model, max_length=40, batch=len(lengths)), range(len(lengths))
    with torch.no_grad():
        if start:
            decoder.read_rows(ids[:, :start], slice(len(lengths)), 0)
        together = torch.stack([row[start : start + max(lengths)] for row in ids])
        x = decoder.read_rows(together, slice(len(lengths)), start, torch.tensor(lengths) if padded else None)
        logits = [decoder.logits(x[rows, [length - 1 for length in lengths]])]
    for step in range(3):
        positions = [start + length + step for length in lengths]
        logits.append(decoder.decode_rows(ids[rows, positions], positions))
    return torch.stack(logits, 1)


@CONFIGS
@settings(max_examples=10, deadline=None)
@given(start=st.sampled_from([0, 1, 2, 16, 17]), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5))
@example(start=0, lengths=[1, 20, 16, 2, 3])
def test_prompts_of_unlike_length_read_together_equal_the_full_forward(config, start, lengths):
    model = MODELS[config.position_embedding]
    ids = torch.randint(0, 97, (len(lengths), 40), generator=torch.Generator().manual_seed(start))
    with torch.no_grad():
        full = torch.stack([row[start + length - 1 : start + length + 3]
                            for row, length in zip(model(ids), lengths, strict=True)])
    torch.testing.assert_close(read_unlike(model, ids, start, lengths, padded=True), full, rtol=1e-4, atol=1e-4)


def test_padding_that_is_read_would_be_seen(ids):
    """The control: what the test above must find. A Transformer's padding is written over."""
    hybrid, transformer = (
        read_unlike(model, ids, 4, [9, 3, 8], padded=False) - read_unlike(model, ids, 4, [9, 3, 8], padded=True)
        for model in MODELS.values())
    assert transformer.abs().max() < 1e-4 and hybrid[0].abs().max() < 1e-4
    assert hybrid[:, 0].abs().max() < 1e-4 and (hybrid[1:, 1:].abs().amax((1, 2)) > 0.1).all()


@CONFIGS
def test_fp8_weights_decode_as_they_compute_a_prompt(config, ids):
    config = config.model_copy(update={"mamba_num_heads": 16} if "M" in config.pattern else {})
    model = random_model(config)
    with torch.no_grad():
        exact = model(ids)
        quantize_weights(model.backbone.layers)
        full = model(ids)
    assert 1e-3 < ((full - exact).norm() / exact.norm()) < 0.3
    decoder = Decoder(model, max_length=40, batch=3)
    steps = [decoder.prefill(ids[:, :17])] + [decoder.decode(ids[:, i]) for i in range(17, 40)]
    # a value next to a tie rounds the other way for the last bit of what came before
    assert ((torch.stack(steps, 1) - full[:, 16:]).norm() / full.norm()) < 0.03


class Launches(TorchDispatchMode):
    """How many operations have written a tensor, each of which a GPU would launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and function.overloadpacket is not torch.ops.aten.item:
            self.count += function._schema.is_mutable or found.untyped_storage().data_ptr() not in read
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_take_few_launches(dtype, ids):
    """A Transformer is the peer that hybrids are measured by, which have none."""
    counts = {}
    for embedding in ("none", "rope"):
        config = TRANSFORMER.model_copy(update={"pattern": "*-*-*-", "position_embedding": embedding})
        decoder = Decoder(HybridLM.from_state(config, random_model(config).state_dict(), dtype), 40, 3)
        decoder.prefill(ids[:, :9])
        for what, run in (("step", lambda d: d.decode(ids[:, 9])), ("prompt", lambda d: d.prefill(ids[:, :9]))):
            with Launches() as launches:
                run(decoder)
            counts[what, embedding] = launches.count
    assert counts["step", "rope"] - counts["step", "none"] == 1 + 3 * 4
    assert counts["prompt", "rope"] - counts["prompt", "none"] == 3 * 6


def test_one_table_of_rotary_positions_serves_all_layers():
    """At 65,536 tokens one a layer took a GiB of a GPU whose batch is the largest that fits."""
    model, length = random_model(TRANSFORMER.model_copy(update={"pattern": "*-" * 8})), 10_000
    with HeldBytes() as held:
        decoder = Decoder(model, length)
    assert held.now - decoder.cache_bytes < 1.1 * 2 * length * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_are_as_exact_as_by_two_products_and_a_sum(dtype):
    x = torch.randn(2, 4, 300, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    config = TRANSFORMER.model_copy(update={"head_dim": 32})
    factors = rotary_factors(config, 300, dtype, x.device)
    first, second = x.chunk(2, -1)
    plain = torch.cat([first * factors[0] - second * factors[1], second * factors[0] + first * factors[1]], -1)
    exact = rotate(x.double(), rotary_factors(config, 300, torch.float32, x.device).double())
    errors = [float((found.double() - exact).norm()) for found in (rotate(x, factors), plain)]
    assert rotate(x, factors).dtype == dtype and 0 < errors[0] <= errors[1]


def test_fp8_needs_multiples_of_16():
    with pytest.raises(ModelError, match=r"0\.mixer\.in_proj is \(166, 48\)"):
        quantize_weights(random_model(HYBRID).backbone.layers)


def test_a_bfloat16_state_halves_it_and_stays_close(ids):
    model = random_model(HYBRID)
    decoders = [Decoder(model, 40, 3, state_dtype) for state_dtype in (torch.float32, torch.bfloat16)]
    logits = [torch.stack([decoder.prefill(ids[:, :5])] + [decoder.decode(ids[:, i]) for i in range(5, 40)])
              for decoder in decoders]
    assert 0 < ((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.02
    states = 3 * 3 * HYBRID.mamba_inner_size * HYBRID.mamba_state_dim
    assert decoders[0].cache_bytes - decoders[1].cache_bytes == 2 * states


@CONFIGS
def test_a_new_prompt_forgets_the_last_one(config, ids):
    model = random_model(config)
    decoder = Decoder(model, max_length=60, batch=3)
    decoder.generate(ids, 10)
    again = decoder.generate(ids[:, :7], 10)
    assert torch.equal(again, Decoder(model, max_length=60, batch=3).generate(ids[:, :7], 10))


@CONFIGS
def test_greedy_takes_the_likeliest_token(config, ids):
    model = random_model(config)
    generated = Decoder(model, max_length=30, batch=3).generate(ids[:, :20], 8)
    with torch.no_grad():
        logits = model(torch.cat([ids[:, :20], generated], 1))
    assert torch.equal(logits[:, 19:-1].argmax(-1), generated)


@CONFIGS
def test_logits_that_are_no_numbers_give_no_tokens(config, ids):
    """From the start, and of one sequence of the batch, whose neighbours go on as they were."""
    model = random_model(config)
    expected = Decoder(model, max_length=30, batch=3).generate(ids[:, :20], 4)
    decoder = Decoder(model, max_length=30, batch=3)
    decoder.logits = lambda x, whole=decoder.logits: whole(x).index_fill(0, torch.tensor([1]), math.nan)
    found = torch.stack(list(decoder.stream(ids[:, :20], 4)), 1)
    assert (found[1] == -1).all() and torch.equal(found[[0, 2]], expected[[0, 2]])
    with pytest.raises(ModelError, match="Logits are not finite"):
        decoder.generate(ids[:, :20], 4)


def test_sampling_follows_the_softmax(ids):
    """Frequencies of the first token of 4096 sequences against its probabilities, within five standard deviations."""
    model = random_model(HYBRID)
    prompts = ids[:1, :6].expand(4096, -1)
    generator = torch.Generator().manual_seed(11)
    drawn = Decoder(model, max_length=6, batch=4096).generate(prompts, 1, Sampling(temperature=2.0), generator)
    with torch.no_grad():
        expected = (model(ids[:1, :6])[0, -1] / 2.0).softmax(-1)
    observed = torch.bincount(drawn[:, 0], minlength=97) / 4096
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / 4096).sqrt() + 1e-4).all()


def frequencies(logits: list[float], sampling: Sampling) -> list[float]:
    rows = torch.tensor([logits]).expand(20_000, -1)
    drawn = choose(rows, sampling, torch.Generator().manual_seed(1))
    return (torch.bincount(drawn, minlength=len(logits)) / len(rows)).tolist()


def test_only_the_likeliest_tokens_are_drawn():
    """Probabilities 1/2, 1/4, 1/8 and 1/8, in another order."""
    logits = [math.log(p) for p in (1 / 8, 1 / 2, 1 / 8, 1 / 4)]
    assert frequencies(logits, Sampling(1.0, top_k=2)) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.02)
    assert frequencies(logits, Sampling(1.0, top_p=0.6)) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.02)
    assert frequencies(logits, Sampling(1.0, top_p=0.4)) == [0, 1, 0, 0]
    assert frequencies(logits, Sampling(1.0, top_k=3, top_p=0.7)) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.02)
    assert frequencies(logits, Sampling(0.5)) == pytest.approx([1 / 22, 16 / 22, 1 / 22, 4 / 22], abs=0.02)


@pytest.mark.parametrize("temperature", [-0.0, 1e-300, 1e-46, 1e-38, 1e-31, 1e-29])
def test_hardly_any_temperature_takes_the_likeliest(temperature):
    for options in ((), (2,), (0, 0.9)):
        assert frequencies([100.0, 130.0, -100.0], Sampling(temperature, *options)) == [0, 1, 0]


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 1e-38])
def test_hardly_any_top_p_takes_the_likeliest(top_p):
    for top_k in (0, 2):
        assert frequencies([1.0, 1.5, -1.0], Sampling(1.0, top_k, top_p)) == [0, 1, 0]


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_the_cost_models(config, dtype):
    model = HybridLM.from_state(config, random_model(config).state_dict(), dtype)
    decoder = Decoder(model, max_length=50, batch=3)
    assert decoder.cache_bytes == memory(config, Deployment.of(50, 3, 8 * dtype.itemsize)).cache


def test_a_stream_does_not_go_on_from_other_sequences(ids):
    decoder = Decoder(random_model(HYBRID), 40, batch=3)
    changes = (lambda: decoder.generate(ids[:, 9:18], 1), lambda: decoder.decode(ids[:, 9]),
               lambda: decoder.decode_rows(ids[:1, 0], [9]))
    for change in changes:
        stream = decoder.stream(ids[:, :9], 3)
        next(stream)
        change()
        with pytest.raises(ModelError, match="a Decoder for each stream"):
            next(stream)
    with pytest.raises(ModelError, match="of unlike length"):
        decoder.decode(ids[:, 0])


@pytest.mark.parametrize(("use", "message"), [
    *((lambda decoder, ids, shift=shift: decoder.prefill(ids[:, :5] + shift), "the vocabulary has 97")
      for shift in (-97, 97)),
    *((lambda decoder, ids, shape=shape: decoder.prefill(ids.new_zeros(shape)), "caches are of 3 sequences")
      for shape in ((1, 4), (4, 4), (3, 0), (12,))),
    (lambda decoder, ids: decoder.decode(ids[:1, 9]), "caches are of 3 sequences"),
    *((lambda decoder, ids, count=count, positions=positions: decoder.decode_rows(ids.new_ones(count), positions),
       "Give one of both for each of the first sequences") for count, positions in ((0, []), (2, [3]), (4, [1] * 4))),
    (lambda decoder, ids: decoder.decode_rows(ids[:2, 0], [3, 40]), r"40 \+ 1 tokens"),
    (lambda decoder, ids: decoder.decode_rows(ids[:2, 0], [-1, 3]), r"-1 \+ 1 tokens"),
    (lambda decoder, ids: decoder.claim(-1), r"-1 \+ 0 tokens"),
    (lambda decoder, ids: decoder.claim(41), r"41 \+ 0 tokens"),
    (lambda decoder, ids: (decoder.prefill(ids), decoder.decode(ids[:, 0])), r"40 \+ 1 tokens"),
    (lambda decoder, ids: decoder.generate(ids, 3), "max_length"),
    (lambda decoder, ids: Decoder(decoder.model, 0, 1), "one or more of both"),
    (lambda decoder, ids: Decoder(decoder.model, 4, 0), "one or more of both"),
    *((lambda decoder, ids, sampling=sampling: decoder.generate(ids[:, :5], 2, Sampling(*sampling)), message)
      for sampling, message in (
          ((math.nan,), "temperature is nan"), ((1.0, 0, math.nan), "top_p is nan"), ((-1.0,), "temperature is -1"),
          ((1.0, -2), "top_k is -2"), ((1.0, 0, 1.5), "top_p is 1.5"), ((1.0, 0, 0.0), "top_p is 0"))),
])
def test_what_is_refused(ids, use, message):
    decoder = Decoder(random_model(HYBRID), 40, batch=3)
    decoder.prefill(ids[:, 5:9])
    with pytest.raises(ModelError, match=message):
        use(decoder, ids)
