"""The arms of the data-quality benchmark, and one of its runs on tiny token files."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import data_quality
from data_pipeline.config import TokenizeConfig
from model.config import ModelConfig, PretrainConfig
from model.training.token_data import TrainingData

LABELS = ["high", "medium-high", "medium", "medium-low", "low"]
TOKENS = {f"train/{domain}-{label}": 1000 * (number + 1) for domain in ("code", "docs")
          for number, label in enumerate(LABELS)}
MODEL = ModelConfig.model_validate({
    "pattern": "M-*-", "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2, "num_query_groups": 2,
    "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 1,
    "chunk_size": 16, "position_embedding": "none", "sequence_length": 16, "vocab_size": 64,
})
RECIPE = PretrainConfig.model_validate({
    "tokens": 512, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 3e-3, "min_learning_rate": 3e-5,
    "warmup_fraction": 0.05, "decay_style": "cosine", "weight_decay": 0.1,
    "adam_betas": [0.9, 0.95], "clip_grad": 1.0, "bf16_layers_at_start": 2, "bf16_layers_at_end": 2,
    "evaluations": 1, "checkpoint_every": 50,
})


def test_arms_differ_in_labels_or_in_order_alone():
    config = TokenizeConfig.model_validate({
        "validation_kilobytes_per_domain": 1, "repeats": 4,
        "phases": [{"until": 0.5, "weights": {"code": 1, "docs": 1}, "labels": LABELS},
                   {"until": 1.0, "weights": {"code": 1, "docs": 3}, "labels": ["high", "medium-high"]}],
    })
    arms = data_quality.blends(config, TOKENS, 2000)
    for phases in arms.values():
        assert sum(data_quality.mean_weights(phases).values()) == pytest.approx(1)
    assert data_quality.mean_weights(arms["phased"]) == pytest.approx(data_quality.mean_weights(arms["random"]))
    assert len(arms["phased"]) == 2 and [len(arms[name]) for name in ("random", "top", "bottom")] == [1, 1, 1]
    for name, labels in (("top", ["high", "medium-high"]), ("bottom", ["medium-low", "low"])):
        weights = data_quality.mean_weights(arms[name])
        assert set(weights) == {f"train/{domain}-{label}" for domain in ("code", "docs") for label in labels}
        code = sum(weight for file, weight in weights.items() if "/code-" in file)
        assert code == pytest.approx(0.5 * 0.5 + 0.5 * 0.25)
    repeats = data_quality.most_repeats(arms["bottom"], TOKENS, 9000)
    assert repeats == pytest.approx(5625 / (4000 + 5000))       # of the docs


def test_phased_and_random_draw_the_same_text(token_files, tmp_path):
    tokens = token_files(tmp_path / "tokens")
    phased = json.loads((tokens / "blend.json").read_text())["phases"]
    drawn = []
    random = [{"until": 1.0, "weights": data_quality.mean_weights(phased)}]
    for name, phases in (("phased", phased), ("random", random)):
        data_quality.prepare(tmp_path / name, tokens, phases)
        data = TrainingData(tmp_path / name, 16, 200, 1, tmp_path / f"{name}.cache")
        drawn.append(Counter(tuple(data[sample].tolist()) for sample in range(200)))
    assert (drawn[0] & drawn[1]).total() >= 197         # to one sample a file, of rounding


def test_a_run_is_trained_measured_and_kept(token_files, tmp_path):
    tokens = token_files(tmp_path / "tokens")
    data_quality.prepare(tmp_path / "top", tokens, json.loads((tokens / "blend.json").read_text())["phases"])
    job = data_quality.run(data_quality.Job("top", 1, tmp_path / "top", MODEL, RECIPE))
    assert sorted(path.name for path in Path(tmp_path / "top").iterdir()) == [
        "blend.json", "seed-1.json", "token_bytes.npy", "tokens.json", "train", "validation"
    ]
    values = data_quality.bits_per_byte(job)
    sizes = {domain: entry["bytes"] for domain, entry in json.loads(job.result.read_text()).items()}
    assert values["all"] == pytest.approx((values["code"] * sizes["code"] + values["docs"] * sizes["docs"])
                                          / sum(sizes.values()))
    guess = math.log2(64) / 2.5                          # all ids alike, 2.5 bytes a token
    assert 0.3 * guess < values["all"] < 1.1 * guess
    assert data_quality.run(job).result.read_text() == job.result.read_text()


def test_summary_takes_differences_seed_by_seed(tmp_path, capsys):
    done = []
    for arm, bits in (("top", 2.0), ("bottom", 3.0), ("phased", 2.5), ("random", 2.25)):
        for seed in (1, 2):
            job = data_quality.Job(arm, seed, tmp_path / arm, MODEL, RECIPE)
            job.directory.mkdir(exist_ok=True)
            values = {"code": {"bits": 8 * (bits + seed), "bytes": 8}, "docs": {"bits": 2 * bits, "bytes": 2}}
            data_quality.write(job.result, values)
            done.append(job)
    figures = data_quality.summary(done)
    assert figures["bits_per_byte"]["top"] == {"code": [3, 4], "docs": [2, 2], "all": [2.8, 3.6]}
    assert figures["differences"]["labels"] == {"code": [-1, -1], "docs": [-1, -1], "all": [-1, -1]}
    assert figures["differences"]["order"]["all"] == [0.25, 0.25]
    data_quality.show(figures)
    shown = capsys.readouterr().out
    assert "| top | 3.5000 ± 0.7071 | 2.0000 ± 0.0000 | 3.2000 ± 0.5657 |" in shown
    assert "labels: top has fewer bits than bottom with 2 of 2 seeds, -23.81% on average" in shown      # 3.2 and 4.2
    assert "order: phased has fewer bits than random with 0 of 2 seeds" in shown
