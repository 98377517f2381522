"""What the steps of a compression found, as its records hold it (`model.compression.schema`, docs/compression.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.compression.candidates import Candidate
from model.compression.comparison import Closeness
from model.compression.config import CompressConfig
from model.compression.latency import LatencyTable
from model.compression.schema import CandidateRecord, FfnImportance, Importance, LayerImportance
from model.compression.width_importance import WidthImportance, kept_share
from model.config import ModelConfig

if TYPE_CHECKING:
    from model.compression.funnel import Rounds

GIB = 2**30


def importance_record(
    parent: ModelConfig, scores: Tensor, widths: WidthImportance, config: CompressConfig
) -> Importance:
    """What the scores say of every layer and axis; `scores` (layers, samples) float64."""
    means = scores.mean(dim=1).tolist()
    return Importance(
        samples={"layers": config.importance_samples, "widths": config.ffn_importance_samples},
        layers=[
            LayerImportance(index=index, symbol=symbol, importance=means[index],
                            standard_error=_standard_error(scores[index]))
            for index, symbol in enumerate(parent.pattern)
        ],
        ffn=[
            FfnImportance(index=index, kept_share_of_importance={
                width: kept_share(widths.neurons[index], width) for width in config.ffn_widths})
            for index in sorted(widths.neurons)
        ],
        mamba_heads={index: values.tolist() for index, values in widths.mamba_heads().items()},
        reliability=widths.reliability,
    )


def _standard_error(samples: Tensor) -> float:
    return float(samples.std() / len(samples) ** 0.5)


def candidate_records(
    candidates: Sequence[Candidate], rounds: Rounds, table: LatencyTable | None
) -> list[CandidateRecord]:
    """One record a candidate, best first; null where a later round was not reached or nothing was timed."""
    records = []
    for rank, index in enumerate(rounds.order, start=1):
        candidate, close = candidates[index], rounds.zero_shot.get(index)
        records.append(CandidateRecord(
            index=index,
            pattern=candidate.config.pattern,
            ffn_hidden_size=candidate.config.ffn_hidden_size,
            parameters=candidate.parameters,
            memory_gib=candidate.memory.total / GIB,
            decode_milliseconds=1e3 * table.seconds(candidate.config) if table else None,
            importance=candidate.importance,
            agreement=close.agreement if close else None,
            accuracy=close.accuracy if close else None,
            kl_cut=close.kl if close else None,
            task_accuracy=rounds.task.get(index),
            kl_short=rounds.short[index].kl if index in rounds.short else None,
            rank=rank,
            chosen=rank == 1,
        ))
    return records


def ranking_record(found: Mapping[int, Closeness]) -> list[dict[str, Any]]:
    """Closeness by the candidate's index."""
    return [{"index": index, **value._asdict()} for index, value in found.items()]
