"""The report: every claim of the paper with its number, ours, the interval and an answer; figures, tables, provenance.

    python -m stages.report

Reads   runs/PROFILE/: metrics, curves and provenance of every stage; docs/results/studies/; params.yaml
Writes  reports/PROFILE/index.html (self-contained), claims.json (for README and docs) and four of its figures as SVG

The same records give the same bytes. A record that cannot be read is named where it belongs, printed, and counted in
the metric `records_not_read`; the page is made for the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.frame.common import Stage, run_stage, write

SAVED = ("validation", "decoding", "fp8-gap", "distillation")   # figures that are files of their own, too


def report(stage: Stage) -> dict[str, int]:
    """Write the page, its figures and the claims; metrics."""
    from stages.report.claims import claims
    from stages.report.page import report_page
    from stages.report.records import Records, load_studies

    # --out DIR writes to DIR/reports.
    directory = Path("reports", stage.params.profile) if stage.out_data == stage.data_root else (
        stage.out_data.with_name("reports"))
    if stage.out_records != stage.records_root:
        print(f"Reads {stage.records_root}, nothing of {stage.out_records}.", flush=True)
    stage.verify(stage.records_root)
    records, studies = Records(stage.params, stage.records_root), load_studies()
    found = claims(records, studies)
    page = report_page(records, found, studies)
    counts = page.values["counts"]
    files: dict[str, Any] = {f"{name}.svg": page.plots[name] + "\n" for name in SAVED if name in page.plots}
    files |= {"index.html": page.text, "claims.json": {
        "profile": stage.params.profile, **page.values["facts"], "counts": counts,
        "claims": [{"number": claim.number, "key": claim.key, "title": claim.title, "paper": claim.paper,
                    "ours": "; ".join(f"{line.measure}: {line.ours}" for line in claim.evidence[:1]),
                    "answer": claim.answer, "because": claim.because} for claim in found],
    }}
    for name, content in files.items():
        write(directory / name, content)
    stage.inputs += records.reader.files
    unread = list(dict.fromkeys([*page.unread, *records.reader.faults]))
    answers = ", ".join(f"{answer}: {count}" for answer, count in counts.items())
    print("\n".join([f"{directory / 'index.html'}: {answers}", *unread]), flush=True)
    names = ("claims_that_hold", "claims_that_do_not_hold", "claims_that_cannot_be_told")
    return {"claims": len(found), **dict(zip(names, counts.values(), strict=True)), "records_not_read": len(unread)}


if __name__ == "__main__":
    run_stage(report, __doc__, sections=())
