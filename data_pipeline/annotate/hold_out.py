"""Text set aside for evaluation: whole sources, so that no file of a held-out distribution is ever trained on, or
single documents.

A split of packages or sites by file would put their idioms, vocabulary and half-copies on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash

from data_pipeline.annotate.passes import Arrays, Passes
from data_pipeline.annotate.step import Decision, GlobalStep, with_column
from data_pipeline.config import DataError, HeldOutConfig

# Of a domain's target: what one source may bring, so that several are held out, and where they may end together.
LARGEST_SOURCE = 0.5
LARGEST_TOTAL = 1.5
ORDERS = 16

Sizes = dict[tuple[str, str], int]      # (source, domain) -> bytes


class HoldOut(GlobalStep):
    """Fills `held_out`: whole sources with `fraction` of each domain's bytes, or documents by a salted hash of the id.

    Raises DataError where holding out whole sources leaves a domain with too little training text.
    """

    name = "hold_out"

    def __init__(self, config: HeldOutConfig, seed: int):
        self.config, self.seed = config, seed

    @property
    def by_source(self) -> bool:
        """Whether whole sources are held out, not single documents."""
        return self.config.unit == "source" and self.config.fraction > 0

    def survey(self, table: pa.Table) -> Arrays:
        """Bytes of each source and domain; nothing where documents are held out one by one."""
        if not self.by_source:
            return {}
        frame = pl.from_arrow(table.select(["source", "domain", "text"]))
        assert isinstance(frame, pl.DataFrame)
        sizes = frame.group_by("source", "domain").agg(pl.col("text").str.len_bytes().sum()).sort("source", "domain")
        return {
            "source": np.array(sizes["source"].to_list(), dtype=np.str_),
            "domain": np.array(sizes["domain"].to_list(), dtype=np.str_),
            "bytes": sizes["text"].to_numpy().astype(np.int64),
        }

    def decide(self, surveys: Sequence[Arrays], passes: Passes) -> Decision:
        chosen: list[str] = []
        if self.by_source:
            total: Counter[tuple[str, str]] = Counter()
            for survey in surveys:
                columns = (survey[name].tolist() for name in ("source", "domain", "bytes"))
                total.update({(source, domain): size for source, domain, size in zip(*columns, strict=True)})
            chosen = sorted(choose_held_out(total, self.config.fraction, self.seed))
        return Decision({"sources": np.array(chosen, dtype=np.str_)}, [{}] * len(surveys))

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        if self.by_source:
            chosen = set(shared["sources"].tolist())
            return with_column(table, "held_out", [source in chosen for source in table["source"].to_pylist()])
        limit = self.config.fraction * 2**64
        lots = (xxhash.xxh3_64_intdigest(f"{self.seed}:{name}".encode()) for name in table["id"].to_pylist())
        return with_column(table, "held_out", [lot < limit for lot in lots])


def choose_held_out(sizes: Sizes, fraction: float, seed: int) -> frozenset[str]:
    """Sources that hold at least `fraction` of each domain's bytes: of ORDERS draws, the one nearest to it."""
    by_source: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for (source, domain), size in sorted(sizes.items()):
        by_source.setdefault(source, Counter())[domain] = size
        total[domain] += size
    wanted = {domain: size * fraction for domain, size in total.items()}

    def overshoot(drawn: tuple[set[str], Counter[str]]) -> float:
        return max((drawn[1][domain] / wanted[domain] for domain in wanted), default=0.0)

    chosen, held = min((draw(by_source, wanted, f"{seed}:{number}") for number in range(ORDERS)), key=overshoot)
    for domain in wanted:
        if held[domain] > total[domain] / 2:
            raise DataError(
                f"Domain `{domain}`: its text comes from too few sources to hold out {fraction:.0%} as whole "
                f"sources ({held[domain]} of {total[domain]} bytes would go).\n"
                "Read more of it, lower annotate.held_out.fraction, or hold out by `unit: document`, in params.yaml."
            )
    return frozenset(chosen)


def draw(by_source: dict[str, Counter[str]], wanted: dict[str, float], salt: str) -> tuple[set[str], Counter[str]]:
    """Sources in the order of a salted hash of their names, until each domain has the bytes wanted; and their bytes.

    A source that adds nothing where bytes are still wanted, or too much anywhere, is passed over; if every remaining
    one adds too much, the one that adds least is taken.
    """
    held: Counter[str] = Counter()
    chosen: set[str] = set()
    waiting = sorted(by_source, key=lambda source: xxhash.xxh3_128_hexdigest(f"{salt}:{source}".encode()))

    def excess(source: str) -> float:
        return max(
            max(size / LARGEST_SOURCE, (held[domain] + size) / LARGEST_TOTAL) / wanted[domain]
            for domain, size in by_source[source].items() if wanted[domain]
        )

    def adds(source: str) -> bool:
        return any(by_source[source][domain] for domain in wanted if held[domain] < wanted[domain])

    def take(source: str) -> None:
        chosen.add(source)
        held.update(by_source[source])

    for source in waiting:              # one that adds nothing, or too much, will not do better later
        if adds(source) and excess(source) <= 1:
            take(source)
    while useful := [source for source in waiting if source not in chosen and adds(source)]:
        take(min(useful, key=excess))
    return chosen, held
