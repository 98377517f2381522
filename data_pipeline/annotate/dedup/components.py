"""Connected components of a graph that no process holds whole.

A vertex is a 64-bit number whose last 63 bits are those of a hash; its part is named by their prefix. The root of a
component is its least vertex. An edge (upper, lower) lies in the part of its upper vertex, and a part's union-find
gives each of its vertices a root. What different parts say of one vertex are the edges of the next, smaller graph, in
which the vertices that are nobody's root no longer stand: they have a pointer to one that does, or that is a root for
good (local contraction: Lacki, Mirrokni and Wlodarczyk, arXiv 1807.10727). A graph that fits into one part ends it, and
the pointers are followed back. Vertices are as good as in random order, so that each graph has about two thirds of the
vertices of the one before where those are paths, and a small share where near-duplicates come in clusters.

datatrove and text-dedup on one machine take all edges into one union-find; text-dedup on Spark alternates large and
small stars over all of them until nothing changes, NeMo Curator leaves it to cuGraph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numba import int64, njit, uint64
from numpy.typing import NDArray

from data_pipeline.annotate.passes import Arrays, Made, Passes, part_of, parted, taken
from data_pipeline.text.words import UInt64

Int32 = NDArray[np.int32]

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
    forest = Forest()
    for made in graph:
        for item in made:
            forest.join(*item.piece(part, EDGE, "bounds"))
    return _as_roots(*forest.roots(), parts)


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
    forest = Forest()
    for made in graph:
        for item in made:
            forest.join(*(item[name] for name in EDGE))
    vertex, root = forest.roots()
    return _as_roots(vertex[vertex != root], root[vertex != root], parts)


def _follow(level: Made, found: Sequence[Made], parts: int, part: int) -> Arrays:
    """The roots of what points to vertices of one part."""
    upper, lower = taken(level, part, POINTERS, "pointer_bounds")
    return _as_roots(upper, roots_of(lower, found, part), parts)


def _as_roots(vertex: UInt64, root: UInt64, parts: int) -> Arrays:
    return parted(part_of_vertex(vertex, parts), parts, dict(zip(ROOTS, (vertex, root), strict=True)))


class Forest:
    """Union-find over 64-bit numbers: an open-addressed table, at most three quarters full, 16 to 32 bytes a vertex."""

    def __init__(self) -> None:
        self.keys, self.parents, self.count = np.empty(1024, np.uint64), np.full(1024, -1, np.int32), 0

    def join(self, one: UInt64, other: UInt64) -> None:
        """one[i] and other[i] are in one tree."""
        self.keys, self.parents, self.count = _join(one, other, self.keys, self.parents, self.count)

    def roots(self) -> tuple[UInt64, UInt64]:
        """Every number seen, and the least of its tree."""
        return _roots(self.keys, self.parents, self.count)


@njit(cache=True, nogil=True)
def _place(key: int, keys: UInt64, parents: Int32) -> int:
    """Where a key stands in the table, or is to stand."""
    mask = uint64(len(keys) - 1)
    place = int64(key & mask)
    while parents[place] >= 0 and keys[place] != key:
        place = int64(uint64(place + 1) & mask)
    return int(place)


@njit(cache=True, nogil=True)
def _root(place: int, parents: Int32) -> int:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


@njit(cache=True, nogil=True)
def _larger(keys: UInt64, parents: Int32) -> tuple[UInt64, Int32]:
    """The table with twice the places."""
    new_keys, new_parents = np.empty(2 * len(keys), np.uint64), np.full(2 * len(keys), -1, np.int32)
    for place in range(len(keys)):
        if parents[place] >= 0:
            new = _place(keys[place], new_keys, new_parents)
            new_keys[new], new_parents[new] = keys[place], new
    for place in range(len(keys)):
        if parents[place] >= 0 and parents[place] != place:
            new_parents[_place(keys[place], new_keys, new_parents)] = _place(
                keys[parents[place]], new_keys, new_parents)
    return new_keys, new_parents


@njit(cache=True, nogil=True)
def _join(one: UInt64, other: UInt64, keys: UInt64, parents: Int32, count: int) -> tuple[UInt64, Int32, int]:
    for index in range(len(one)):
        if 4 * (count + 2) > 3 * len(keys):
            keys, parents = _larger(keys, parents)
        a = _place(one[index], keys, parents)
        if parents[a] < 0:
            keys[a], parents[a] = one[index], a
            count += 1
        b = _place(other[index], keys, parents)
        if parents[b] < 0:
            keys[b], parents[b] = other[index], b
            count += 1
        a, b = _root(a, parents), _root(b, parents)
        if keys[a] < keys[b]:
            parents[b] = a
        else:
            parents[a] = b
    return keys, parents, count


@njit(cache=True, nogil=True)
def _roots(keys: UInt64, parents: Int32, count: int) -> tuple[UInt64, UInt64]:
    vertices, roots, found = np.empty(count, np.uint64), np.empty(count, np.uint64), 0
    for place in range(len(keys)):
        if parents[place] >= 0:
            vertices[found], roots[found] = keys[place], keys[_root(place, parents)]
            found += 1
    return vertices, roots
