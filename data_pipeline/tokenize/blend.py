"""How much of training each token file gives, phase by phase (paper section 2.2.3: four phases, each its own blend).

More tokens than a file holds mean that it is read again. The paper keeps that within 4 to 8 times; here `repeats` is
the bound, and what a file cannot give others do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.config import DataError, Phase

ROUNDING = 1e-9         # of a phase's tokens: sums of floats differ by less


def blend(phases: Sequence[Phase], tokens: Mapping[str, int], budget: int, repeats: float) -> dict[str, Any]:
    """Contents of blend.json for a training run of `budget` tokens.

    A phase gives a domain a weight and draws it from some quality labels: the domain's weight is divided among the
    files of those labels by their tokens, so that within a domain a phase passes once over all it may read before it
    repeats any. No file gives more than `repeats` times its tokens in all phases together. What it lacks comes from
    the other files of the domain that the phase may read, by their tokens; what they lack comes from the phase's other
    domains, by their weights. Later phases are served first: they may read the fewest files.

    Args:
        phases: what params.yaml says.
        tokens: tokens of each file, by the names of tokens.json (`train/DOMAIN-LABEL`).

    Returns:
        `tokens`: the budget; `phases`: `[{"until": share of training, "weights": {"train/code-high": weight}}]`, the
        weights of a phase summing to 1; `repeats`: `{"train/code-high": times the file is read}` for every training
        file, 0 for one that no phase reads.

    Raises:
        DataError: a phase weighs a domain that has no tokens in the phase's labels, or weighs nothing; no phase says
            what a domain weighs, be it 0; or the files cannot fill the budget.
    """
    sources = [files_of(number, phase, tokens) for number, phase in enumerate(phases)]
    domains = {name.removeprefix("train/").partition("-")[0] for name in tokens if name.startswith("train/")}
    if bare := sorted(domains.difference(*(phase.weights for phase in phases))):
        raise DataError(
            f"tokenize.phases: no weight for domain `{bare[0]}`, which is curated and would never be trained on.\n"
            "Give it one in a phase, 0 where that is meant, or take it out of annotate.sources."
        )
    room = {name: repeats * count for name, count in tokens.items()}
    drawn = dict.fromkeys((name for name in sorted(tokens) if name.startswith("train/")), 0.0)
    weights: list[dict[str, float]] = [{} for _ in phases]
    for number in reversed(range(len(phases))):
        phase, start = phases[number], phases[number - 1].until if number else 0.0
        amount = (phase.until - start) * budget
        limits = {domain: sum(room[name] for name in files) for domain, files in sources[number].items()}
        if sum(limits.values()) < amount * (1 - ROUNDING):
            raise DataError(_too_little(number, phase, amount, sum(limits.values()), repeats))
        for domain, share in share_out(amount, _positive(phase), limits).items():
            files = {name: tokens[name] for name in sources[number][domain]}
            for name, given in share_out(share, files, {name: room[name] for name in files}).items():
                weights[number][name] = given / amount
                room[name] = max(0.0, room[name] - given)
                drawn[name] += given
    return {
        "tokens": budget,
        "phases": [
            {"until": phase.until, "weights": dict(sorted(weights[number].items()))}
            for number, phase in enumerate(phases)
        ],
        "repeats": {name: given / tokens[name] if given else 0.0 for name, given in drawn.items()},
    }


def shortfalls(phases: Sequence[Phase], mixture: Mapping[str, Any], repeats: float) -> list[str]:
    """A line for each domain of a phase that gives less than its weight in `mixture`, what `blend` returned."""
    lines = []
    for number, (phase, mixed) in enumerate(zip(phases, mixture["phases"], strict=True)):
        asked = _positive(phase)
        for domain, weight in asked.items():
            share = weight / sum(asked.values())
            given = sum(part for name, part in mixed["weights"].items() if name.startswith(f"train/{domain}-"))
            if given < share * (1 - ROUNDING):
                lines.append(
                    f"tokenize.phases[{number}] (until {phase.until}): domain `{domain}`, read {repeats:g} times in "
                    f"all, gives {given:.4g} of the phase, not the {share:.4g} it weighs; the others give more.")
    return lines


def files_of(number: int, phase: Phase, tokens: Mapping[str, int]) -> dict[str, list[str]]:
    """Domain -> the files with tokens that phase `number` draws from. Raises DataError as `blend` does."""
    if min(phase.weights.values(), default=0.0) < 0 or not _positive(phase):
        raise DataError(
            f"tokenize.phases[{number}].weights: must not be negative and not all zero, got {phase.weights}.\n"
            "Give at least one domain a positive weight."
        )
    found = {}
    for domain in _positive(phase):
        found[domain] = [name for label in dict.fromkeys(phase.labels) if tokens.get(name := f"train/{domain}-{label}")]
        if not found[domain]:
            raise DataError(
                f"tokenize.phases[{number}] (until {phase.until}): domain `{domain}` has no tokens in the labels "
                f"{', '.join(phase.labels)}.\nTake the domain out of this phase, add labels to it, or curate more."
            )
    return found


def share_out(amount: float, weights: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """`amount` divided by `weights`, none above its limit; what one cannot take the others do, by their weights."""
    shares: dict[str, float] = {}
    waiting = dict(weights)
    while waiting:
        total = sum(waiting.values())
        full = [name for name, weight in waiting.items() if amount * (weight / total) > limits[name]]
        if not full:
            return shares | {name: amount * (weight / total) for name, weight in waiting.items()}
        for name in full:
            shares[name] = limits[name]
            amount = max(0.0, amount - limits[name])
            del waiting[name]
    return shares


def _positive(phase: Phase) -> dict[str, float]:
    return {domain: weight for domain, weight in phase.weights.items() if weight > 0}


def _too_little(number: int, phase: Phase, amount: float, available: float, repeats: float) -> str:
    return (
        f"tokenize.phases[{number}] (until {phase.until}): needs {amount:,.0f} tokens; its files, read {repeats:g} "
        f"times, give {available:,.0f} at most, beside what later phases take.\n"
        "Lower pretrain.tokens, raise tokenize.repeats, add labels or domains to the phase, or curate more."
    )
