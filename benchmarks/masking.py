"""How much of personal data and secrets masking finds, and how much of what it replaces is none.

    python -m benchmarks.masking

On the labelled set of tests/data_pipeline/annotate/masking_cases.py. Recall: of the texts with one, those that come out
as labelled. Precision: of the texts in which something was replaced, those in which that was right.
"""

from __future__ import annotations

import argparse

import pyarrow as pa

from data_pipeline.annotate.mask import PLACEHOLDERS, Mask
from data_pipeline.annotate.step import SCHEMA
from tests.data_pipeline.annotate.masking_cases import Case, cases


def masked(texts: list[str], kind: str) -> list[str]:
    """The texts after masking of one kind."""
    table = pa.Table.from_pylist([{"id": "", "text": text} for text in texts], SCHEMA)
    return list(Mask([kind]).apply(table)["text"].to_pylist())      # type: ignore[list-item]


def wrong(labelled: list[Case]) -> list[tuple[Case, str]]:
    """The cases that come out otherwise than labelled, and how."""
    found = []
    for kind in PLACEHOLDERS:
        mine = [case for case in labelled if case.kind == kind]
        for case, text in zip(mine, masked([case.text for case in mine], kind), strict=True):
            if text != (case.text if case.masked is None else case.masked):
                found.append((case, text))
    return found


def table_of(labelled: list[Case], failed: list[tuple[Case, str]]) -> list[str]:
    lines = ["| kind | positives | found | recall | near misses | left | precision |", "| --- " * 7 + "|"]
    for kind in [*PLACEHOLDERS, "all"]:
        mine = [case for case in labelled if kind in (case.kind, "all")]
        bad = [(case, text) for case, text in failed if kind in (case.kind, "all")]
        positives = sum(case.masked is not None for case in mine)
        found = positives - sum(case.masked is not None for case, _ in bad)
        replaced_wrongly = sum(text != case.text for case, text in bad)
        left = len(mine) - positives - sum(case.masked is None for case, _ in bad)
        lines.append(f"| {kind} | {positives} | {found} | {found / positives:.3f} | {len(mine) - positives} | {left} | "
                     f"{found / (found + replaced_wrongly):.3f} |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    labelled = cases()
    failed = wrong(labelled)
    print(*table_of(labelled, failed), sep="\n")
    for case, text in failed:
        print(f"\n{case.kind}: {case.text!r}\nlabelled {case.masked!r}\nbecame   {text!r}")


if __name__ == "__main__":
    main()
