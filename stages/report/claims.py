"""The paper's claims, each with what was measured and an answer by a stated rule (`stages.report.statistics`).

An answer is computed from records, of this profile or of a study, and never written down. The words are in claims.toml.
What cannot be read leaves its own claim undecided, with the reader's message; the others are judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.config import DataError
from model import costs
from model.presets import PRESETS
from stages.frame.worker import RUN_ONLY
from stages.report import statistics
from stages.report.records import Pair, RecordError, Records, pairs
from stages.report.statistics import Answer, Estimate, Source, Verdict, equivalence, mean, over_seeds, superiority
from stages.report.study_schema import WORDS, Comparison, Measurement, Study


class Evidence(NamedTuple):
    """One line of ours: what was measured, its value, and the interval it is judged by."""

    measure: str
    ours: str
    interval: str = ""


class Claim(NamedTuple):
    """One row. `number`: of the list of 19, with a letter where it has parts; `because`: the figures that decided it,
    the smallest difference in sight, and, where undecided, what would decide; `command`: makes the figures again."""

    number: str
    key: str
    title: str
    paper: str
    source: str
    evidence: Sequence[Evidence]
    rule: str
    answer: Answer
    because: str
    command: str


Finding = tuple[Answer, str, Sequence[Evidence]]    # answer, because, evidence
Show = Callable[[float], str]


def claims(records: Records, studies: Mapping[str, Study | RecordError]) -> list[Claim]:
    """Every claim, in the order of the table."""
    return [_claim(records, studies, **words) for words in WORDS]


def counts(found: Sequence[Claim]) -> dict[str, int]:
    """How many claims have which answer."""
    return {str(answer): sum(claim.answer is answer for claim in found) for answer in Answer}


def _claim(records: Records, studies: Mapping[str, Study | RecordError], key: str, study: str = "",
           rule: str = "All comparisons of the study must hold.", command: str = "", judge: str = "", lacking: str = "",
           asked: Mapping[str, Any] | None = None, **words: str) -> Claim:
    evidence: Sequence[Evidence] = []
    try:
        if study:
            record = studies.get(study) or RecordError(
                lacking or f"Not measured here: there is no study {study}.\nRun `{command}`.")
            if isinstance(record, RecordError):
                raise record
            rule, command = _study_rule(record, key), f"{record.command} ({record.machine}, {record.date})"
            answer, because, evidence = judge_study(record, key)
        else:
            answer, because, evidence = JUDGES[judge](records, **asked or {})
    except (ValueError, LookupError, ArithmeticError) as error:
        answer = Answer.UNDECIDED
        if judge and isinstance(error, RecordError):
            records.reader.faults.append(str(error))            # also what two records together lack
        because = str(error) if isinstance(error, DataError) else (
            f"A record is not as expected ({error!r}).\nRun `{command}` again.")
    return Claim(key=key, rule=rule, command=command, answer=answer, because=because, evidence=evidence, **words)


# --- Words ------------------------------------------------------------------------------------------------------------


def plain(value: float, form: str = "+.3g") -> str:
    """With a true minus sign."""
    return f"{value:{form}}".replace("-", "−")


def percent(value: float) -> str:
    """Of a relative gain; from twice as good on, how many times."""
    return f"{plain(100 * value)} %" if value < 1 else f"{1 + value:,.3g} times"


def points(value: float) -> str:
    """A difference of shares as percentage points, signed."""
    return f"{plain(100 * value, '+.1f')} points"


def times(logarithm: float) -> str:
    """A log ratio as a factor."""
    return f"{math.exp(logarithm):.2f} times"


def line(measure: str, decision: Verdict, show: Show) -> Evidence:
    """The evidence of one decision: value and interval, each as `show` writes it."""
    low, high = map(show, decision.estimate.interval(decision.alpha))
    unit = "".join(high.partition(" ")[1:])             # said once, where both have the same
    return Evidence(measure, show(decision.estimate.value), "" if math.isnan(decision.seen) else (
        f"{1 - decision.alpha:.0%} interval {low.removesuffix(unit)} to {high}"))


def told(decision: Verdict, show: Show) -> str:
    """The estimate, its interval, the smallest difference in sight, and what would decide."""
    _, text, interval = line("", decision, show)
    if math.isnan(decision.seen):
        single = [source.unit for source in decision.estimate.sources if math.isnan(source.variance)]
        return f"{text}; one {' and one '.join(single)} only, or all alike: the spread is unknown, 3 would be the least"
    text += f" ({interval}; smallest difference in sight {show(decision.seen).lstrip('+')})"
    if decision.needed:
        named = " and ".join(f"{count:,} {unit}s" for unit, count in decision.needed.items())
        text += f"; about {named} would decide"
    return text


def with_control(decision: Verdict, control: Verdict | None, name: str, show: Show) -> tuple[Answer, str]:
    """Answer and reason of an equivalence beside its negative control."""
    if control is None:
        return Answer.UNDECIDED, f"{told(decision, show)}. Nothing is told without a control: {name} was not measured"
    seen = "fails, as it must" if control.answer is Answer.FAILS else "is not seen to fail, so nothing is told"
    return (statistics.controlled(decision.answer, control.answer),
            f"{told(decision, show)}. The control ({name}) {seen}: {told(control, show)}")


def together(parts: Sequence[tuple[Answer, str, Evidence]]) -> Finding:
    """Of parts that must all hold. What fails comes first, then what cannot be told: the first line is the one seen."""
    order = (Answer.FAILS, Answer.UNDECIDED, Answer.HOLDS)
    return (statistics.all_of([answer for answer, *_ in parts]),
            "; ".join(f"{evidence.measure}: {because}" for _, because, evidence in parts),
            [evidence for *_, evidence in sorted(parts, key=lambda part: order.index(part[0]))])


def in_order(show: Show, decisions: Mapping[str, Verdict]) -> Finding:
    """Of order claims that must all hold, by what was measured."""
    return together([(decision.answer, told(decision, show), line(name, decision, show))
                     for name, decision in decisions.items()])


# --- Models of one profile --------------------------------------------------------------------------------------------


def evaluated(records: Records, candidate: Sequence[str], reference: Sequence[str]) -> list[Pair]:
    """Pairs whose models were both asked. Raises RecordError where that was not the same, and DataError for a reference
    that is no better than the compressor or a control that its distillation ruined, of which nothing can be told; a
    candidate that is no better than the compressor is worse."""
    known = [pair for pair in pairs(records.params, candidate, reference) if set(pair) <= set(records.params.models)]
    for pair in known:
        learned(records, pair[1])
        if pair[0] == "compressed-random":
            distilled(records)
    asked = {model: (records.items_digest(model), [of.task for of in records.paper_tasks(model)], {
        task: len(items) for task, items in (records.scores(model) | graded(records, model)).items()})
        for pair in known for model in pair}
    for model, own in asked.items():
        if own != asked[known[0][1]]:
            raise RecordError(f"evaluate/{model} and evaluate/{known[0][1]}: not the same items.\n"
                              "Run the stage `evaluate` again for them.")
    return known


def graded(records: Records, model: str) -> dict[str, list[int]]:
    """By task 1 or 0 an item: those of this corpus, without lengthened contexts, and the paper's."""
    ours: dict[str, Any] = {task: items for task, items in records.scores(model).items()
                            if not (task.startswith("bits_per_byte_") or "_at_" in task)}
    return ours | {of.task.task: of.right for of in records.paper_tasks(model) if of.right}


def chances(records: Records, model: str) -> dict[str, float]:
    """What a guess reaches at the tasks of `graded`, or by the length of the options where that is more."""
    metrics, paper = records.metrics("evaluate", model), {of.task.task: of for of in records.paper_tasks(model)}
    return {task: paper[task].guess if task in paper else metrics[f"{task}_accuracy_chance"]
            for task in graded(records, model)}


def learned(records: Records, model: str) -> None:
    """Raise DataError where the model says nothing: not better than a compressor of text."""
    metrics = records.metrics("evaluate", model)
    if not metrics["bits_per_byte"] < metrics["bits_per_byte_compressor"]:
        raise DataError(f"{model} learned nothing: it is not better than a compressor.\nTrain it on more tokens.")


def distilled(records: Records) -> None:
    """Raise DataError where the random cut ended no nearer to its parent than its distillation began: as a control it
    would fail by the learning rate, not by the cut."""
    metrics = records.metrics("compress")
    end, start = metrics["kl_parent_random"], metrics["kl_parent_random_cut"]
    if not end < start:
        raise DataError(f"compressed-random is no control: KL to the parent is {end:.3g} nats after distillation, "
                        f"{start:.3g} just cut.\nLower compress.learning_rate, and compress again.")


def trained_alike(records: Records, of: Sequence[Pair]) -> None:
    """Raise DataError for a pair of which one is larger, and RecordError where models were not all trained on the same
    tokens by one recipe: after another was changed, and not all of them trained again."""
    for pair in of:
        ours, theirs = (records.metrics("pretrain", name)["parameters"] for name in pair)
        if abs(ours / theirs - 1) > 0.05:
            raise DataError(f"{' and '.join(pair)}: parameters are not alike.\n"
                            "Change `model` until they are within 5 %, and train again.")
    first, *others = dict.fromkeys(name for pair in of for name in pair)
    for name in others:
        if training(records, name) != training(records, first):
            raise RecordError(f"pretrain/{first} and pretrain/{name}: not the same tokens and recipe.\n"
                              "Run the stage `pretrain` again for them.")


def training(records: Records, name: str) -> Any:
    """What a model was trained on, by its digest, and how, but for what changes no result."""
    made = records.provenance(f"pretrain@{name}")
    recipe = {key: value for key, value in made.parameters.get("pretrain", {}).items()
              if f"pretrain.{key}" not in RUN_ONLY}
    return records.metrics("pretrain", name)["tokens"], sorted(made.inputs.values()), recipe


def trained_gains(records: Records, of: Sequence[Pair]) -> list[float]:
    """Share of the reference's final validation bits per byte that the candidate saves, by pair."""
    final = {name: records.metrics("pretrain", name)["validation_bits_per_byte"] for pair in of for name in pair}
    return [1 - final[ours] / final[theirs] for ours, theirs in of]


def least_variance(records: Records, of: Sequence[Pair]) -> float:
    """Of the mean of `trained_gains`, from the first step on: runs of one seed that round otherwise part as runs of
    other seeds do, so a gap varies at least as the reference does from seed to seed. A few may be alike by chance."""
    final = np.log([records.metrics("pretrain", theirs)["validation_bits_per_byte"] for _, theirs in of])
    return float(final.var(ddof=1)) / len(of) if len(of) > 1 else 0.0


def half_trained_gain(records: Records, variant: str) -> float:
    """As `trained_gains`, of the same model at the evaluation that is nearest to half of its tokens. Raises DataError
    where it was evaluated at its ends alone: an untrained model is no control."""
    curve = records.validation(variant)
    last = max(curve)
    if not (within := [tokens for tokens in curve if 0 < tokens < last]):
        raise DataError(f"{variant} was evaluated before and after training only, not at half its tokens.\n"
                        "Set pretrain.evaluations to 2 or more, and train again.")
    return 1 - curve[min(within, key=lambda tokens: abs(tokens - last / 2))] / curve[last]


def documents(records: Records, pair: Pair) -> Estimate:
    """Gain in bits per byte over the documents both were evaluated on."""
    return statistics.bits_per_byte_gain(*(
        {name: rows for name, rows in records.scores(model).items() if name.startswith("bits_per_byte_")}
        for model in pair))


def loss(records: Records, candidate: Sequence[str], reference: Sequence[str], broken: Sequence[str], margin: float,
         control: str, or_better: bool = False, training: bool = True) -> Finding:
    """Equivalence of bits per byte over documents; `training`: of the final ones over seeds too, and not of one given
    pair of models alone. `broken`: the control's model; none: the reference at half its tokens."""
    rule = partial(equivalence, margin=margin, or_better=or_better)
    if not (known := evaluated(records, candidate, reference)):
        return Answer.UNDECIDED, "this profile does not train and evaluate both", []
    if not training:
        decision, *seen = (rule(documents(records, pair))
                           for pair in known + evaluated(records, broken, reference))
        return *with_control(decision, seen[0] if seen else None, control, percent), [
            line(f"bits per byte saved, {' / '.join(known[0])}", decision, percent)]
    trained, failing = pairs(records.params, candidate, reference), pairs(records.params, broken, reference)
    trained_alike(records, [*trained, *failing])
    gains, texts = trained_gains(records, trained), documents(records, known[0])
    lost = trained_gains(records, failing) if broken else [
        half_trained_gain(records, name) for _, name in trained]
    least = least_variance(records, trained) if broken else 0.0         # without one the two are other models
    decision = rule(over_seeds(mean(gains, "seed", floor=least), texts))
    control_seen = rule(over_seeds(mean(lost, "seed", gains, least * len(gains) / len(lost)), texts)) if lost else None
    return *with_control(decision, control_seen, control, percent), [line("mean over seeds", decision, percent), *(
        Evidence(f"bits per byte saved, {' / '.join(pair)}", percent(gain))
        for pair, gain in zip(trained, gains, strict=True))]


def fp8_scaling(records: Records, scaled: Sequence[str], unscaled: Sequence[str], bf16: Sequence[str]) -> Finding:
    """Bits per byte that scales save over FP8 without them, by seed."""
    if not (found := pairs(records.params, scaled, unscaled)):
        return Answer.UNDECIDED, "this profile does not train FP8 without scales", []
    paired = pairs(records.params, scaled, bf16)
    trained_alike(records, [*found, *paired])
    gain = mean(trained_gains(records, found), "seed", trained_gains(records, paired),
                least_variance(records, paired) * len(paired) / len(found))
    return in_order(percent, {"bits per byte saved by scales": superiority(gain)})


def tasks(records: Records, candidate: Sequence[str], reference: Sequence[str], broken: Sequence[str], margin: float,
          control: str, training: bool = True) -> Finding:
    """Equivalence of the mean over tasks; `training`: over seeds too, and not of one given pair of models alone."""
    if not (known := evaluated(records, candidate, reference)):
        return Answer.UNDECIDED, "this profile does not evaluate both", []
    failing, guesses = evaluated(records, broken, reference), chances(records, known[0][0])
    if training:
        trained_alike(records, [*known, *failing])
    counted, rows = [], []
    for task, guess in guesses.items():
        answers = [graded(records, model)[task] for model in known[0]]
        beaten = any(statistics.beats_chance(int(np.sum(each)), len(each), guess, len(guesses)) for each in answers)
        counted += [task] if beaten else []
        name = f"{task.replace('_', ' ')}, {' / '.join(known[0])}" + ("" if beaten else " (a guess: not counted)")
        rows.append(Evidence(name, " / ".join(f"{np.mean(each):.3f}" for each in answers), f"{len(answers[0])} items"))
    if not counted:
        return Answer.UNDECIDED, "no task at which either model beats a guess", rows

    def right(of: Sequence[Pair]) -> list[Any]:
        """By task: pairs, sides, items."""
        return [np.array([[graded(records, model)[task] for model in pair] for pair in of], float) for task in counted]

    def judged(of: Sequence[Pair]) -> tuple[str, Verdict]:
        """By what: the mean or, where one task by itself fails, that."""
        by_task = [statistics.accuracy_gain(*both.mean(0)) for both in right(of)]
        overall = statistics.average(by_task)
        if training:
            gains, spread = (np.array([both.mean(2) @ (1, -1) for both in right(drawn)])        # tasks, pairs
                             for drawn in (of, known))
            by_task = [over_seeds(mean(one, "seed", drawn), items)
                       for one, drawn, items in zip(gains, spread, by_task, strict=True)]
            overall = over_seeds(mean(gains.mean(0), "seed", spread.mean(0)), overall)
        decision = statistics.tasks_equivalence(by_task, overall, margin)
        alone = [task for task, one in zip(counted, by_task, strict=True) if one is decision.estimate]
        return f"{alone[0].replace('_', ' ')} by itself" if alone else f"mean over {len(counted)} counted", decision

    name, decision = judged(known)
    answer, because = with_control(decision, judged(failing)[1] if failing else None, control, points)
    return answer, f"{name}: {because}", [line(name, decision, points), *rows]


# --- Compression, inference, release ----------------------------------------------------------------------------------


def layer_importance(records: Records) -> Finding:
    """The first and the last layer above the least of the most important quarter."""
    learned(records, records.params.compress.parent)
    layers, count, found = records.importance.layers, records.importance.samples["layers"], {}
    for which, end in (("first", layers[0]), ("last", layers[-1])):
        others = sorted((layer for layer in layers if layer is not end), key=lambda layer: -layer.importance)
        bar = others[math.ceil(len(layers) / 4) - 1]
        found[f"{which} layer's importance above the top quarter's least"] = superiority(Estimate(
            end.importance - bar.importance, tuple(Source("sample", layer.standard_error**2, count, count - 1)
                                                   for layer in (end, bar))).drawn_together(), comparisons=2)
    return in_order(plain, found)


def importance_random(records: Records) -> Finding:
    """KL of the chosen cut against cuts at random, before distillation."""
    learned(records, records.params.compress.parent)
    cuts = records.controls
    gain = statistics.unpaired([-math.log(cuts.importance)], [-math.log(value) for value in cuts.random], "draw")
    answer, because, evidence = in_order(times, {"KL just cut, at random over chosen": superiority(gain)})
    return answer, because, [*evidence, Evidence(
        "KL by importance / at random / least important kept",
        f"{cuts.importance:.4f} / {np.mean(cuts.random):.4f} / {cuts.reverse:.4f}", f"{len(cuts.random)} draws")]


def decoding(records: Records, model: str, other: str, grows: bool = False) -> Finding:
    """Faster at the longest context, over interleaved repeats; `grows`: and by a larger factor than at the shortest.
    `other`: an architecture, or "parent" for that of what compress cuts."""
    if other == "parent":
        other = records.params.variants[records.params.compress.parent].architecture
    contexts = sorted(records.decode_repeats[other])
    if grows and len(contexts) < 2:
        return Answer.UNDECIDED, "decoding was measured at one context only", []

    def ratio(context: int) -> Estimate:
        """How many times faster, its logarithm."""
        ours, theirs = (records.decode_repeats[name][context] for name in (model, other))
        return mean([math.log(slow / fast) for slow, fast in zip(theirs, ours, strict=True)], "repeat")

    long = ratio(contexts[-1])
    found = {f"{model} over {other} at {contexts[-1]:,} tokens": superiority(long, comparisons=1 + grows)}
    if grows:
        short = ratio(contexts[0])
        growth = Estimate(long.value - short.value, long.sources + short.sources).drawn_together()
        found[f"that over the same at {contexts[0]:,}"] = superiority(growth, comparisons=2)
    return in_order(times, found)


def exact(found: Mapping[str, tuple[str, bool]], limit: str = "exact") -> Finding:
    """Of figures by name, as they are shown, that are right or not."""
    wrong = [name for name, (_, right) in found.items() if not right]
    return (statistics.all_of([Answer.HOLDS if right else Answer.FAILS for _, right in found.values()]),
            f"{', '.join(wrong)} differ" if wrong else f"all {len(found)} as they must be",
            [Evidence(name, shown, limit) for name, (shown, _) in found.items()])


def published_sizes(records: Records, **published: int) -> Finding:
    """Parameters of the presets against the released checkpoints', and the shape of their patterns."""
    counted = {name: records.metrics("benchmark")[f"{name}_parameters"] for name in published}
    patterns = {name: PRESETS[name].pattern for name in ("nemotron_h_8b", "nemotron_h_56b")}
    return exact({name: (f"{count:,.0f}", count == published[name]) for name, count in counted.items()} | {
        f"pattern of {name}": (f"{len(pattern)} layers", pattern[0] == "M" and pattern[-1] == "-"
                               and pattern.count("*") == pattern.count("*-")) for name, pattern in patterns.items()})


def memory(_: Records, card_gib: float, weights_gib: float, deployment: Mapping[str, Any]) -> Finding:
    """GiB of 56B and 47B at a deployment against the card's, by closed formulas."""
    held = costs.Deployment(**deployment)
    small, large = (costs.memory(PRESETS[f"nemotron_h_{size}"], held) for size in ("47b", "56b"))
    weights, above, below = (size / 2**30 for size in (large.weights, large.total, small.total))
    return exact({"56B, weights": (f"{weights:.3f} GiB", abs(weights - weights_gib) < 0.05),
                  "56B, with 1,000,000 tokens": (f"{above:.1f} GiB", above > card_gib),
                  "47B, with 1,000,000 tokens": (f"{below:.1f} GiB", below <= card_gib)})


def release_forms(records: Records, tolerance: float) -> Finding:
    """Logits of every export by transformers against ours."""
    found = {name: records.metrics("export", name)["logits_max_relative_difference"] for name in records.params.models}
    return exact({name: (f"{value:.1e}", value <= tolerance) for name, value in found.items()}, f"≤ {tolerance:.0e}")


JUDGES: dict[str, Callable[..., Finding]] = {judge.__name__: judge for judge in (
    published_sizes, loss, tasks, decoding, fp8_scaling, layer_importance, importance_random, memory, release_forms)}


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
    """All comparisons of the claim must hold; nothing can be told of two measurements at a guess's level."""
    asked, parts = study.asked(key), []
    for item in asked:
        show = (lambda value: percent(math.expm1(value))) if item.relative else plain
        decision = compared(study, item, item.candidate, len(asked))
        answer, because = decision.answer, told(decision, show)
        if all(at_chance(study.measurement(of)) for of in (item.candidate, item.reference) if isinstance(of, str)):
            answer, because = Answer.UNDECIDED, f"both at a guess, {because}"
        elif item.question != "better":
            control = compared(study, item, item.control, 1) if item.control else None
            answer, because = with_control(decision, control, item.control or "a broken arm", show)
        parts.append((answer, because, line(f"{item.candidate} against {item.reference}", decision, show)))
    return together(parts) if parts else (Answer.UNDECIDED, "the study compares nothing for this claim", [])


def at_chance(measured: Measurement) -> bool:
    """Whether the 95 % interval of a figure with a chance level reaches down to it, or is not known."""
    if measured.chance is None:
        return False
    low, high = mean(measured.values, measured.per, floor=least_of_items(measured)).interval(statistics.ALPHA)
    return not (low > measured.chance if measured.better == "higher" else high < measured.chance)


def least_of_items(measured: Measurement) -> float:
    """Least variance of a mean of accuracies, as statistics.accuracy_gain's."""
    return 2 / (measured.items + 2) ** 2 if measured.items else 0.0


def compared(study: Study, item: Comparison, candidate: str, comparisons: int) -> Verdict:
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
        gain = mean(gains(candidate), measured.per, gains(item.candidate), least_of_items(measured))
    margin = math.log1p(item.margin) if item.relative else item.margin
    if item.question == "better":
        return superiority(gain, margin, comparisons)
    return equivalence(gain, margin, item.question == "not worse", comparisons)
