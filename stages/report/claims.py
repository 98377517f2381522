"""The paper's claims, each with what was measured and an answer by a stated rule (`stages.report.statistics`).

An answer is computed from records, of this profile or of a study, and never written down. The words are in claims.toml.
What cannot be read leaves its own claim undecided, with the reader's message; the others are judged.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from data_pipeline.config import DataError
from model.compression.config import MemoryBudget
from model.costs import memory
from model.presets import PRESETS
from stages.report.records import RecordError, Records
from stages.report.statistics import (
    Answer,
    Decision,
    Estimate,
    Source,
    accuracy_gain,
    all_of,
    beats_chance,
    bits_per_byte_gain,
    controlled,
    equivalence,
    mean,
    over_seeds,
    superiority,
    tasks_equivalence,
    unpaired,
)
from stages.report.studies import Comparison, Measurement, Study

WORDS = tomllib.loads(Path(__file__).with_name("claims.toml").read_text())["claim"]
PUBLISHED = {"nemotron_h_8b": 8_100_852_736, "nemotron_h_56b": 56_324_350_464, "nemotron_h_47b": 46_791_554_816}
LOGITS_TOLERANCE = 1e-5             # of the largest
GIB, CARD_GIB, WEIGHTS_GIB = 2**30, 31.7, 29.5      # what is left of an RTX 5090; 56B's weights, as printed
LOSS_MARGIN, FP8_MARGIN = 0.01, 0.001               # shares of bits per byte
HYBRID_TASKS, FP8_TASKS, COMPRESSED_TASKS = 0.02, 0.01, 0.011


@dataclass(frozen=True)
class Evidence:
    """One line of ours: what was measured, its value, and the interval it is judged by."""

    measure: str
    ours: str
    interval: str = ""


@dataclass(frozen=True)
class Claim:
    """One row. `number`: of the list of 19, with a letter where it has parts; `because`: the figures that decided it,
    the smallest difference in sight, and, where undecided, what would decide; `command`: makes the figures again."""

    number: str
    key: str
    title: str
    paper: str
    source: str
    evidence: list[Evidence]
    rule: str
    answer: Answer
    because: str
    command: str


Finding = tuple[Answer, str, list[Evidence]]        # the last three of what a claim adds to its words
Show = Callable[[float], str]


def claims(records: Records, studies: Mapping[str, Study | RecordError]) -> list[Claim]:
    """Every claim, in the order of the table."""
    return [_claim(records, studies, **words) for words in WORDS]


def counts(found: Sequence[Claim]) -> dict[Answer, int]:
    return {answer: sum(claim.answer is answer for claim in found) for answer in Answer}


def _claim(records: Records, studies: Mapping[str, Study | RecordError], key: str, study: str = "", rule: str = "",
           command: str = "", **words: str) -> Claim:
    evidence: list[Evidence] = []
    try:
        if study:
            record = _study(studies, study)
            rule, command = _study_rule(record, key), f"{record.command} ({record.machine}, {record.date})"
            answer, because, evidence = judge_study(record, key)
        else:
            answer, because, evidence = JUDGES[key](records)
    except DataError as error:
        answer, because = Answer.UNDECIDED, str(error)
    return Claim(key=key, rule=rule, command=command, answer=answer, because=because, evidence=evidence, **words)


# --- Words ------------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:+.2f} %".replace("-", "−")


def points(value: float) -> str:
    return f"{100 * value:+.1f} points".replace("-", "−")


def plain(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def interval(decision: Decision, show: Show) -> str:
    low, high = decision.estimate.interval(decision.alpha)
    return "" if math.isnan(low) else f"{1 - decision.alpha:.0%} interval {show(low)} to {show(high)}"


def told(decision: Decision, show: Show) -> str:
    """The estimate, its interval, the smallest difference in sight, and what would decide."""
    text = show(decision.estimate.value)
    if math.isnan(decision.seen):
        single = [source.unit for source in decision.estimate.sources if math.isnan(source.variance)]
        return f"{text}; one {' and one '.join(single)} only, whose spread is unknown: 3 would be the least to tell"
    text += f" ({interval(decision, show)}; in sight from {show(decision.seen).lstrip('+')} on)"
    if decision.needed:
        named = " and ".join(f"{count:,} {unit}s" for unit, count in decision.needed.items())
        text += f"; about {named} would decide"
    return text


def with_control(decision: Decision, control: Decision | None, name: str, show: Show) -> tuple[Answer, str]:
    """Answer and reason of an equivalence beside its negative control."""
    if control is None:
        return Answer.UNDECIDED, f"{told(decision, show)}. No control: {name} was not measured"
    seen = "fails, as it must" if control.answer is Answer.FAILS else "is not seen to fail, so nothing is told"
    return (controlled(decision.answer, control.answer),
            f"{told(decision, show)}. The control ({name}) {seen}: {told(control, show)}")


# --- Models of one profile --------------------------------------------------------------------------------------------

Pair = tuple[str, str]              # candidate, reference


def variants(records: Records, architecture: str, precision: str, recipe: str | None = None) -> dict[int, str]:
    """By seed; `recipe`: the FP8 recipe of a control arm."""
    return {variant.seed: name for name, variant in records.params.variants.items() if recipe == getattr(
        variant, "fp8_recipe", None) and (variant.architecture, variant.precision) == (architecture, precision)}


def paired(candidates: Mapping[int, str], references: Mapping[int, str]) -> list[Pair]:
    return [(name, references[seed]) for seed, name in candidates.items() if seed in references]


def evaluated(records: Records, pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if set(pair) <= set(records.scores)]


def final(records: Records, variant: str) -> float:
    return records.metrics("pretrain", variant)["validation_bits_per_byte"]


def trained_gains(records: Records, pairs: Sequence[Pair]) -> list[float]:
    """Share of the reference's final validation bits per byte that the candidate saves, by pair."""
    return [1 - final(records, ours) / final(records, theirs) for ours, theirs in pairs]


def half_trained_loss(records: Records, variant: str) -> float:
    """Validation bits per byte at the evaluation that is nearest to half of the tokens, over the final ones."""
    curve = records.validation[variant]["all"]
    nearest = min(range(len(curve["tokens"])), key=lambda at: abs(curve["tokens"][at] - curve["tokens"][-1] / 2))
    return curve["bits_per_byte"][nearest] / curve["bits_per_byte"][-1]


def split_scores(records: Records, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(documents by domain, items by task) of an evaluated model; tasks of lengthened contexts left out."""
    scores = records.scores[name]
    texts = {task: rows for task, rows in scores.items() if task.startswith("bits_per_byte_")}
    return texts, {task: rows for task, rows in scores.items() if task not in texts and "_at_" not in task}


def same_items(gain: Callable[[Any, Any], Estimate], ours: Any, theirs: Any, pair: Pair) -> Estimate:
    try:
        return gain(ours, theirs)
    except (KeyError, ValueError):
        raise RecordError(f"evaluate/{pair[0]}/scores.json and evaluate/{pair[1]}/scores.json: not the same items.\n"
                          "Run the stage `evaluate` again for both.") from None


def documents(records: Records, pair: Pair) -> Estimate:
    """Gain in bits per byte over the documents both were evaluated on."""
    return same_items(bits_per_byte_gain, *(split_scores(records, name)[0] for name in pair), pair)


def unlearned(records: Records, names: Sequence[str]) -> list[str]:
    """Models that are not better than the compressor."""
    found = {name: records.metrics("evaluate", name) for name in names}
    return [name for name, of in found.items() if not of["bits_per_byte"] < of["bits_per_byte_compressor"]]


def loss(records: Records, pairs: list[Pair], margin: float, or_better: bool, broken: Sequence[float], control: str
         ) -> Finding:
    """Equivalence of final bits per byte over seeds and documents; `broken`: the control's gains."""
    if not (known := evaluated(records, pairs)):
        return Answer.UNDECIDED, "this profile does not train and evaluate both", []
    if names := unlearned(records, known[0]):
        return Answer.UNDECIDED, f"{' and '.join(names)} not better than the compressor", []
    gains, texts = trained_gains(records, pairs), documents(records, known[0])
    rule = partial(equivalence, margin=margin, or_better=or_better)
    decision = rule(over_seeds(mean(gains, "seed"), texts))
    seen = rule(over_seeds(mean(broken, "seed", gains if len(broken) == 1 else None), texts)) if broken else None
    answer, because = with_control(decision, seen, control, percent)
    evidence = [Evidence(f"bits per byte, {ours} / {theirs}",
                         f"{final(records, ours):.4f} / {final(records, theirs):.4f}", percent(gain))
                for (ours, theirs), gain in zip(pairs, gains, strict=True)]
    evidence.append(Evidence("bits per byte saved, mean over seeds", percent(decision.estimate.value),
                             interval(decision, percent)))
    return answer, because, evidence


def hybrid_loss(records: Records) -> Finding:
    transformers = variants(records, "transformer", "bf16")
    pairs = paired(variants(records, "hybrid", "bf16"), transformers)
    for pair in pairs:
        ours, theirs = (records.metrics("pretrain", name) for name in pair)
        if abs(ours["parameters"] / theirs["parameters"] - 1) > 0.05 or ours["tokens"] != theirs["tokens"]:
            return Answer.UNDECIDED, f"{' and '.join(pair)}: parameters or tokens are not alike", []
    broken = [1 - half_trained_loss(records, name) for name in transformers.values()]
    return loss(records, pairs, LOSS_MARGIN, True, broken, "each Transformer at half its tokens")


def fp8_pairs(records: Records, architecture: str, recipe: str | None = None) -> list[Pair]:
    return paired(variants(records, architecture, "fp8", recipe), variants(records, architecture, "bf16"))


def fp8_loss(records: Records, architecture: str) -> Finding:
    broken = trained_gains(records, fp8_pairs(records, architecture, "unscaled"))
    return loss(records, fp8_pairs(records, architecture), FP8_MARGIN, False, broken, "FP8 without scales")


def fp8_scaling(records: Records) -> Finding:
    pairs = paired(variants(records, "hybrid", "fp8"), variants(records, "hybrid", "fp8", "unscaled"))
    if not pairs:
        return Answer.UNDECIDED, "this profile does not train FP8 without scales", []
    gains = trained_gains(records, pairs)
    spread = trained_gains(records, fp8_pairs(records, "hybrid")) if len(gains) == 1 else None
    return ordered(superiority(mean(gains, "seed", spread)), "bits per byte saved by scales", percent)


def tasks(records: Records, pairs: list[Pair], margin: float, broken: Sequence[Pair], control: str, training: bool
          ) -> Finding:
    """Equivalence of the mean over tasks; `training`: over seeds too, and not of one given pair of models alone."""
    known, evidence = evaluated(records, pairs), []
    if not known:
        return Answer.UNDECIDED, "this profile does not evaluate both", []
    right = {name: split_scores(records, name)[1] for pair in [*known, *evaluated(records, broken)] for name in pair}
    counted = []
    for task, rows in right[known[0][0]].items():
        chance = records.metrics("evaluate", known[0][0])[f"{task}_accuracy_chance"]
        beaten = any(beats_chance(int(np.sum(right[name][task])), len(rows), chance) for name in known[0])
        counted += [task] if beaten else []
        evidence.append(Evidence(
            f"{task.replace('_', ' ')}, {' / '.join(known[0])}" + ("" if beaten else " (at a guess: not counted)"),
            " / ".join(f"{np.mean(right[name][task]):.3f}" for name in known[0]), f"{len(rows)} items"))
    if not counted:
        return Answer.UNDECIDED, "no task at which either model beats a guess", evidence

    def judged(of: Sequence[Pair], spread_of: Sequence[Pair]) -> Decision:
        by_task, gains = [], {pair: [] for pair in {*of, *spread_of}}
        for task in counted:
            for pair in gains:
                gains[pair].append(np.mean(right[pair[0]][task]) - np.mean(right[pair[1]][task]))
            by_task.append(same_items(accuracy_gain, *(
                np.mean([right[pair[side]][task] for pair in of], axis=0) for side in (0, 1)), of[0]))
        seeds = mean([float(np.mean(gains[pair])) for pair in of], "seed",
                     [float(np.mean(gains[pair])) for pair in spread_of] if len(of) == 1 else None)
        return tasks_equivalence(by_task, margin, seeds if training else None)

    decision, failing = judged(known, known), evaluated(records, broken)
    answer, because = with_control(decision, judged(failing, known) if failing else None, control, points)
    evidence.append(Evidence(f"mean over {len(counted)} tasks", points(decision.estimate.value),
                             interval(decision, points)))
    return answer, because, evidence


def hybrid_tasks(records: Records) -> Finding:
    transformers = variants(records, "transformer", "bf16")
    return tasks(records, paired(variants(records, "hybrid", "bf16"), transformers), HYBRID_TASKS,
                 paired(variants(records, "hybrid", "fp8", "unscaled"), transformers),
                 "the hybrid in FP8 without scales", True)


def fp8_tasks(records: Records) -> Finding:
    return tasks(records, fp8_pairs(records, "hybrid"), FP8_TASKS, fp8_pairs(records, "hybrid", "unscaled"),
                 "FP8 without scales", True)


# --- Compression, inference, release ----------------------------------------------------------------------------------


def compressed_loss(records: Records) -> Finding:
    parent = records.params.compress.parent
    if not evaluated(records, [("compressed", parent)]):
        return Answer.UNDECIDED, "this profile does not evaluate both", []
    decision = equivalence(documents(records, ("compressed", parent)), LOSS_MARGIN, True)
    cut = ("compressed-random", parent)
    control = equivalence(documents(records, cut), LOSS_MARGIN, True) if evaluated(records, [cut]) else None
    answer, because = with_control(decision, control, "the random cut", percent)
    return answer, because, [Evidence("bits per byte saved against the parent", percent(decision.estimate.value),
                                      interval(decision, percent))]


def compressed_tasks(records: Records) -> Finding:
    parent = records.params.compress.parent
    return tasks(records, [("compressed", parent)], COMPRESSED_TASKS, [("compressed-random", parent)],
                 "the random cut", False)


def ordered(decision: Decision, measure: str, show: Show) -> Finding:
    line = Evidence(measure, show(decision.estimate.value), interval(decision, show))
    return decision.answer, told(decision, show), [line]


def layer_importance(records: Records) -> Finding:
    layers, count = records.importance, records.params.compress.importance_samples
    decisions = []
    for end in (layers[0], layers[-1]):
        others = sorted((layer for layer in layers if layer is not end), key=lambda layer: -layer.importance)
        bar = others[math.ceil(len(layers) / 4) - 1]
        decisions.append(superiority(Estimate(end.importance - bar.importance, tuple(
            Source("sample", layer.standard_error**2, count, count - 1) for layer in (end, bar))), comparisons=2))
    named = list(zip(("first", "last"), decisions, strict=True))
    return (all_of([decision.answer for decision in decisions]),
            "; ".join(f"{which} layer: {told(decision, plain)}" for which, decision in named),
            [Evidence(f"importance of the {which} layer above the top quarter's least",
                      plain(decision.estimate.value), interval(decision, plain)) for which, decision in named])


def importance_random(records: Records) -> Finding:
    cuts = records.controls
    gain = unpaired([-math.log(cuts.importance)], [-math.log(value) for value in cuts.random], "draw")
    answer, because, evidence = ordered(superiority(gain), "KL to the parent just cut, random over chosen", times)
    return answer, because, [*evidence, Evidence(
        "KL just cut, by importance / at random / least important kept",
        f"{cuts.importance:.4f} / {float(np.mean(cuts.random)):.4f} / {cuts.reverse:.4f}", f"{len(cuts.random)} draws")]


def times(logarithm: float) -> str:
    return f"{math.exp(logarithm):.2f} times"


def speed_ratio(records: Records, model: str, other: str, context: int) -> Estimate:
    """Logarithm of how many times faster `model` decodes than `other`, over interleaved repeats."""
    ours, theirs = (records.decode_repeats[name][context] for name in (model, other))
    return mean(np.log(np.divide(theirs, ours)).tolist(), "repeat")


def inference_mechanism(records: Records) -> Finding:
    contexts = sorted(records.decode_repeats["hybrid"])
    if len(contexts) < 2:
        return Answer.UNDECIDED, "decoding was measured at one context only", []
    short, long = (speed_ratio(records, "hybrid", "transformer", context) for context in (contexts[0], contexts[-1]))
    growth = Estimate(long.value - short.value, long.sources + short.sources)
    found = [(f"at {contexts[-1]:,} tokens", superiority(long, comparisons=2)),
             (f"over that at {contexts[0]:,} tokens", superiority(growth, comparisons=2))]
    return (all_of([decision.answer for _, decision in found]),
            "; ".join(f"{where}: {told(decision, times)}" for where, decision in found),
            [Evidence(f"decoding, hybrid over Transformer, {where}", times(decision.estimate.value),
                      interval(decision, times)) for where, decision in found])


def compressed_decode(records: Records) -> Finding:
    longest = max(records.decode_repeats["hybrid"])
    return ordered(superiority(speed_ratio(records, "compressed", "hybrid", longest)),
                   f"decoding at {longest:,} tokens, compressed over parent", times)


def published_sizes(records: Records) -> Finding:
    found = {name: records.metrics("benchmark")[f"{name}_parameters"] for name in PUBLISHED}
    wrong = [name for name, count in found.items() if count != PUBLISHED[name]]
    for name in ("nemotron_h_8b", "nemotron_h_56b"):
        pattern = PRESETS[name].pattern
        if pattern[0] != "M" or pattern[-1] != "-" or pattern.count("*") != pattern.count("*-"):
            wrong.append(f"the pattern of {name}")
    return _exact(not wrong, "all equal, and the patterns keep the rules", f"{', '.join(wrong)} differ",
                  [Evidence(name, f"{count:,.0f}", "exact") for name, count in found.items()])


def million_tokens(_: Records) -> Finding:
    fp4 = MemoryBudget(context=1_000_000, batch=1, weight_bytes=4.5 / 8, kv_bytes=0.5, ssm_bytes=4, conv_bytes=2,
                       budget_fraction=0.5)
    small, large = (memory(PRESETS[f"nemotron_h_{size}"], fp4) for size in ("47b", "56b"))
    right = abs(large.weights / GIB - WEIGHTS_GIB) < 0.05 and small.total <= CARD_GIB * GIB < large.total
    text = f"56B {large.weights / GIB:.3f} GiB of weights, {large.total / GIB:.1f} in all; 47B {small.total / GIB:.1f}"
    return _exact(right, text, text, [Evidence("weights and caches at 1,000,000 tokens", text, "closed form")])


def release_forms(records: Records) -> Finding:
    found = {name: records.metrics("export", name)["logits_max_relative_difference"] for name in records.params.models}
    wrong = [name for name, difference in found.items() if not difference <= LOGITS_TOLERANCE]
    return _exact(not wrong, f"all {len(found)} models agree", f"{', '.join(wrong)} differ by more",
                  [Evidence(name, f"{difference:.1e}", f"≤ {LOGITS_TOLERANCE:.0e}")
                   for name, difference in found.items()])


def _exact(right: bool, holds: str, fails: str, evidence: list[Evidence]) -> Finding:
    return (Answer.HOLDS, holds, evidence) if right else (Answer.FAILS, fails, evidence)


JUDGES: dict[str, Callable[[Records], Finding]] = {
    "published_sizes": published_sizes, "hybrid_loss": hybrid_loss, "hybrid_tasks": hybrid_tasks,
    "inference_mechanism": inference_mechanism, "compressed_decode": compressed_decode,
    "fp8_loss": partial(fp8_loss, architecture="hybrid"),
    "fp8_loss_transformer": partial(fp8_loss, architecture="transformer"), "fp8_scaling": fp8_scaling,
    "fp8_tasks": fp8_tasks, "layer_importance": layer_importance, "importance_random": importance_random,
    "compressed_loss": compressed_loss, "compressed_tasks": compressed_tasks, "memory": million_tokens,
    "release_forms": release_forms,
}


# --- Studies ----------------------------------------------------------------------------------------------------------


def _study(studies: Mapping[str, Study | RecordError], name: str) -> Study:
    found = studies.get(name)
    if found is None:
        raise RecordError(f"Not measured here: docs/results/studies/{name}.json does not exist.\nRun that study.")
    if isinstance(found, RecordError):
        raise found
    return found


def _study_rule(study: Study, key: str) -> str:
    """In words, from the comparisons themselves."""
    asked = {"better": "better than", "equal": "equal to", "not worse": "not worse than"}
    texts = [f"{item.candidate} {asked[item.question]} {item.reference}"
             + (f" by {percent(item.margin) if item.relative else plain(item.margin)}".replace("+", "")
                if item.margin else "") + (f" (control that must fail: {item.control})" if item.control else "")
             for item in study.comparisons if item.claim == key]
    return f"All of: {'; '.join(texts)}. {study.note}".strip()


def judge_study(study: Study, key: str) -> Finding:
    """All comparisons of the claim must hold; those at a guess's level are shown and not counted."""
    asked = [item for item in study.comparisons if item.claim == key]
    answers, reasons, evidence = [], [], []
    for item in asked:
        show = (lambda value: percent(math.expm1(value))) if item.relative else plain
        decision = compared(study, item, item.candidate, len(asked))
        line = f"{item.candidate} against {item.reference}"
        evidence.append(Evidence(line, show(decision.estimate.value), interval(decision, show)))
        measured = [study.measurement(name) for name in (item.candidate, item.reference) if isinstance(name, str)]
        if all(at_chance(one) for one in measured):
            reasons.append(f"{line}: at a guess, not counted")
        elif item.question == "better":
            answers.append(decision.answer)
            reasons.append(f"{line}: {told(decision, show)}")
        else:
            control = compared(study, item, item.control, 1) if item.control else None
            answer, because = with_control(decision, control, item.control or "a broken arm", show)
            answers.append(answer)
            reasons.append(f"{line}: {because}")
    return all_of(answers), "; ".join(reasons) or "the study compares nothing for this claim", evidence


def at_chance(measured: Measurement) -> bool:
    if measured.chance is None:
        return False
    low, high = mean(measured.values, measured.per).interval(0.05)
    return not (low > measured.chance if measured.better == "higher" else high < measured.chance)


def compared(study: Study, item: Comparison, candidate: str, comparisons: int) -> Decision:
    """`candidate`, the comparison's own or its control, against the reference."""
    measured = study.measurement(candidate)
    scale: Callable[[Any], Any] = np.log if item.relative else np.asarray
    sign = 1 if measured.better == "higher" else -1

    def values(name: str) -> list[float]:
        return (sign * scale(study.measurement(name).values)).tolist()

    def gains(name: str) -> list[float]:
        reference = values(item.reference) if isinstance(item.reference, str) else None
        fixed = float(sign * scale(item.reference)) if reference is None else 0.0
        return [value - (reference[at] if reference else fixed) for at, value in enumerate(values(name))]

    if isinstance(item.reference, str) and not item.paired:
        gain = unpaired(values(candidate), values(item.reference), measured.per)
    else:
        few = len(measured.values) == 1 and candidate == item.control
        gain = mean(gains(candidate), measured.per, gains(item.candidate) if few else None)
    margin = math.log1p(item.margin) if item.relative else item.margin
    if item.question == "better":
        return superiority(gain, margin, comparisons)
    return equivalence(gain, margin, item.question == "not worse", comparisons)
