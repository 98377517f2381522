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

from stages.common import Stage, run_stage


def report(stage: Stage) -> dict[str, int]:
    import json

    from stages.report.claims import Answer, claims
    from stages.report.page import SAVED, report_page, write
    from stages.report.records import RecordError, load
    from stages.report.studies import FOLDER, load_studies

    records, studies, directory = load(stage), load_studies(FOLDER), reports_directory(stage)
    lost = [study for study in studies.values() if isinstance(study, RecordError)]
    page = report_page(records, lambda: claims(records, studies), lost)
    file = page.write(directory)
    write(directory / "claims.json", json.dumps(summary(page), indent=1, ensure_ascii=False) + "\n")
    for plot in page.blocks("plot"):
        if plot.name in SAVED:
            write(directory / f"{plot.name}.svg", plot.svg + "\n")
    stage.inputs += records.reader.files
    unread = list(dict.fromkeys([block.text for block in page.blocks("unread")] + records.reader.faults))
    print("\n".join([f"{file}: {page.summary}", *unread]), flush=True)
    return {
        "claims": len(page.claims),
        "claims_that_hold": page.counts.get(Answer.HOLDS, 0),
        "claims_that_do_not_hold": page.counts.get(Answer.FAILS, 0),
        "claims_that_cannot_be_told": page.counts.get(Answer.UNDECIDED, 0),
        "records_not_read": len(unread),
    }


def summary(page: Any) -> dict[str, Any]:
    """Contents of claims.json."""
    return {"profile": page.profile, **page.facts, "summary": page.summary, "counts": page.counts, "claims": [
        {"number": claim.number, "key": claim.key, "title": claim.title, "paper": claim.paper,
         "ours": "; ".join(f"{line.measure}: {line.ours}" for line in claim.evidence[:1]),
         "answer": str(claim.answer), "because": claim.because} for claim in page.claims]}


def reports_directory(stage: Stage) -> Path:
    """reports/PROFILE, or DIR/reports under --out DIR."""
    if stage.out_data == stage.data_root:
        return Path("reports") / stage.params.profile
    return stage.out_data.with_name("reports")


if __name__ == "__main__":
    run_stage(report, __doc__, sections=())
