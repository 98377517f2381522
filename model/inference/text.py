"""What stands between a Hub directory and a decoder that writes text: checks, the weights, the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tokenizers import Tokenizer

from model import hub
from model.config import ModelConfig, ModelError
from model.costs import weights_bytes
from model.hybrid_lm import HybridLM
from model.inference.decoder import piece_tokens
from model.inference.fp8_weights import LEAST_WIDTH, quantize_weights
from model.inference.sampling import checked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}     # fp8: weights alone
GIB = 2**30
UNKNOWN = "\ufffd"              # what a decoder makes of bytes that are no character
MOST_HELD = 8                   # tokens that wait for the rest of a character, which may begin behind stray bytes


class Vocabulary(NamedTuple):
    """A tokenizer, and the ids that stand before and after a text."""

    tokenizer: Tokenizer
    start_id: int | None        # before every text
    end_ids: list[int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the start's before them."""
        start = [] if self.start_id is None else [self.start_id]
        return start + list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def read_vocabulary(directory: Path, config: ModelConfig) -> Vocabulary:
    """The tokenizer of `directory`. Raises ModelError unless every id of it is one of the model's."""
    tokenizer = hub.check_vocabulary(directory, config.vocab_size)
    tokenizer.encode_special_tokens = True          # text that spells a control token stays text
    return Vocabulary(tokenizer, hub.begin_id(directory, config.vocab_size), hub.end_ids(directory, config.vocab_size))


class Characters:
    """The text of tokens that come one by one, as it goes on after that of `before`.

    Tokens are decoded behind those that came before them: a decoder such as Llama's takes the blank off the first.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()):
        self._tokenizer = vocabulary.tokenizer
        last = (list(before[-size:]) for size in range(1, MOST_HELD + 1))      # bytes of a character among them
        self._before = next((ids for ids in last if UNKNOWN not in self._decode(ids)), [])
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What is whole characters with `token`; "" where the last of the tokens begin one, and they are few."""
        self._waiting.append(token)
        text = self._decode(self._before + self._waiting)[len(self._decode(self._before)) :]
        if text.endswith(UNKNOWN):
            return self.rest() if len(self._waiting) == MOST_HELD else ""
        self._before, self._waiting = self._waiting, []
        return text

    def rest(self) -> str:
        """The text of the tokens that make no whole character."""
        text = self._decode(self._before + self._waiting)[len(self._decode(self._before)) :]
        self._waiting = []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def pieces(vocabulary: Vocabulary, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Text of the tokens after those of `before`, up to the end of text, as soon as they make whole characters."""
    characters = Characters(vocabulary, before)
    for token in ids:
        if token in vocabulary.end_ids:
            break
        if text := characters.add(checked(token)):
            yield text
    if text := characters.rest():
        yield text


def check_directory(directory: Path, dtype: str) -> ModelConfig:
    """The geometry of a directory whose weights' headers fit it. Raises ModelError, also for FP8 weights of a model
    they only slow down."""
    config = hub.read_config(directory)
    if dtype == "fp8" and config.hidden_size < LEAST_WIDTH:
        raise ModelError(f"dtype: FP8 weights are known to be faster than BF16 from width {LEAST_WIDTH} on, this model "
                         f"is {config.hidden_size} wide.\nTake --dtype bfloat16.")
    hub.check_files(directory, config)
    return config


def load_model(directory: Path, config: ModelConfig, dtype: str, device: torch.device) -> HybridLM:
    """The model in `directory`; dtype is one of DTYPES, of the weights; "fp8" rounds those of the layers."""
    model = HybridLM.from_state(config, hub.load(directory, dtype=None)[1], DTYPES[dtype]).requires_grad_(False)
    model.to(device)
    if dtype == "fp8":
        quantize_weights(model.backbone.layers)
    return model


def check_memory(
    asked: str, caches: Mapping[str, int], config: ModelConfig, prompt: int, dtype: str, device: torch.device, cure: str
) -> None:
    """Raise ModelError when weights, `caches` (bytes by name) and the activations of reading `prompt` tokens are more
    than the device has free: two lines, of what was `asked` and of the `cure`."""
    needed = {"weights": weights_bytes(config, DTYPES[dtype], dtype == "fp8"), **caches,
              "activations": activation_bytes(config, prompt, DTYPES[dtype], device)}
    free = free_bytes(device)
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
        raise ModelError(f"{asked} need {sum(needed.values()) / GIB:.2f} GiB ({parts}), "
                         f"{device.type} has {free / GIB:.2f} free.\n{cure}")


def activation_bytes(config: ModelConfig, prompt: int, dtype: torch.dtype, device: torch.device) -> int:
    """About what reading a prompt takes beside weights and caches: a piece of it in the widest layer, the logits."""
    piece = min(prompt, piece_tokens(device))
    widths = [4 * config.ffn_hidden_size]
    if "M" in config.pattern:
        scan = config.mamba_inner_size * (config.mamba_state_dim // min(config.chunk_size, piece) + 1)
        decay = config.mamba_num_heads * min(config.chunk_size, piece)
        widths.append(2 * config.in_proj_size + 2 * scan + (0 if device.type == "cuda" else 4 * decay))
    if "*" in config.pattern:
        mask = 0 if device.type == "cuda" else prompt
        widths.append(3 * config.attention_size + mask)
    return (piece * (max(widths) + 4 * config.hidden_size) + 4 * config.vocab_size) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on `device`, or of the machine's. Raises ModelError where there is no GPU."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelError("--device cuda: PyTorch has no GPU here.\nTake --device cpu.")
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
