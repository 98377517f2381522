"""The decoder on a GPU: prompts in pieces and captured steps against the full forward pass there and in float32."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from model.inference.fp8_weights import quantize_weights
from model.inference.random_weights import random_model
from tests.closeness import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HYBRID = ModelConfig(
    pattern="M-M*-M-", hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, num_query_groups=2, head_dim=64,
    mamba_num_heads=16, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=2, chunk_size=128, sequence_length=512,
    vocab_size=512, init_method_std=0.06,
)
WIDE_STATE = HYBRID.model_copy(update={"mamba_state_dim": 256})
TRANSFORMER = ModelConfig(
    pattern="*-*-", hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, num_query_groups=2, head_dim=64,
    position_embedding="rope", sequence_length=512, vocab_size=512, init_method_std=0.06,
)
CONFIGS = pytest.mark.parametrize("config", [HYBRID, WIDE_STATE, TRANSFORMER],
                                  ids=["hybrid", "state-256", "transformer"])


def run(model: HybridLM, ids: torch.Tensor, prompt: int, **options: object) -> torch.Tensor:
    """Logits of the prompt's last token and of every one after it."""
    decoder = Decoder(model, ids.shape[1], len(ids), prefill_tokens=200, **options)     # type: ignore[arg-type]
    steps = [decoder.prefill(ids[:, :prompt]).clone()]
    steps += [decoder.decode(ids[:, i]).clone() for i in range(prompt, ids.shape[1])]
    return torch.stack(steps, 1)


@CONFIGS
def test_pieces_and_captured_steps_are_the_full_forward(config):
    model = random_model(config, torch.bfloat16, "cuda")
    ids = torch.randint(512, (3, 500), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        own = model(ids)[:, 449:]
        exact = HybridLM.from_state(config, model.state_dict()).cpu()(ids.cpu())[:, 449:]
    found = run(model, ids, 450)
    assert relative_error(found.cpu(), exact) < 1.2 * relative_error(own.cpu(), exact) + 2e-3
    assert relative_error(found, own) < 2e-2


@CONFIGS
def test_fp8_weights(config):
    model = random_model(config, torch.bfloat16, "cuda")
    ids = torch.randint(512, (3, 300), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        exact = model(ids)[:, 279:]
        quantize_weights(model.backbone.layers)
        full = model(ids)[:, 279:]
    found = run(model, ids, 280)
    assert 0.01 < relative_error(full, exact) < 0.2
    assert relative_error(found, exact) < 1.1 * relative_error(full, exact)
    # A value near the middle of two E4M3 numbers goes to the other one for any difference, so that FP8 answers the
    # smallest change at its input with most of its own rounding error: as much as BF16's rounding is what to allow.
    embedding = model.backbone.embeddings.weight
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        embedding.mul_(1 + 2**-9 * noise)
        nudged = model(ids)[:, 279:]
    assert relative_error(found, full) < relative_error(nudged, full)


def test_float32_and_bfloat16_states():
    model = random_model(HYBRID, torch.bfloat16, "cuda")
    ids = torch.randint(512, (3, 300), generator=torch.Generator().manual_seed(0)).cuda()
    assert relative_error(run(model, ids, 200, state_dtype=torch.bfloat16), run(model, ids, 200)) < 2e-2


@CONFIGS
def test_sequences_of_unlike_length_take_one_captured_step(config):
    """Prompts read by themselves, their caches copied into rows of one decoder, beside each alone."""
    model = random_model(config, torch.float32, "cuda")
    ids = torch.randint(512, (3, 60), generator=torch.Generator().manual_seed(0)).cuda()
    together, lengths = Decoder(model, 60, 4), [7, 40, 1]
    expected = []
    for row, length in enumerate(lengths):
        one = Decoder(model, 60, 1)
        one.prefill(ids[row, None, :length])
        for to, own in zip(together.states(row) + together.keys_values(row, 0, length),
                           one.states(0) + one.keys_values(0, 0, length), strict=True):
            to.copy_(own)
        expected.append(torch.cat([one.decode(ids[row, length + step, None]).clone() for step in range(5)]))
    for step in range(5):
        places = [length + step for length in lengths]
        logits = together.decode_rows(torch.stack([ids[row, place] for row, place in enumerate(places)]), places)
        assert relative_error(logits, torch.stack([each[step] for each in expected])) < 1e-4


@CONFIGS
@pytest.mark.parametrize("start", [0, 128])
def test_prompts_of_unlike_length_read_together(config, start):
    """Padded to 256, as a server reads them, and five captured steps, and the full forward pass, each row beside
    float32 on a CPU: an early token's error would vanish among those of later ones."""
    model = random_model(config, torch.bfloat16, "cuda")
    ids = torch.randint(512, (4, 512), generator=torch.Generator().manual_seed(0)).cuda()
    lengths, rows = [7, 256, 1, 130], range(4)

    def at_ends(logits):
        return torch.stack([row[start + length - 1 : start + length + 5]
                            for row, length in zip(logits, lengths, strict=True)])

    with torch.no_grad():
        exact = at_ends(HybridLM.from_state(config, model.state_dict()).cpu()(ids.cpu()))
        own = at_ends(model(ids)).cpu()
        decoder = Decoder(model, 512, 6)
        if start:
            decoder.read_rows(ids[:, :start], slice(4), 0)
        x = decoder.read_rows(ids[:, start : start + 256], slice(4), start, torch.tensor(lengths, device="cuda"))
        steps = [decoder.logits(x[rows, [length - 1 for length in lengths]])]
    for step in range(5):
        places = [start + length + step for length in lengths]
        steps.append(decoder.decode_rows(ids[rows, places], places).clone())
    found = torch.stack(steps, 1).cpu()
    apart = {name: [round(relative_error(logits[row], exact[row]), 4) for row in rows]
             for name, logits in (("forward pass", own), ("read and decoded", found))}
    assert max(max(errors) for errors in apart.values()) < 3e-2, apart


@CONFIGS
def test_greedy_text_is_the_same_in_any_batch(config):
    model = random_model(config, torch.float32, "cuda")
    ids = torch.randint(512, (5, 60), generator=torch.Generator().manual_seed(0)).cuda()
    together = Decoder(model, 80, 5).generate(ids, 20)
    alone = torch.cat([Decoder(model, 80, 1).generate(row[None], 20) for row in ids])
    assert (together == alone).double().mean() > 0.95
