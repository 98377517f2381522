"""Components found in parts, and decisions on random band tables, against NetworkX's."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.annotate.dedup import components as joining
from data_pipeline.annotate.dedup import deduplicate
from data_pipeline.annotate.dedup.components import components, part_of_vertex, parted_edges, roots_of
from data_pipeline.annotate.dedup.deduplicate import COPY, COPY_OF_HELD_OUT, NEAR, NEAR_HELD_OUT, Deduplicate
from data_pipeline.annotate.passes import Arrays, Groups, Held, Passes
from data_pipeline.config import MinHashConfig
from data_pipeline.storage import Surveys
from data_pipeline.text.words import UInt64
from data_pipeline.workers.executor import InProcess, Processes, Workers
from tests.data_pipeline.annotate.here import Here

BANDS = 7


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    backend = Processes(2)
    yield Workers(backend)
    backend.close()


def least(upper: UInt64, lower: UInt64) -> dict[int, int]:
    """Vertex -> least vertex of its component."""
    graph = nx.Graph(zip(upper.tolist(), lower.tolist(), strict=True))
    return {vertex: min(component) for component in nx.connected_components(graph) for vertex in component}


def in_parts(upper: UInt64, lower: UInt64, parts: int, largest: int) -> dict[int, int]:
    made = [[Held(parted_edges(upper[half::2], lower[half::2], parts))] for half in (0, 1)]
    found = components(made, parts, largest, Here())
    vertices = np.unique(np.concatenate([upper, lower]))
    owner, roots = part_of_vertex(vertices, parts), {}
    for part in range(parts):
        own = vertices[owner == part]
        roots |= dict(zip(own.tolist(), roots_of(own, found, part).tolist(), strict=True))
    return roots


def edges(random: np.random.Generator, kind: str, count: int) -> tuple[UInt64, UInt64]:
    """Of a graph of that kind, upper vertex first."""
    names = np.unique(random.integers(0, 2**64, count + 1, dtype=np.uint64))
    if kind != "path in order":
        names = random.permutation(names)
    pairs = {
        "path": (names[1:], names[:-1]), "path in order": (names[1:], names[:-1]),
        "star": (names[1:], np.full(len(names) - 1, names[0])),
        "random": tuple(random.choice(names, (2, count))),
        "clusters": (names[1:], names[np.arange(len(names) - 1) // 5 * 5]),
    }[kind]
    return np.maximum(*pairs), np.minimum(*pairs)


@pytest.mark.parametrize("kind", ["path", "path in order", "star", "random", "clusters"])
@pytest.mark.parametrize(
    ("parts", "largest", "at_once"), [(1, 1, 9), (2, 1, 1e6), (3, 50, 70), (16, 1, 0), (16, 200, 5)]
)
def test_parts_find_the_components(monkeypatch, kind, parts, largest, at_once):
    monkeypatch.setattr(joining, "EDGES_AT_ONCE", at_once)
    upper, lower = edges(np.random.default_rng(parts), kind, 400 if kind != "path in order" else 60)
    assert in_parts(upper, lower, parts, largest) == least(upper, lower)


def test_a_graph_without_edges():
    none = np.empty(0, np.uint64)
    assert in_parts(none, none, 3, 0) == {}


Table = tuple[UInt64, np.ndarray, UInt64]       # ids (documents, 2), held out, band hashes (BANDS, documents)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Documents with copies among them, whose bands are drawn from few hashes or many; copies have the same bands."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    documents, texts = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    hashes = random.integers(0, 2**64, draw(st.integers(1, 300)), dtype=np.uint64)
    ids = random.integers(0, 2**64, (texts, 2), dtype=np.uint64)
    bands = random.choice(hashes, (BANDS, texts))
    text = random.integers(0, texts, documents)
    return ids[text], random.random(documents) < draw(st.sampled_from([0.0, 0.2, 1.0])), bands[:, text]


def surveys_of(table: Table, shards: int) -> list[Arrays]:
    ids, held_out, bands = table
    surveys = []
    for number in range(shards):
        own = slice(len(ids) * number // shards, len(ids) * (number + 1) // shards)
        arrays = {"size": np.array([len(ids[own])]), "ids": ids[own], "held_out": held_out[own]}
        surveys.append(arrays | {f"band{band}": bands[band, own] for band in range(BANDS)})
    return surveys


def by_networkx(table: Table) -> list[int]:
    """The reason code of each document."""
    ids, held_out, bands = table
    names = [tuple(row) for row in ids.tolist()]
    merit = [(not held, name, place) for place, (held, name) in enumerate(zip(held_out.tolist(), names, strict=True))]
    graph = nx.Graph()
    graph.add_nodes_from(range(len(names)))
    for key in (names, *bands.tolist()):
        first: dict[object, int] = {}
        graph.add_edges_from((first.setdefault(value, place), place) for place, value in enumerate(key))
    reasons = [0] * len(names)
    for component in nx.connected_components(graph):
        best = min(component, key=merit.__getitem__)
        for place in component:
            same = min((other for other in component if names[other] == names[place]), key=merit.__getitem__)
            if place != same:
                reasons[place] = COPY_OF_HELD_OUT if held_out[same] > held_out[place] else COPY
            elif place != best:
                reasons[place] = NEAR_HELD_OUT if held_out[best] > held_out[place] else NEAR
    return reasons


def decided(table: Table, shards: int, part: float, passes: Passes) -> list[int]:
    step = Deduplicate(MinHashConfig(shingle_characters=24, bands=BANDS, rows=13), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deduplicate, "PART_DOCUMENTS", part)
        decision = step.decide(surveys_of(table, shards), passes)
        return [reason for own in decision.shards for reason in own["reason"].tolist()]


@settings(max_examples=100, deadline=None)
@given(tables(), st.integers(1, 12), st.sampled_from([1, 4, 30, 1e6]), st.integers(1, 9))
def test_any_parts_decide_as_the_whole_graph(table, shards, part, workers):
    expected = by_networkx(table)
    assert decided(table, shards, part, Here(workers)) == expected
    assert Counter(decided(table, 1, 1e6, Here())) == Counter(expected)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables(), st.integers(1, 5), st.sampled_from([4, 1e6]))
def test_two_workers_decide_as_the_whole_graph(pool, tmp_path_factory, table, shards, part):
    passes = Passes(tmp_path_factory.mktemp("passes"), pool)
    assert decided(table, shards, part, passes) == by_networkx(table)


class Stop(Exception):
    pass


def test_passes_cut_short_go_on(tmp_path: Path) -> None:
    """Stopped before each of its pieces in turn: nothing that was made is made again, and the decision is the same."""
    random = np.random.default_rng(0)
    table = (random.integers(0, 2**64, (60, 2), dtype=np.uint64), np.zeros(60, bool),
             random.choice(random.integers(0, 2**64, 90, dtype=np.uint64), (BANDS, 60)))

    class Stopping(Passes):
        """Makes one piece that was missing, then stops."""

        pieces = 0

        def run(self, name, function, count):
            for item in range(count):
                if Surveys(self.directory, name, item + 1).missing:
                    if self.pieces == 1:
                        raise Stop
                    super().run(name, function, item + 1)
                    self.pieces += 1
            return super().run(name, function, count)

    stops = 0
    while True:
        try:
            found = decided(table, 6, 20, Stopping(tmp_path, Workers(InProcess())))
            break
        except Stop:
            stops += 1
    assert stops > 30
    assert found == by_networkx(table) and any(found)
    assert not list(tmp_path.glob("*-given-*.npz"))     # which are as large as the work


@pytest.mark.parametrize("shards", [1, 2, 7, 30])
def test_groups_hold_every_shard(shards):
    for number in range(1, shards + 1):
        groups = Groups([{}] * shards, number)
        assert [shard for group in range(number) for shard in groups.shards(group)] == list(range(shards))
        assert all(groups.group_of(shard) == group for group in range(number) for shard in groups.shards(group))
