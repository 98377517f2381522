"""The paper's claims: its number, ours from the records, and a verdict by a stated rule.

A verdict is computed, never written down: its rule (`stages.verdicts`) is a function of figures in the records, and the
rule's text stands beside it in the report. The paper's numbers are those of arXiv 2504.03624; `≈` marks one read off a
figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from stages.records import Records
from stages.verdicts import (
    PAPER_CONTEXT,
    PARITY_AGAIN,
    PARITY_RULE,
    Measure,
    Verdict,
    beats_compressor,
    decode_ratio,
    fp8_loss_verdict,
    growth_verdict,
    half_range,
    late_mean,
    loss_gaps,
    measures,
    number,
    parity,
    percent,
    speed_verdict,
    validation_gaps,
)

PUBLISHED = {"nemotron_h_8b": 8_100_852_736, "nemotron_h_56b": 56_324_350_464, "nemotron_h_47b": 46_791_554_816}
LOGITS_TOLERANCE = 1e-5
SPEED_RULE = ("Judged by output tokens/s, prompts included, of the published models at their own geometry where the "
              f"benchmark measured them; else by decoding, on an accelerator, at {PAPER_CONTEXT:,} tokens, with at "
              "least a billion parameters.")


@dataclass(frozen=True)
class Evidence:
    """One line of ours: what was measured, its value, and the spread or margin it is judged by."""

    measure: str
    ours: str
    spread: str = ""


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        paper: the paper's statement and number.
        source: where in the paper.
        rule: how the verdict follows from the records, in words.
        because: the figures that decided it.
        command: what makes the figures again.
    """

    title: str
    paper: str
    source: str
    evidence: list[Evidence]
    rule: str
    verdict: Verdict
    because: str
    command: str


def claims(records: Records) -> list[Claim]:
    """Every claim, in the order of the table."""
    return [
        accuracy(records), inference_speed(records), inference_mechanism(records), fp8_loss(records),
        fp8_accuracy(records), compression_accuracy(records), compression_speed(records), layer_importance(records),
        importance_against_random(records), published_sizes(records), release_forms(records),
    ]


# --- As good as: one rule for the hybrid, FP8 and the compressed model ------------------------------------------------

def parity_evidence(found: list[Measure]) -> list[Evidence]:
    return [Evidence(item.name, f"{number(item.candidate)} / {number(item.reference)}", f"± {number(item.margin)}")
            for item in found]


def accuracy(records: Records) -> Claim:
    title = "A hybrid is as accurate as a Transformer trained on the same data"
    paper = ("8B hybrid against Nemotron-T-8B: higher on 7 of 15 tasks, within one point on 4 more "
             "(MMLU 72.8 / 73.2, GSM8K 87.1 / 89.0, MMLU-Pro ≈ 44.0 / 41.4)")
    rule = ("Compared only if parameters are within 5 %, tokens are equal and both models beat the compressor in bits "
            f"per byte. {PARITY_RULE}")
    command = "dvc repro evaluate"
    if not (records.hybrid_seeds and records.transformer):
        return Claim(title, paper, "abstract; section 2.5", [], rule, Verdict.UNTESTED,
                     "this profile does not train both models in BF16", command)
    hybrid, transformer = records.hybrid_seeds[0], records.transformer
    found = measures(records, hybrid, transformer)
    ours, theirs = records.metrics("pretrain", hybrid), records.metrics("pretrain", transformer)
    sizes = f"{ours['parameters']:,.0f} / {theirs['parameters']:,.0f}"
    evidence = [Evidence("parameters, hybrid / Transformer", sizes), *parity_evidence(found)]
    unlearned = [name for name in (hybrid, transformer) if not beats_compressor(records.metrics("evaluate", name))]
    if not abs(ours["parameters"] / theirs["parameters"] - 1) <= 0.05 or ours["tokens"] != theirs["tokens"]:
        verdict, because = Verdict.UNTESTED, "parameters or tokens are not alike"
    elif unlearned:
        verdict, because = Verdict.UNTESTED, f"{' and '.join(unlearned)} not better than the compressor"
    else:
        verdict, because = parity(found)
    return Claim(title, paper, "abstract; section 2.5", evidence, rule, verdict, because, command)


# --- Inference --------------------------------------------------------------------------------------------------------


def inference_speed(records: Records) -> Claim:
    benchmark = records.metrics("benchmark")
    verdict, because = speed_verdict(records, "8b", "decode_ratio", 1.8)
    caches = [benchmark[f"{name}_cache_mib_at_{PAPER_CONTEXT}"] for name in ("nemotron_h_8b", "nemotron_t_8b")]
    return Claim(
        title="Up to 3 times faster inference",
        paper="65,536 tokens in, 1,024 out, on H100: ≈ 2.2 times Nemotron-T-8B, 1.8 times Qwen-2.5-7B, "
              "3.0 times Llama-3.1-8B",
        source="abstract; Figures 1 and 12",
        evidence=[
            *served_evidence(records, "8b", "Nemotron-H-8B over Nemotron-T-8B"),
            *ratio_evidence(records, "hybrid", "transformer", "decode_ratio", "hybrid over Transformer"),
            Evidence(f"cache at {PAPER_CONTEXT:,} tokens, 8B / T-8B (closed form)",
                     f"{caches[0]:,.0f} / {caches[1]:,.0f} MiB"),
        ],
        rule=f"{SPEED_RULE} Holds if the hybrid is at least 1.8 times faster, the smallest of the paper's own ratios.",
        verdict=verdict, because=because, command="dvc repro benchmark",
    )


def inference_mechanism(records: Records) -> Claim:
    hybrid, transformer = records.decode["hybrid"], records.decode["transformer"]
    contexts = [point.context for point in hybrid]
    growth = [(name, points[-1].cache_mib / points[0].cache_mib)
              for name, points in (("hybrid", hybrid), ("Transformer", transformer))]
    shortest, longest = (decode_ratio(records, "decode_ratio", "hybrid", "transformer", context)
                         for context in (contexts[0], contexts[-1]))
    verdict, because = growth_verdict(shortest, longest, len(contexts))
    return Claim(
        title="The hybrid's advantage grows with the context",
        paper="4 of 52 layers keep keys and values: 16,384 bytes a token against 131,072",
        source="sections 1 and 2.1",
        evidence=[
            Evidence(f"decode ratio at {contexts[0]:,} tokens", f"{shortest[0]:.2f}", f"± {shortest[1]:.2f}"),
            Evidence(f"decode ratio at {contexts[-1]:,} tokens", f"{longest[0]:.2f}", f"± {longest[1]:.2f}"),
            *(Evidence(f"growth of the {name}'s cache", f"{factor:.1f} times") for name, factor in growth),
        ],
        rule="Holds if, at the longest context measured, the hybrid decodes faster than the Transformer, and its "
             "advantage is larger than at the shortest, both by more than the spread of the timings.",
        verdict=verdict, because=because, command="dvc repro benchmark",
    )


def ratio_evidence(records: Records, model: str, other: str, prefix: str, text: str) -> list[Evidence]:
    """The decode ratio at the longest context measured, with its spread."""
    context = records.decode[model][-1].context
    ratio, spread = decode_ratio(records, prefix, model, other, context)
    where = records.accelerator or "CPU"
    return [Evidence(f"decoding at {context:,} tokens, {text}, {where}", f"{ratio:.2f} times", f"± {spread:.2f}")]


def served_evidence(records: Records, pair: str, text: str) -> list[Evidence]:
    """Ratios of two published models, where they were measured."""
    benchmark = records.metrics("benchmark")
    if f"output_ratio_{pair}" not in benchmark:
        return []
    where = f"{text}, random weights, {records.accelerator}"
    return [Evidence(f"{what}, {where}", f"{benchmark[f'{key}_{pair}']:.2f} times")
            for what, key in (("output tokens/s with prompts", "output_ratio"), ("decoding", "served_decode_ratio"))]


# --- FP8 --------------------------------------------------------------------------------------------------------------


def fp8_kind(records: Records) -> str:
    """Whether the FP8 run computed in FP8 or emulated it."""
    return "emulated FP8" if records.metrics("pretrain", records.fp8).get("fp8_emulated") else "FP8"


def fp8_loss(records: Records) -> Claim:
    title = "FP8 with per-tensor current scaling trains like BF16: loss"
    paper = "relative gap (BF16 − FP8) / BF16 below 0.1 %; ≈ −0.03 to −0.04 % at 1.5 to 3 T tokens"
    rule = ("Mean over the second half of training of the relative gap in validation bits per byte, same seed and data "
            "order, and over seeds. Does not hold if FP8 is worse by more than 0.1 % and by more than two seeds "
            "differ. Otherwise cannot be tested where two seeds differ by more than 0.1 %, and holds where they do "
            "not. What two seeds differ by: the mean size of the gap between two BF16 models, or, with FP8 models of "
            "several seeds, half the range of their gaps, if that is larger.")
    command = "dvc repro pretrain"
    if records.fp8 is None:
        return Claim(title, paper, "section 2.3", [], rule, Verdict.UNTESTED,
                     "this profile does not train an FP8 model and its BF16 twin", command)
    gaps = validation_gaps(records)
    pairs = [late_mean(gaps[fp8]) for fp8, _ in records.fp8_pairs]
    signed = fmean(pairs)
    spreads = {}
    if others := records.hybrid_seeds[1:]:
        spreads["two BF16 seeds: "] = fmean(late_mean(gaps[seed], absolute=True) for seed in others)
    if (over_seeds := half_range(pairs)) is not None:
        spreads["the gap over seeds: ± "] = over_seeds
    verdict, because = fp8_loss_verdict(-signed, max(spreads.values(), default=None))
    spread = "; ".join(f"{of}{percent(value)}" for of, value in spreads.items())
    losses = [late_mean(gap) for gap in loss_gaps(records).values()]
    seeds = "1 seed" if len(pairs) == 1 else f"{len(pairs)} seeds"
    loss_spread = half_range(losses)
    return Claim(title, paper, "section 2.3", [
        Evidence(f"relative gap, {fp8_kind(records)}, {seeds}", percent(signed), spread),
        Evidence("the same in smoothed training loss", percent(fmean(losses), 3),
                 "" if loss_spread is None else f"± {percent(loss_spread, 3)}"),
    ], rule, verdict, because, command)


def fp8_accuracy(records: Records) -> Claim:
    title = "FP8 with per-tensor current scaling trains like BF16: evaluations"
    paper = "8B, 15 T tokens in both precisions: FP8 equal or better (MMLU ≈ 70 both)"
    if records.fp8 is None:
        return Claim(title, paper, "section 2.3", [], PARITY_AGAIN, Verdict.UNTESTED,
                     "this profile does not train an FP8 model and its BF16 twin", "dvc repro evaluate")
    found = measures(records, records.fp8, records.hybrid_seeds[0])
    verdict, because = parity(found)
    first, *rest = parity_evidence(found)
    labelled = Evidence(f"{first.measure}, {fp8_kind(records)} / BF16", first.ours, first.spread)
    return Claim(title, paper, "section 2.3", [labelled, *rest], PARITY_AGAIN, verdict, because, "dvc repro evaluate")


# --- Compression ------------------------------------------------------------------------------------------------------


def compression_accuracy(records: Records) -> Claim:
    parent = records.params.compress.parent
    compress = records.metrics("compress")
    found = measures(records, "compressed", parent)
    verdict, because = parity(found)
    first, *rest = parity_evidence(found)
    shares = [item.candidate / item.reference for item in found[1:] if item.informative and item.reference]
    kept = fmean(shares) if shares else None
    bits = [compress[f"validation_bits_per_byte_{name}"] for name in ("parent", "compressed", "random")]
    return Claim(
        title="MiniPuzzle keeps the parent's accuracy",
        paper="56B to 47B with 63 B tokens of distillation, 1/317 of pretraining; 99.94 % kept on average over MMLU, "
              "MMLU-Pro, GSM8K and HellaSwag",
        source="section 3; Puzzle (arXiv 2411.19146)",
        evidence=[
            Evidence("accuracy kept, mean over the tasks counted", percent(kept) if kept else "none counted"),
            Evidence(f"{first.measure}, compressed / parent", first.ours, first.spread), *rest,
            Evidence("validation bits per byte, parent / compressed / random cut",
                     " / ".join(number(value) for value in bits)),
            Evidence("distillation tokens", f"{compress['distillation_tokens']:,.0f}"),
        ],
        rule=PARITY_AGAIN, verdict=verdict, because=because, command="dvc repro compress evaluate",
    )


def compression_speed(records: Records) -> Claim:
    compress = records.metrics("compress")
    verdict, because = speed_verdict(records, "47b", "compressed_decode_ratio", 1.2)
    parameters = 1 - compress["compressed_parameters"] / compress["parent_parameters"]
    memory = 1 - compress["compressed_memory_gib"] / compress["parent_memory_gib"]
    return Claim(
        title="The compressed model is 20 % faster",
        paper="47B against 56B: 1.2 times at long context (≈ 31.8 / 25.6 tokens/s a GPU), 16.9 % fewer parameters",
        source="abstract; section 3, Figure 12",
        evidence=[
            *served_evidence(records, "47b", "Nemotron-H-47B over 56B"),
            *ratio_evidence(records, "compressed", "hybrid", "compressed_decode_ratio", "compressed over parent"),
            Evidence("parameters cut", percent(parameters, 1)),
            Evidence("memory cut (weights and cache)", percent(memory, 1)),
        ],
        rule=f"{SPEED_RULE} Holds if the compressed model is at least 1.2 times faster.",
        verdict=verdict, because=because, command="dvc repro benchmark",
    )


def layer_importance(records: Records) -> Claim:
    ranked = sorted(records.importance, key=lambda layer: (-layer.importance, layer.index))
    ranks = {layer.index: position for position, layer in enumerate(ranked, start=1)}
    quarter = math.ceil(len(ranked) / 4)
    halves = records.metrics("compress")["importance_split_half_correlation"]
    ends = [ranks[0], ranks[len(ranked) - 1]]
    finite = all(math.isfinite(layer.importance) for layer in ranked)
    verdict = Verdict.HOLDS if finite and max(ends) <= quarter else Verdict.FAILS
    return Claim(
        title="The first and the last layers matter most",
        paper="56B: the first and last layers are the most important; low from layer 20 on, lowest at 80 to 92",
        source="section 3, Figure 9",
        evidence=[
            *(Evidence(f"rank of the {which} layer of {len(ranked)}", str(rank))
              for which, rank in zip(("first", "last"), ends, strict=True)),
            Evidence("rank correlation of two halves of the samples", number(halves)),
        ],
        rule="Holds if the first and the last layer are both in the top quarter by importance.",
        verdict=verdict, because=f"ranks {ends[0]} and {ends[1]}; {quarter} or better asked",
        command="dvc repro compress",
    )


def importance_against_random(records: Records) -> Claim:
    compress = records.metrics("compress")
    ratio = compress["kl_parent_compressed"] / compress["kl_parent_random"]
    verdict = Verdict.HOLDS if ratio <= 0.95 else Verdict.FAILS
    return Claim(
        title="Cutting by importance beats cutting at random",
        paper="layers by their effect on the last hidden state, neurons by their activations; the control is ours",
        source="section 3.1",
        evidence=[
            Evidence("KL to parent just cut, importance / random / least important kept",
                     " / ".join(number(compress[key]) for key in (
                         "kl_parent_cut", "kl_parent_random_cut_mean", "kl_parent_reverse_cut")),
                     f"random: {len(records.controls.seeds)} draws"),
            Evidence("KL to parent after distillation",
                     f"{number(compress['kl_parent_compressed'])} / {number(compress['kl_parent_random'])}",
                     "one random draw"),
            Evidence("agreement with the parent's next token",
                     f"{number(compress['agreement_compressed'])} / {number(compress['agreement_random'])}"),
        ],
        rule="Same shape, data and distillation for both. Holds if the KL to the parent afterwards is at least 5 % "
             "lower than the random cut's.",
        verdict=verdict, because=f"{percent(1 - ratio, 1)} lower", command="dvc repro compress",
    )


# --- Sizes and release ------------------------------------------------------------------------------------------------


def published_sizes(records: Records) -> Claim:
    benchmark = records.metrics("benchmark")
    counts = {name: benchmark[f"{name}_parameters"] for name in PUBLISHED}
    wrong = [name for name, count in counts.items() if count != PUBLISHED[name]]
    return Claim(
        title="The published sizes follow from the published shapes",
        paper="8B, 56B and 47B; the released checkpoints hold "
              + ", ".join(f"{count:,}" for count in PUBLISHED.values()) + " parameters",
        source="Table 1, Figure 2; released configurations",
        evidence=[Evidence(f"`{name}`", f"{count:,.0f}", "exact") for name, count in counts.items()],
        rule="Holds if our model's parameter count, in closed form, equals the checkpoint's to the last one.",
        verdict=Verdict.FAILS if wrong else Verdict.HOLDS,
        because=f"{', '.join(wrong)} differ" if wrong else "all three equal", command="dvc repro benchmark",
    )


def release_forms(records: Records) -> Claim:
    found = {name: records.metrics("export", name)["logits_max_relative_difference"] for name in records.params.models}
    wrong = [name for name, difference in found.items() if not difference <= LOGITS_TOLERANCE]
    worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
    return Claim(
        title="Models come in Hugging Face and Megatron form",
        paper="checkpoints released for Hugging Face and NeMo / Megatron-LM",
        source="abstract",
        evidence=[Evidence(f"largest relative difference of logits, transformers against ours, {len(found)} models",
                           f"{found[worst]:.1e} ({worst})", f"≤ {LOGITS_TOLERANCE:.0e}")],
        rule="Every Megatron checkpoint is exported to a Hugging Face directory, which transformers and our own model "
             f"read and run on the same text. Holds if no logit differs by more than {LOGITS_TOLERANCE:.0e} of the "
             "largest; the export stops where one does.",
        verdict=Verdict.FAILS if wrong else Verdict.HOLDS,
        because=f"{', '.join(wrong)} differ by more" if wrong else f"all {len(found)} models agree",
        command="dvc repro export",
    )
