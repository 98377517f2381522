"""What the report says: its sections and tables, filled from the records."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from ruamel.yaml import YAML

from stages import compression_sections, data_sections, evaluation_sections
from stages.claims import Claim, claims
from stages.plots import plots
from stages.records import Metrics, Records
from stages.report_page import Block, ClaimTable, Document, Figures, Listing, Paragraph, Section, Table
from stages.svg import Plot
from stages.verdicts import TASKS, Verdict, controls, half_range, loss_gaps, number, percent, validation_gaps

NONE = "–"
PAPER_TOKENS_PER_SECOND = {         # output a GPU, read off Figures 1 and 12
    "nemotron_h_8b": 211, "nemotron_t_8b": 96.8, "nemotron_h_47b": 31.8, "nemotron_h_56b": 25.6,
}


def document(records: Records) -> Document:
    """The whole report."""
    found = claims(records)
    drawn = plots(records)
    return Document(
        title="Nemotron-H reproduced",
        profile=records.params.profile,
        about="An end-to-end reproduction of Nemotron-H (NVIDIA, arXiv 2504.03624): from text to a curated corpus, a "
              "tokenizer, hybrid Mamba-2 models in FP8 and BF16 beside a Transformer, MiniPuzzle compression, export "
              "and evaluation. Every figure below is computed from the records its stages wrote.",
        summary=summary(records, found),
        facts=facts(records),
        sections=[
            Section("claims", "Claims", "dvc repro report", [
                ClaimTable(found),
                Paragraph("≈ marks a number read off one of the paper's figures. Not examined: benchmarks against "
                          "other published models, post-training, long-context tasks, vision-language models."),
            ]),
            Section("controls", "Do the models learn?", "dvc repro evaluate", [_controls(records)]),
            Section("training", "Training", "dvc repro pretrain", [
                _figures(drawn, "training-loss", "validation", "gradient-norm", "fp8-gap", "loss-gap"),
                _models(records),
                _validation(records), *_validation_gaps(records), *_loss_gaps(records)]),
            Section("evaluation", "Evaluation", "dvc repro evaluate", [
                _figures(drawn, "bits-per-byte", *(f"{task}-accuracy".replace("_", "-") for task in TASKS)),
                *evaluation_sections.blocks(records)]),
            Section("compression", "Compression", "dvc repro compress", [
                _figures(drawn, "layer-importance", "ffn-importance", "candidates", "candidate-speed", "controls",
                         "distillation"),
                *compression_sections.blocks(records)]),
            Section("inference", "Inference", "dvc repro benchmark", [
                _figures(drawn, "decode-speed", "output-speed", "cache-size"), *_inference(records)]),
            *_data(records),
            Section("release", "Release", "dvc repro export", [_export(records)]),
            Section("stage-times", "Stage times", "", [_figures(drawn, "stage-times"), _stage_times(records)]),
            Section("provenance", "Provenance", "", _provenance(records)),
        ],
    )


def summary(records: Records, found: Sequence[Claim]) -> str:
    """One sentence: how the verdicts fall, at what size."""
    counts = [sum(claim.verdict == verdict for claim in found)
              for verdict in (Verdict.HOLDS, Verdict.FAILS, Verdict.UNTESTED)]
    trained = [records.metrics("pretrain", name) for name in records.params.variants]
    largest = max(metrics["parameters"] for metrics in trained)
    tokens = max(metrics["tokens"] for metrics in trained)
    words = [f"{counts[0]} {'holds' if counts[0] == 1 else 'hold'}",
             f"{counts[1]} {'does not' if counts[1] == 1 else 'do not'}"]
    return (f"Of {len(found)} claims, {words[0]} at this scale, {words[1]}, and {counts[2]} cannot be "
            f"tested: the models have {_short(largest)} parameters and saw {_short(tokens)} tokens, where the paper's "
            "have 8 to 56 billion and saw 15 to 20 trillion.")


def facts(records: Records) -> list[tuple[str, str]]:
    runs = [run.provenance for run in records.runs.values()]
    commits = list(dict.fromkeys(_commit(run.commit) for run in runs))
    return [
        ("Machine", _machines([run.machine for run in runs])),
        ("Pretrained models", str(len(records.params.variants))),
        ("Stage runs", str(len(runs))),
        ("Time, stages added up", f"{sum(run.wall_seconds for run in runs) / 60:.1f} min"),
        ("Commit", ", ".join(commits)),
    ]


# --- Sections ---------------------------------------------------------------------------------------------------------


def _controls(records: Records) -> Table:
    rows = []
    for control in controls(records):
        values = (percent(control.below_compressor, 1), number(control.drop_since_first),
                  number(control.syntax_accuracy))
        rows.append([control.model, *(f"{'✓' if met else '✗'} {value}"
                                      for met, value in zip(control.met, values, strict=True))])
    return Table("Controls; ✓ met, ✗ not met",
                 ["Model", "Bits per byte below the compressor (≥ 25 %)",
                  "Validation bits per byte gained since the first evaluation (≥ 0.3)", "Syntax pairs (> 0.85)"], rows)


def _models(records: Records) -> Table:
    rows = []
    for name, variant in records.params.variants.items():
        metrics = records.metrics("pretrain", name)
        geometry = records.params.model[variant.architecture]
        rows.append([name, f"`{geometry.pattern}`", variant.precision.upper(), str(variant.seed),
                     f"{metrics['parameters']:,.0f}", f"{metrics['tokens']:,.0f}", number(metrics["final_loss"]),
                     number(metrics["validation_bits_per_byte"]), f"{metrics['tokens_per_second']:,.0f}",
                     f"{metrics['train_seconds']:,.0f}", f"{metrics['peak_memory_gib']:.2f}"])
    compress, model = records.metrics("compress"), records.compressed_model
    rows.append(["compressed", f"`{model['pattern']}`", NONE, NONE, f"{compress['compressed_parameters']:,.0f}",
                 f"{compress['distillation_tokens']:,.0f}", NONE,
                 number(compress["validation_bits_per_byte_compressed"]), NONE, NONE, NONE])
    return Table("Models", ["Model", "Layers (`M` Mamba-2, `*` attention, `-` FFN)", "Precision", "Seed",
                            "Parameters", "Tokens", "Final loss", "Validation bits per byte", "Tokens/s", "Seconds",
                            "Peak memory (GiB)"], rows, text_columns=3)


def _validation(records: Records) -> Table:
    names = list(records.validation)
    curves = [records.validation[name]["all"] for name in names]
    tokens = sorted({value for curve in curves for value in curve["tokens"]})
    found = [dict(zip(curve["tokens"], curve["bits_per_byte"], strict=True)) for curve in curves]
    rows = [[f"{value:,.0f}", *(number(curve[value]) if value in curve else NONE for curve in found)]
            for value in tokens]
    return Table("Validation bits per byte by tokens", ["Tokens", *names], rows)


def _validation_gaps(records: Records) -> list[Block]:
    gaps = validation_gaps(records)
    if not gaps:
        return []
    twins = dict(records.fp8_pairs)
    names = [f"{name} / {twins.get(name, records.hybrid_seeds[0])}" for name in gaps]
    rows = [[f"{points[0][0]:,.0f}", *(percent(value, 3) for _, value in points)]
            for points in zip(*gaps.values(), strict=True)]
    return [Table("Relative gap (BF16 − other) / BF16 in validation bits per byte; negative is worse than BF16",
                  ["Tokens", *names], rows)]


def _loss_gaps(records: Records) -> list[Block]:
    """The smoothed gap in training loss, a column a seed, and its mean and spread where there are several."""
    gaps = loss_gaps(records)
    if not gaps:
        return []
    rows = []
    for points in zip(*gaps.values(), strict=True):
        values = [value for _, value in points]
        spread = half_range(values)
        mean = [] if spread is None else [f"{percent(fmean(values), 3)} ± {percent(spread, 3)}"]
        rows.append([f"{points[0][0]:,.0f}", *(percent(value, 3) for value in values), *mean])
    header = ["Tokens", *(f"{fp8} / {bf16}" for fp8, bf16 in records.fp8_pairs)]
    return [Table("Relative gap (BF16 − FP8) / BF16 in smoothed training loss; negative is worse than BF16",
                  header + (["Mean ± half the range"] if len(gaps) > 1 else []), rows)]


def _inference(records: Records) -> list[Block]:
    benchmark = records.metrics("benchmark")
    rows, caches = [], []
    for points in zip(*records.decode.values(), strict=True):
        context = points[0].context
        rows.append([f"{context:,}", *(f"{point.tokens_per_second:,.1f} ± "
                                       f"{point.seconds_per_token_spread * point.tokens_per_second ** 2:,.1f}"
                                       for point in points),
                     f"{benchmark[f'decode_ratio_{context}']:.2f}",
                     f"{benchmark[f'compressed_decode_ratio_{context}']:.2f}"])
        caches.append([f"{context:,}", *(f"{point.cache_mib:,.2f}" for point in points)])
    prompts = [[f"{point.context:,}", point.model, f"{point.time_to_first_token:,.3f}",
                f"{point.context / point.time_to_first_token:,.0f}", f"{point.prefill_of_floor:.2f}",
                f"{point.decode_of_floor:.2f}", f"{point.output_tokens_per_second:,.1f}", f"{point.memory_gib:,.3f}"]
               for points in zip(*records.decode.values(), strict=True) for point in points
               if point.time_to_first_token is not None]
    suffix = "_cache_mib_at_65536"
    closed = [[f"`{name}`", f"{benchmark[f'{name}_parameters']:,.0f}", f"{benchmark[f'{name}_weights_gib']:,.1f}",
               f"{benchmark[key]:,.0f}"]
              for key in benchmark if key.endswith(suffix) for name in [key.removesuffix(suffix)]]
    return [
        Table("Decoding, measured: tokens/s ± spread over repeats",
              ["Context", *records.decode, "hybrid / transformer", "compressed / hybrid"], rows),
        Table(f"Requests that read the context and write {records.params.benchmark.output_tokens:,} tokens",
              ["Context", "Model", "First token (s)", "Prompt (tokens/s)", "of its floor", "Decoding, of its floor",
               "Output tokens/s", "Memory (GiB)"], prompts),
        Table("Cache of one sequence (MiB)", ["Context", *records.decode], caches),
        *_served(benchmark),
        Table("At the published sizes, in closed form (not measured)",
              ["Model", "Parameters", "Weights (GiB)", "Cache at 65,536 tokens (MiB)"], closed),
    ]


def _served(benchmark: Metrics) -> list[Block]:
    """The published models at their own geometry, where a GPU measured them, beside the paper's Figure 12."""
    suffix = "_served_output_tokens_per_second"
    names = [key.removesuffix(suffix) for key in benchmark if key.endswith(suffix)]
    if not names:
        return []
    first = f"{names[0]}_served_"
    rows = [[f"`{name}`", f"{benchmark[f'{name}_served_weights_gib']:,.1f}",
             f"{benchmark[f'{name}_served_batch']:,.0f}",
             f"{benchmark[f'{name}_served_time_to_first_token']:,.2f}",
             f"{benchmark[f'{name}_served_prefill_of_floor']:.2f}",
             f"{benchmark[f'{name}_served_decode_tokens_per_second']:,.0f}",
             f"{benchmark[f'{name}_served_decode_of_floor']:.2f}",
             f"{benchmark[name + suffix]:,.0f}", f"≈ {PAPER_TOKENS_PER_SECOND[name]:g}",
             f"{benchmark[f'{name}_served_peak_gib']:,.1f}"] for name in names]
    return [Table(f"The published models at their own geometry: {benchmark[first + 'context']:,.0f} tokens in, "
                  f"{benchmark[first + 'output']:,.0f} out, the largest batch that fits",
                  ["Model", "Weights (GiB)", "Batch", "First token (s)", "of its floor", "Decoding (tokens/s)",
                   "of its floor", "Output tokens/s", "Paper, H100", "Memory (GiB)"], rows)]


def _data(records: Records) -> list[Section]:
    first, *others = data_sections.sections(records.data)
    return [replace(first, blocks=[Paragraph(data_sections.summary(records.data)), *first.blocks]), *others]


def _export(records: Records) -> Table:
    models = [records.metrics("export", name) for name in records.params.models]
    keys = [key for key in models[0] if all(key in metrics for metrics in models)]
    rows = [[name, *(f"{metrics[key]:,}" if isinstance(metrics[key], int) else f"{metrics[key]:.3g}" for key in keys)]
            for name, metrics in zip(records.params.models, models, strict=True)]
    return Table("Each model in both forms, compared", ["Model", *(key.replace("_", " ") for key in keys)], rows)


def _stage_times(records: Records) -> Table:
    rows = [[label, f"`{run.provenance.command}`", f"{run.provenance.wall_seconds:,.1f}",
             f"{run.provenance.peak_memory_gib:.2f}", "yes" if run.provenance.resumed else "no"]
            for label, run in records.runs.items()]
    return Table("Every run", ["Stage", "Command", "Seconds", "Peak memory (GiB)", "Resumed"], rows, text_columns=2)


def _provenance(records: Records) -> list[Block]:
    runs = {label: run.provenance for label, run in records.runs.items()}
    rows = []
    for commit, digest in dict.fromkeys((run.commit, run.code_digest) for run in runs.values()):
        made = [label for label, run in runs.items() if (run.commit, run.code_digest) == (commit, digest)]
        rows.append([f"`{_commit(commit)}`", f"`{digest[:16]}`", _all_or(made, len(runs))])
    versions = {f"{name} {version}" for run in runs.values() for name, version in run.versions.items()}
    inputs: dict[tuple[str, str], list[str]] = {}
    for label, run in runs.items():
        for path, digest in run.inputs.items():
            inputs.setdefault((path, digest), []).append(label)
    read = [[f"`{path}`", f"`{digest[:16]}`", ", ".join(labels)] for (path, digest), labels in sorted(inputs.items())]
    text = io.StringIO()
    YAML().dump(records.params.model_dump(mode="json"), text)
    return [
        Table("Code", ["Commit", "Digest of the code", "Stages"], rows, text_columns=3),
        Paragraph(f"Versions: {', '.join(sorted(versions))}."),
        Table("Inputs and their SHA-256 (a path with two digests was read in two states)",
              ["Input", "Digest", "Read by"], read, text_columns=3),
        Listing("Parameters (`params.yaml`)".replace("`", ""), text.getvalue()),
    ]


# --- Words ------------------------------------------------------------------------------------------------------------


def _figures(drawn: dict[str, Plot], *names: str) -> Figures:
    return Figures([drawn[name] for name in names if name in drawn])


def _all_or(labels: list[str], total: int) -> str:
    return f"all {total}" if len(labels) == total else ", ".join(labels)


def _short(value: float) -> str:
    """1.65 million for 1,652,736."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def _commit(commit: str | None) -> str:
    if commit is None:
        return "not in git"
    head, _, changes = commit.partition("+")
    return head[:12] + ("+" + changes if changes else "")


def _machines(machines: list[dict[str, Any]]) -> str:
    """Accelerators (only stages that load torch see them) and processors, each once."""
    accelerators = [machine["accelerator"] for machine in machines if "accelerator" in machine]
    processors = [f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
                  for machine in machines]
    return "; ".join(dict.fromkeys([*accelerators, *processors]))
