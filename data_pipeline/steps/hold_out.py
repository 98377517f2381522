"""Whole sources set aside for evaluation, so that no file of a held-out distribution is ever trained on.

A split by file would put a package's idioms, vocabulary and half-copies on both sides.
"""

from __future__ import annotations

from collections import Counter

import polars as pl
import pyarrow as pa
import xxhash

from data_pipeline.config import DataError
from data_pipeline.steps.step import GlobalStep, Outcome, with_column

# Of a domain's target: what one source may bring, so that several are held out, and where they may end together.
LARGEST_SOURCE = 0.5
LARGEST_TOTAL = 1.5
ORDERS = 16

Sizes = dict[tuple[str, str], int]      # (source, domain) -> bytes


class HoldOut(GlobalStep):
    """Marks rows; removes none. Raises DataError where holding out leaves a domain without training text."""

    name = "hold_out"

    def __init__(self, fraction: float, seed: int):
        self.fraction, self.seed = fraction, seed

    def survey(self, table: pa.Table) -> Sizes:
        frame = pl.from_arrow(table.select(["source", "domain", "text"]))
        assert isinstance(frame, pl.DataFrame)
        sizes = frame.group_by("source", "domain").agg(pl.col("text").str.len_bytes().sum())
        return {(source, domain): size for source, domain, size in sizes.iter_rows()}

    def decide(self, surveys: list[Sizes]) -> list[frozenset[str]]:
        total: Counter[tuple[str, str]] = Counter()
        for survey in surveys:
            total.update(survey)
        chosen = choose_held_out(total, self.fraction, self.seed)
        return [chosen] * len(surveys)

    def apply(self, table: pa.Table, decision: frozenset[str]) -> Outcome:
        held_out = [source in decision for source in table["source"].to_pylist()]
        return Outcome(with_column(table, "held_out", held_out), [None] * len(table))


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
                f"Raise curate.megabytes_per_domain.{domain}, or lower curate.held_out_fraction, in params.yaml."
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
            for domain, size in by_source[source].items()
        )

    while short := [domain for domain in wanted if held[domain] < wanted[domain]]:
        useful = [source for source in waiting if source not in chosen and any(by_source[source][d] for d in short)]
        source = next((source for source in useful if excess(source) <= 1), None) or min(useful, key=excess)
        chosen.add(source)
        held.update(by_source[source])
    return chosen, held
