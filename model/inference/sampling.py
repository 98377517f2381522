"""How the next token is chosen from its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelError

SMALLEST = 1e-30        # temperature: below it logits / temperature overflow, and all probability is the likeliest's


class Sampling(NamedTuple):
    """Draw from softmax(logits / temperature) among the likeliest tokens.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: tokens drawn from at most; 0: all.
        top_p: draw from the fewest likeliest tokens that together have this probability (nucleus, arXiv 1904.09751),
            counted after `top_k`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Raise ModelError for a value without a meaning."""
        for name, value, fine, wanted in (
            ("temperature", self.temperature, self.temperature >= 0, "0 (the likeliest token) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
        ):
            if not fine:
                raise ModelError(f"{name} is {value:g}.\nMake it {wanted}.")


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token ids (batch,) of logits (batch, vocab); -1, which no wait for a GPU is needed to say, where
    one is NaN or infinite: of these `argmax` takes any. `checked` refuses it."""
    most, ids = logits.max(-1)
    return ids.where(most.isfinite(), -1)


def checked(token: int) -> int:
    """`token`. Raises ModelError where the logits were no numbers."""
    if token < 0:
        raise ModelError("Logits are not finite: activations overflow.\n"
                         "Check the weights, and that the tokenizer is the model's own.")
    return token


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Token ids (batch,) from logits (batch, vocab); at temperature 0 those of `likeliest`."""
    if sampling.temperature < SMALLEST:
        return likeliest(logits)
    scaled = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
    ranked, ids = scaled.topk(min(sampling.top_k or scaled.shape[-1], scaled.shape[-1]))
    probabilities = ranked.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities         # of all tokens before this one; 0 for the first
    kept = probabilities.masked_fill((likelier >= sampling.top_p) & (likelier > 0), 0)     # float32 has 0 for 1e-46
    return ids.gather(1, torch.multinomial(kept, 1, generator=generator))[:, 0]
