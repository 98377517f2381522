"""Held-out sources and held-out documents."""

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.annotate.hold_out import HoldOut, choose_held_out
from data_pipeline.config import DataError, HeldOutConfig
from tests.data_pipeline.annotate.here import run, table


def marked(step: HoldOut, shards: list[pa.Table]) -> list[dict[str, object]]:
    return [row for shard in run(step, shards) for row in shard.to_pylist()]


ROWS = [{"text": str(i), "source": f"package{i % 20}", "domain": ("code", "docs")[i % 2]} for i in range(60)]
SHARDS = [table(ROWS[:31]), table(ROWS[31:])]


def test_held_out_sources_meet_every_domain():
    random = np.random.default_rng(0)
    sizes = {(f"package{i}", domain): int(size) for i in range(60) for domain, size in
             zip(("code", "docs"), random.lognormal(8, 1.5, 2), strict=True)}
    sizes["giant", "code"] = sizes["giant", "docs"] = 2 * sum(sizes.values())
    sizes["only-reference", "reference"], sizes["also-reference", "reference"] = 1000, 9000
    for seed in range(4):
        chosen = choose_held_out(sizes, 0.1, seed)
        assert "giant" not in chosen and len(chosen) < 62
        for domain in ("code", "docs", "reference"):
            total = sum(size for (_, d), size in sizes.items() if d == domain)
            held = sum(size for (source, d), size in sizes.items() if d == domain and source in chosen)
            assert 0.1 * total <= held <= 0.11 * total      # the nearest of several draws, each up to 0.15
    assert choose_held_out(dict(reversed(sizes.items())), 0.1, seed=3) == chosen
    assert choose_held_out(sizes, 0.1, seed=4) != chosen


def test_a_source_too_large_is_taken_once_where_all_are():
    sizes = {("x", "code"): 20, ("x", "docs"): 1}
    sizes |= {(f"y{number}", domain): size for number in range(4) for domain, size in (("code", 20), ("docs", 25))}
    chosen = choose_held_out(sizes, 0.1, seed=3)
    assert "x" in chosen and len(chosen) == 2           # x adds least, and has too little of docs


def test_a_domain_of_one_source_cannot_be_split():
    with pytest.raises(DataError, match=r"`docs`.*\n.*annotate\.held_out\.fraction.*unit: document"):
        choose_held_out({("a", "docs"): 10, ("b", "code"): 1, ("c", "code"): 9}, 0.1, seed=1)


def test_a_held_out_source_is_held_out_in_every_shard_and_domain():
    rows = marked(HoldOut(HeldOutConfig(fraction=0.1, unit="source"), 1), SHARDS)
    held, kept = ({row["source"] for row in rows if row["held_out"] is flag} for flag in (True, False))
    assert 0 < len(held) < len(kept) and not held & kept


def test_single_documents_by_lot_whatever_their_shard():
    rows = table([{"text": f"text {i}", "source": "one", "domain": "web"} for i in range(4000)])
    step = HoldOut(HeldOutConfig(fraction=0.1, unit="document"), 1)
    held = {row["id"] for row in marked(step, [rows]) if row["held_out"]}
    assert 320 < len(held) < 480
    assert {row["id"] for row in marked(step, [rows[:7], rows[7:]]) if row["held_out"]} == held
    other = HoldOut(HeldOutConfig(fraction=0.1, unit="document"), 2)
    assert len({row["id"] for row in marked(other, [rows]) if row["held_out"]} & held) < 100


@pytest.mark.parametrize("unit", ["source", "document"])
def test_no_fraction_holds_nothing_out(unit):
    rows = marked(HoldOut(HeldOutConfig(fraction=0, unit=unit), 1), SHARDS)
    assert [row["held_out"] for row in rows] == [False] * 60
