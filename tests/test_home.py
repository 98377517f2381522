"""Every command of docs/home.md, one after the other, on a small Nemotron-H that stock Megatron saved."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from stock_megatron import save, stock_model

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenize import tokenizer
from model import hub
from model.checkpoint import read_description
from model.megatron_lm import open_megatron
from tests.data_pipeline.small_corpus import byte_level_bpe, write_curated
from tests.forked import run
from tests.stages.tiny_corpus import write_params

ROOT = Path(__file__).parent.parent
SIZES = {
    "evaluate.items_per_task": 8, "evaluate.bits_per_byte_kilobytes": 4, "evaluate.context_tokens": 64,
    "evaluate.recall_pairs": 4, "evaluate.items_per_context": 4, "evaluate.paper_items": 1,
    "evaluate.reference_share": 0, "evaluate.context_multiples": [1, 2], "tokenizer.vocab_size": 512,
    "pretrain.tokens": 64_000, "tokenize.validation_kilobytes_per_domain": 8,
    "compress.importance_samples": 4, "compress.ffn_importance_samples": 8, "compress.ffn_widths": [48, 64, 80],
    "compress.validation_samples": 8, "compress.ranking_samples": 4, "compress.ranked_by_agreement": 3,
    "compress.ranked_by_task": 2, "compress.task_items": 8, "compress.short_distillation_tokens": 256,
    "compress.distillation_tokens": 512, "compress.global_batch_size": 4, "compress.micro_batch_size": 4,
    "compress.random_draws": 2,
    "compress.memory": {"context": 64, "batch": 1, "weight_bits": 16, "kv_bits": 16, "ssm_bits": 32, "conv_bits": 16,
                        "budget_fraction": 0.9},
}
# Between an attention layer's neighbours others can go.
MODEL = {"num_layers": 7, "hybrid_override_pattern": "M-M*-M-", "vocab_size": 512, "padded_vocab_size": 640}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a profile's data, a Megatron run in `saved` and the same model in `downloaded`."""
    directory = tmp_path_factory.mktemp("home")
    write_params(directory, **SIZES)
    curated = write_curated(directory / "data/tiny/curated")
    pieces = directory / "data/tiny/tokenizer"
    pieces.mkdir()
    tokenizer.train(curated, TokenizerConfig(vocab_size=512, training_megabytes=1), 1, pieces)
    run(directory, "-m", "stages.items")
    with stock_model(**MODEL) as model:
        save(directory / "saved", model, **MODEL)
    imported = open_megatron(directory / "saved")
    hub.save(directory / "downloaded", imported.config, imported.state, {}, "float32")
    (directory / "downloaded/training.json").unlink()
    texts = [text for file in curated.rglob("*.parquet") for text in pq.read_table(file)["text"].to_pylist()]
    byte_level_bpe(texts, MODEL["vocab_size"]).save(str(directory / "downloaded/tokenizer.json"))
    return directory


def serve(directory: Path, arguments: list[str]) -> None:
    """Both models write, and Ctrl-C ends it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, *arguments, "--port", "0"], cwd=directory, env=environment, text=True,
                          stdout=subprocess.PIPE) as serving:
        try:
            assert serving.stdout
            url = serving.stdout.readline().strip()
            for model in ("parent", "compressed"):
                body = {"model": model, "prompt": "def main(", "max_tokens": 4, "ignore_eos": True}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
                assert answer["usage"]["completion_tokens"] == 4, answer
            serving.send_signal(signal.SIGINT)
            assert serving.wait(30) == 0
        finally:
            serving.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_page_works(directory: Path) -> None:
    page = (ROOT / "docs/home.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) == 10
    for program, *arguments in commands:
        assert program == "python"
        if "model.serve" in arguments:
            serve(directory, arguments)
            continue
        done = run(directory, *arguments, check=False)
        assert done.returncode == 0, (arguments, done.stderr[-2000:])
    config, training = read_description(directory / "mine/data/checkpoints/hybrid-bf16")
    assert config == read_description(directory / "again/data/checkpoints/hybrid-bf16")[0]
    assert config.vocab_size == 512 and training == {"imported_from": "downloaded"}
    metrics = json.loads((directory / "mine/runs/evaluate/hybrid-bf16/metrics.json").read_text())
    assert metrics["bits_per_byte_code"] > 1
    tokens = json.loads((directory / "mine/data/tokens/tokens.json").read_text())
    made_by = hashlib.sha256((directory / "downloaded/tokenizer.json").read_bytes()).hexdigest()
    assert (tokens["tokenizer_digest"], tokens["vocab_size"], tokens["eod_id"]) == (made_by, 512, 2)
    smaller, training = read_description(directory / "mine/data/checkpoints/compressed")
    assert training["parent_training"] == {"imported_from": "downloaded"} and smaller != config
    exported = directory / "mine/data/hub/compressed"
    assert (exported / "tokenizer.json").read_bytes() == (directory / "downloaded/tokenizer.json").read_bytes()
    assert "The weights of `downloaded`, compressed" in (exported / "README.md").read_text()
    assert open_megatron(directory / "mine/megatron").config == config
