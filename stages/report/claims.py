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
from stages.report import statistics
from stages.report.records import RecordError, Records
from stages.report.statistics import Answer, Decision, Estimate, Source, equivalence, mean, over_seeds, superiority
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


Finding = tuple[Answer, str, list[Evidence]]        # answer, because, evidence
Show = Callable[[float], str]
Pair = tuple[str, str]                              # models: candidate, reference


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
            command = command or f"python -m benchmarks.studies {study}"
            rule = "All comparisons of the study must hold."
            record = studies.get(study) or RecordError(f"Not measured here: there is no study {study}.\nRun {command}.")
            if isinstance(record, RecordError):
                raise record
            rule, command = _study_rule(record, key), f"{record.command} ({record.machine}, {record.date})"
            answer, because, evidence = judge_study(record, key)
        else:
            answer, because, evidence = JUDGES[key](records)
    except (ValueError, LookupError, ArithmeticError) as error:
        answer = Answer.UNDECIDED
        because = str(error) if isinstance(error, DataError) else (
            f"A record is not as expected ({error!r}).\nRun `{command}` again.")
    return Claim(key=key, rule=rule, command=command, answer=answer, because=because, evidence=evidence, **words)


# --- Words ------------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:+.3g} %".replace("-", "−")


def points(value: float) -> str:
    return f"{100 * value:+.1f} points".replace("-", "−")


def plain(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def times(logarithm: float) -> str:
    return f"{math.exp(logarithm):.2f} times"


def line(measure: str, decision: Decision, show: Show) -> Evidence:
    return Evidence(measure, show(decision.estimate.value), interval(decision, show))


def interval(decision: Decision, show: Show) -> str:
    low, high = decision.estimate.interval(decision.alpha)
    return "" if math.isnan(low) else f"{1 - decision.alpha:.0%} interval {show(low)} to {show(high)}"


def told(decision: Decision, show: Show) -> str:
    """The estimate, its interval, the smallest difference in sight, and what would decide."""
    text = show(decision.estimate.value)
    if math.isnan(decision.seen):
        single = [source.unit for source in decision.estimate.sources if math.isnan(source.variance)]
        return f"{text}; one {' and one '.join(single)} only, or all alike: the spread is unknown, 3 would be the least"
    text += f" ({interval(decision, show)}; smallest difference in sight {show(decision.seen).lstrip('+')})"
    if decision.needed:
        named = " and ".join(f"{count:,} {unit}s" for unit, count in decision.needed.items())
        text += f"; about {named} would decide"
    return text


def with_control(decision: Decision, control: Decision | None, name: str, show: Show) -> tuple[Answer, str]:
    """Answer and reason of an equivalence beside its negative control."""
    if control is None:
        return Answer.UNDECIDED, f"{told(decision, show)}. No control: {name} was not measured"
    seen = "fails, as it must" if control.answer is Answer.FAILS else "is not seen to fail, so nothing is told"
    return (statistics.controlled(decision.answer, control.answer),
            f"{told(decision, show)}. The control ({name}) {seen}: {told(control, show)}")


def in_order(show: Show, decisions: Mapping[str, Decision]) -> Finding:
    """Of order claims that must all hold, by what was measured."""
    return (statistics.all_of([decision.answer for decision in decisions.values()]),
            "; ".join(f"{name}: {told(decision, show)}" for name, decision in decisions.items()),
            [line(name, decision, show) for name, decision in decisions.items()])


# --- Models of one profile --------------------------------------------------------------------------------------------


def variants(records: Records, architecture: str, precision: str, recipe: str | None = None) -> dict[int, str]:
    """By seed; `recipe`: the FP8 recipe of a control arm."""
    return {variant.seed: name for name, variant in records.params.variants.items() if recipe == getattr(
        variant, "fp8_recipe", None) and (variant.architecture, variant.precision) == (architecture, precision)}


def by_seed(candidates: Mapping[int, str], references: Mapping[int, str]) -> list[Pair]:
    return [(name, references[seed]) for seed, name in candidates.items() if seed in references]


def fp8_pairs(records: Records, architecture: str, recipe: str | None = None) -> list[Pair]:
    return by_seed(variants(records, architecture, "fp8", recipe), variants(records, architecture, "bf16"))


def evaluated(records: Records, pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if set(pair) <= set(records.scores)]


def learned(records: Records, *models: str) -> None:
    """Raises DataError for a model that is no better than the compressor, which nothing can be told of."""
    for model in models:
        metrics = records.metrics("evaluate", model)
        if not metrics["bits_per_byte"] < metrics["bits_per_byte_compressor"]:
            raise DataError(f"{model} learned nothing: it is not better than a compressor.\nTrain it on more tokens.")


def trained_gains(records: Records, pairs: Sequence[Pair]) -> list[float]:
    """Share of the reference's final validation bits per byte that the candidate saves, by pair."""
    final = {name: records.metrics("pretrain", name)["validation_bits_per_byte"] for pair in pairs for name in pair}
    return [1 - final[ours] / final[theirs] for ours, theirs in pairs]


def half_trained_gain(records: Records, variant: str) -> float:
    """As `trained_gains`, of the same model at the evaluation that is nearest to half of its tokens."""
    curve = records.validation[variant]["all"]
    nearest = min(range(len(curve["tokens"])), key=lambda at: abs(curve["tokens"][at] - curve["tokens"][-1] / 2))
    return 1 - curve["bits_per_byte"][nearest] / curve["bits_per_byte"][-1]


def same_items(pair: Pair, gain: Callable[[], Estimate]) -> Estimate:
    try:
        return gain()
    except (KeyError, ValueError):
        raise RecordError(f"evaluate/{pair[0]}/scores.json and evaluate/{pair[1]}/scores.json: not the same items.\n"
                          "Run the stage `evaluate` again for both.") from None


def documents(records: Records, pair: Pair) -> Estimate:
    """Gain in bits per byte over the documents both were evaluated on."""
    ours, theirs = ({name: rows for name, rows in records.scores[model].items() if name.startswith("bits_per_byte_")}
                    for model in pair)
    return same_items(pair, lambda: statistics.bits_per_byte_gain(ours, theirs))


def loss(records: Records, pairs: list[Pair], margin: float, or_better: bool, broken: Sequence[float], control: str
         ) -> Finding:
    """Equivalence of final bits per byte over seeds and documents; `broken`: the control's gains."""
    if not (known := evaluated(records, pairs)):
        return Answer.UNDECIDED, "this profile does not train and evaluate both", []
    learned(records, *known[0])
    gains, texts = trained_gains(records, pairs), documents(records, known[0])
    rule = partial(equivalence, margin=margin, or_better=or_better)
    decision = rule(over_seeds(mean(gains, "seed"), texts))
    seen = rule(over_seeds(mean(broken, "seed", gains if len(broken) == 1 else None), texts)) if broken else None
    rows = [Evidence(f"bits per byte saved, {' / '.join(pair)}", percent(gain))
            for pair, gain in zip(pairs, gains, strict=True)]
    return *with_control(decision, seen, control, percent), [line("mean over seeds", decision, percent), *rows]


def hybrid_loss(records: Records) -> Finding:
    transformers = variants(records, "transformer", "bf16")
    pairs = by_seed(variants(records, "hybrid", "bf16"), transformers)
    for pair in pairs:
        ours, theirs = (records.metrics("pretrain", name) for name in pair)
        if abs(ours["parameters"] / theirs["parameters"] - 1) > 0.05 or ours["tokens"] != theirs["tokens"]:
            return Answer.UNDECIDED, f"{' and '.join(pair)}: parameters or tokens are not alike", []
    broken = [half_trained_gain(records, name) for name in transformers.values()]
    return loss(records, pairs, LOSS_MARGIN, True, broken, "each Transformer at half its tokens")


def fp8_loss(records: Records, architecture: str) -> Finding:
    broken = trained_gains(records, fp8_pairs(records, architecture, "unscaled"))
    return loss(records, fp8_pairs(records, architecture), FP8_MARGIN, False, broken, "FP8 without scales")


def fp8_scaling(records: Records) -> Finding:
    pairs = by_seed(variants(records, "hybrid", "fp8"), variants(records, "hybrid", "fp8", "unscaled"))
    if not pairs:
        return Answer.UNDECIDED, "this profile does not train FP8 without scales", []
    spread = trained_gains(records, fp8_pairs(records, "hybrid")) if len(pairs) == 1 else None
    gain = mean(trained_gains(records, pairs), "seed", spread)
    return in_order(percent, {"bits per byte saved by scales": superiority(gain)})


def tasks(records: Records, pairs: list[Pair], margin: float, broken: Sequence[Pair], control: str,
          training: bool = True) -> Finding:
    """Equivalence of the mean over tasks; `training`: over seeds too, and not of one given pair of models alone."""
    known, failing, rows = evaluated(records, pairs), evaluated(records, broken), []
    if not known:
        return Answer.UNDECIDED, "this profile does not evaluate both", []
    counted, models = [], known[0]
    learned(records, *models)
    for task, right in records.scores[models[0]].items():
        if task.startswith("bits_per_byte_") or "_at_" in task:     # texts, and tasks of lengthened contexts
            continue
        chance = records.metrics("evaluate", models[0])[f"{task}_accuracy_chance"]
        answers = [records.scores[model][task] for model in models]
        beaten = any(statistics.beats_chance(int(np.sum(each)), len(each), chance) for each in answers)
        counted += [task] if beaten else []
        name = f"{task.replace('_', ' ')}, {' / '.join(models)}" + ("" if beaten else " (a guess: not counted)")
        rows.append(Evidence(name, " / ".join(f"{np.mean(each):.3f}" for each in answers), f"{len(right)} items"))
    if not counted:
        return Answer.UNDECIDED, "no task at which either model beats a guess", rows

    def gains(of: Sequence[Pair], task: str) -> list[float]:
        return [float(np.mean(records.scores[ours][task]) - np.mean(records.scores[theirs][task]))
                for ours, theirs in of]

    def items(of: Sequence[Pair], task: str) -> Estimate:
        ours, theirs = (np.mean([records.scores[model][task] for model in side], 0) for side in zip(*of, strict=True))
        return statistics.accuracy_gain(ours, theirs)

    def judged(of: Sequence[Pair]) -> Decision:
        by_task = [same_items(of[0], partial(items, of, task)) for task in counted]
        overall = statistics.average(by_task)
        if training:
            found = np.array([gains(of, task) for task in counted])
            spread = np.array([gains(known, task) for task in counted]) if len(of) == 1 else found
            by_task = [over_seeds(mean(one, "seed", drawn), item)
                       for one, drawn, item in zip(found, spread, by_task, strict=True)]
            overall = over_seeds(mean(found.mean(0), "seed", spread.mean(0)), overall)
        return statistics.tasks_equivalence(by_task, overall, margin)

    decision = judged(known)
    answer, because = with_control(decision, judged(failing) if failing else None, control, points)
    return answer, because, [line(f"mean over {len(counted)} counted", decision, points), *rows]


def hybrid_tasks(records: Records) -> Finding:
    transformers = variants(records, "transformer", "bf16")
    return tasks(records, by_seed(variants(records, "hybrid", "bf16"), transformers), HYBRID_TASKS,
                 by_seed(variants(records, "hybrid", "fp8", "unscaled"), transformers), "the hybrid in unscaled FP8")


def fp8_tasks(records: Records) -> Finding:
    return tasks(records, fp8_pairs(records, "hybrid"), FP8_TASKS, fp8_pairs(records, "hybrid", "unscaled"),
                 "FP8 without scales")


# --- Compression, inference, release ----------------------------------------------------------------------------------


def compressed_loss(records: Records) -> Finding:
    learned(records, records.params.compress.parent)
    both = [("compressed", records.params.compress.parent), ("compressed-random", records.params.compress.parent)]
    found = [equivalence(documents(records, pair), LOSS_MARGIN, True) if evaluated(records, [pair]) else None
             for pair in both]
    if found[0] is None:
        return Answer.UNDECIDED, "this profile does not evaluate both", []
    return *with_control(found[0], found[1], "the random cut", percent), [
        line("bits per byte saved against the parent", found[0], percent)]


def compressed_tasks(records: Records) -> Finding:
    parent = records.params.compress.parent
    return tasks(records, [("compressed", parent)], COMPRESSED_TASKS, [("compressed-random", parent)],
                 "the random cut", training=False)


def layer_importance(records: Records) -> Finding:
    learned(records, records.params.compress.parent)
    layers, count = records.importance, records.params.compress.importance_samples
    found = []
    for end in (layers[0], layers[-1]):
        others = sorted((layer for layer in layers if layer is not end), key=lambda layer: -layer.importance)
        bar = others[math.ceil(len(layers) / 4) - 1]
        found.append(superiority(Estimate(end.importance - bar.importance, tuple(
            Source("sample", layer.standard_error**2, count, count - 1) for layer in (end, bar))), comparisons=2))
    return in_order(plain, {f"{which} layer's importance above the top quarter's least": decision
                            for which, decision in zip(("first", "last"), found, strict=True)})


def importance_random(records: Records) -> Finding:
    learned(records, records.params.compress.parent)
    cuts = records.controls
    gain = statistics.unpaired([-math.log(cuts.importance)], [-math.log(value) for value in cuts.random], "draw")
    answer, because, evidence = in_order(times, {"KL just cut, at random over chosen": superiority(gain)})
    shown = f"{cuts.importance:.4f} / {float(np.mean(cuts.random)):.4f} / {cuts.reverse:.4f}"
    return answer, because, [*evidence, Evidence("KL by importance / at random / least important kept", shown,
                                                 f"{len(cuts.random)} draws")]


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
    return in_order(times, {f"hybrid over Transformer at {contexts[-1]:,} tokens": superiority(long, comparisons=2),
                            f"that over the same at {contexts[0]:,}": superiority(growth, comparisons=2)})


def compressed_decode(records: Records) -> Finding:
    longest = max(records.decode_repeats["hybrid"])
    gain = speed_ratio(records, "compressed", "hybrid", longest)
    return in_order(times, {f"compressed over parent at {longest:,} tokens": superiority(gain)})


def exact(wrong: Sequence[str], right: str, evidence: list[Evidence]) -> Finding:
    return Answer.FAILS if wrong else Answer.HOLDS, f"{', '.join(wrong)} differ" if wrong else right, evidence


def published_sizes(records: Records) -> Finding:
    found = {name: records.metrics("benchmark")[f"{name}_parameters"] for name in PUBLISHED}
    patterns = {f"the pattern of {name}": PRESETS[name].pattern for name in ("nemotron_h_8b", "nemotron_h_56b")}
    wrong = [name for name, count in found.items() if count != PUBLISHED[name]]
    wrong += [name for name, pattern in patterns.items() if not (
        pattern[0] == "M" and pattern[-1] == "-" and pattern.count("*") == pattern.count("*-"))]
    return exact(wrong, "all equal, and the patterns keep the rules",
                 [Evidence(name, f"{count:,.0f}", "exact") for name, count in found.items()])


def million_tokens(_: Records) -> Finding:
    fp4 = MemoryBudget(context=1_000_000, batch=1, weight_bits=4.5, kv_bits=4, ssm_bits=32, conv_bits=16,
                       budget_fraction=0.5)
    small, large = (memory(PRESETS[f"nemotron_h_{size}"], fp4) for size in ("47b", "56b"))
    right = abs(large.weights / GIB - WEIGHTS_GIB) < 0.05 and small.total <= CARD_GIB * GIB < large.total
    text = f"56B {large.weights / GIB:.3f} GiB of weights, {large.total / GIB:.1f} in all; 47B {small.total / GIB:.1f}"
    return exact([] if right else [text], text, [Evidence("weights and caches at 1,000,000 tokens", text, "exact")])


def release_forms(records: Records) -> Finding:
    found = {name: records.metrics("export", name)["logits_max_relative_difference"] for name in records.params.models}
    wrong = [name for name, difference in found.items() if not difference <= LOGITS_TOLERANCE]
    return exact(wrong, f"all {len(found)} models agree", [
        Evidence(name, f"{difference:.1e}", f"≤ {LOGITS_TOLERANCE:.0e}") for name, difference in found.items()])


JUDGES: dict[str, Callable[[Records], Finding]] = {
    "fp8_loss": partial(fp8_loss, architecture="hybrid"), "memory": million_tokens,
    "fp8_loss_transformer": partial(fp8_loss, architecture="transformer"),
    **{judge.__name__: judge for judge in (
        published_sizes, hybrid_loss, hybrid_tasks, inference_mechanism, compressed_decode, fp8_scaling, fp8_tasks,
        layer_importance, importance_random, compressed_loss, compressed_tasks, release_forms)},
}


# --- Studies ----------------------------------------------------------------------------------------------------------


def _study_rule(study: Study, key: str) -> str:
    """In words, from the comparisons themselves."""
    texts = []
    for item in study.asked(key):
        margin = f" by {(percent if item.relative else plain)(item.margin).lstrip('+')}" if item.margin else ""
        control = f" (control that must fail: {item.control})" if item.control else ""
        texts.append(f"{item.candidate} {item.question} against {item.reference}{margin}{control}")
    return f"All of: {'; '.join(texts)}. {study.note}".strip()


def judge_study(study: Study, key: str) -> Finding:
    """All comparisons of the claim must hold; those at a guess's level are shown and not counted."""
    asked = study.asked(key)
    answers, reasons, evidence = [], [], []
    for item in asked:
        show = (lambda value: percent(math.expm1(value))) if item.relative else plain
        decision = compared(study, item, item.candidate, len(asked))
        name = f"{item.candidate} against {item.reference}"
        evidence.append(line(name, decision, show))
        if all(at_chance(study.measurement(of)) for of in (item.candidate, item.reference) if isinstance(of, str)):
            reasons.append(f"{name}: at a guess, not counted")
            continue
        answer, because = decision.answer, told(decision, show)
        if item.question != "better":
            control = compared(study, item, item.control, 1) if item.control else None
            answer, because = with_control(decision, control, item.control or "a broken arm", show)
        answers.append(answer)
        reasons.append(f"{name}: {because}")
    return statistics.all_of(answers), "; ".join(reasons) or "the study compares nothing for this claim", evidence


def at_chance(measured: Measurement) -> bool:
    """Whether the 95 % interval of a figure with a chance level reaches down to it."""
    if measured.chance is None:
        return False
    low, high = mean(measured.values, measured.per).interval(statistics.ALPHA)
    return low <= measured.chance if measured.better == "higher" else high >= measured.chance


def compared(study: Study, item: Comparison, candidate: str, comparisons: int) -> Decision:
    """`candidate`, the comparison's own or its control, against the reference."""
    def values(of: str | float) -> Any:
        found = np.asarray(study.measurement(of).values if isinstance(of, str) else of)
        return (1 if measured.better == "higher" else -1) * (np.log(found) if item.relative else found)

    def gains(of: str) -> Any:
        ours, theirs = values(of), values(item.reference)
        return ours - (theirs[:len(ours)] if theirs.ndim else theirs)

    measured = study.measurement(candidate)
    if isinstance(item.reference, str) and not item.paired:
        gain = statistics.unpaired(values(candidate), values(item.reference), measured.per)
    else:
        gain = mean(gains(candidate), measured.per,
                    gains(item.candidate) if candidate == item.control and len(measured.values) == 1 else None,
                    2 / (measured.items + 2) ** 2 if measured.items else 0.0)       # as statistics.accuracy_gain's
    margin = math.log1p(item.margin) if item.relative else item.margin
    if item.question == "better":
        return superiority(gain, margin, comparisons)
    return equivalence(gain, margin, item.question == "not worse", comparisons)
