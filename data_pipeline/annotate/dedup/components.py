"""Connected components of a graph that no process holds whole.

A vertex is a 64-bit number whose last 63 bits are those of a hash; its part is named by their prefix. The root of a
component is its least vertex. An edge (upper, lower) lies in the part of its upper vertex, and the components of a
part's edges give each of its vertices a root. What different parts say of one vertex are the edges of the next, smaller
graph, in which the vertices that are nobody's root no longer stand: they have a pointer to one that does, or that is a
root for good (local contraction: Lacki, Mirrokni and Wlodarczyk, arXiv 1807.10727). A graph that fits into one part
ends it, and the pointers are followed back. Vertices are as good as in random order, so that each graph has about two
thirds of the vertices of the one before where those are paths, and a small share where near-duplicates come in
clusters.

datatrove and text-dedup on one machine take all edges into one union-find; text-dedup on Spark alternates large and
small stars over all of them until nothing changes, NeMo Curator leaves it to cuGraph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_pipeline.annotate.passes import Arrays, Made, Passes, part_of, parted, taken
from data_pipeline.text.words import UInt64

EDGES_AT_ONCE = 1 << 22         # joined to what is known of a part: 90 bytes each
EDGE = ("upper", "lower")       # names of the arrays of edges, whose parts begin at "bounds"
ROOTS = ("vertex", "root")      # of the answer
POINTERS = ("pointer_upper", "pointer_lower")


def part_of_vertex(vertices: UInt64, parts: int) -> UInt64:
    """Which of so many parts each vertex is in: (vertices,)."""
    return part_of(vertices << np.uint64(1), parts)


def parted_edges(upper: UInt64, lower: UInt64, parts: int) -> dict[str, np.ndarray]:
    """Edges as `components` reads them."""
    return parted(part_of_vertex(upper, parts), parts, dict(zip(EDGE, (upper, lower), strict=True)))


def components(edges: Sequence[Made], parts: int, largest: int, passes: Passes) -> list[Made]:
    """The vertices that are not their component's root, with that root: arrays ROOTS, by part of the vertex.

    Args:
        edges: `parted_edges` of so many parts, all that any item of any of these made; they are read more than once.
        largest: edges that one part may hold.
    """
    graph = list(edges)
    levels: list[Made] = []
    while parts > 1 and sum(int(item["bounds"][-1]) for made in graph for item in made) > largest:
        levels.append(passes.exchange(f"contract{len(levels)}", partial(_labels, graph, parts), parts,
                                      partial(_contract, parts), parts))
        graph = levels[-1:]
    found = [passes.run("components", partial(_components, graph, parts), 1)]
    for number in reversed(range(len(levels))):
        found.append(passes.run(f"roots{number}", partial(_follow, levels[number], found, parts), parts))
    return found


def roots_of(vertices: UInt64, found: Sequence[Made], part: int) -> UInt64:
    """The root of each vertex of a part, in the answer of `components`."""
    pairs = [taken(made, part, ROOTS) for made in found]
    known, root = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    order = np.argsort(known)
    known, root = known[order], root[order]
    place = np.minimum(np.searchsorted(known, vertices), max(0, len(known) - 1))
    return np.where(known[place] == vertices, root[place], vertices) if len(known) else vertices


def _labels(graph: Sequence[Made], parts: int, part: int) -> Arrays:
    """What the edges of one part say is the root of each of their vertices; a root is its own."""
    return _as_roots(*_joined(item.piece(part, EDGE, "bounds") for made in graph for item in made), parts)


def _joined(edges: Iterable[Sequence[UInt64]]) -> tuple[UInt64, UInt64]:
    """Every vertex of `edges`, some of which come at a time, and the least of its component."""
    found, waiting = (np.empty(0, np.uint64),) * 2, list[Sequence[UInt64]]()
    for some in edges:
        waiting.append(some)
        if sum(len(upper) for upper, _ in waiting) > EDGES_AT_ONCE:
            found, waiting = _least([found, *waiting]), []
    return _least([found, *waiting])


def _least(edges: Sequence[Sequence[UInt64]]) -> tuple[UInt64, UInt64]:
    coded = pa.array(np.concatenate([*chain(*zip(*edges, strict=True))])).dictionary_encode()
    vertex, ends = coded.dictionary.to_numpy(), np.split(coded.indices.to_numpy(), 2)
    graph = coo_array((np.ones(len(ends[0]), bool), ends), shape=(len(vertex), len(vertex)))
    _, component = connected_components(graph, directed=False)
    least = np.full(len(vertex), np.iinfo(np.uint64).max)
    np.minimum.at(least, component, vertex)
    return vertex, least[component]


def _contract(parts: int, given: Made, part: int) -> Arrays:
    """The next graph's edges, and pointers by the part of what they point to, of the vertices of one part."""
    vertex, root = taken(given, part, ROOTS)
    order = np.lexsort((root, vertex))
    vertex, root = vertex[order], root[order]
    new = np.append(True, (vertex[1:] != vertex[:-1]) | (root[1:] != root[:-1]))[: len(vertex)]
    vertex, root = vertex[new], root[new]
    first = np.flatnonzero(np.append(True, vertex[1:] != vertex[:-1])[: len(vertex)])
    sizes = np.diff(np.append(first, len(vertex)))
    least = np.repeat(root[first], sizes)
    more = root != least
    last = first + sizes - 1
    leaf = last[root[last] != vertex[last]]         # no part has it for a root, else it were its own largest
    pointers = dict(zip(POINTERS, (vertex[leaf], least[leaf]), strict=True))
    return (parted_edges(root[more], least[more], parts)
            | parted(part_of_vertex(least[leaf], parts), parts, pointers, "pointer_bounds"))


def _components(graph: Sequence[Made], parts: int, _: int) -> Arrays:
    """The answer for a graph that fits into one part."""
    vertex, root = _joined([item[name] for name in EDGE] for made in graph for item in made)
    return _as_roots(vertex[vertex != root], root[vertex != root], parts)


def _follow(level: Made, found: Sequence[Made], parts: int, part: int) -> Arrays:
    """The roots of what points to vertices of one part."""
    upper, lower = taken(level, part, POINTERS, "pointer_bounds")
    return _as_roots(upper, roots_of(lower, found, part), parts)


def _as_roots(vertex: UInt64, root: UInt64, parts: int) -> Arrays:
    return parted(part_of_vertex(vertex, parts), parts, dict(zip(ROOTS, (vertex, root), strict=True)))
