"""The report: every claim of the paper with its number, ours, the spread and a verdict; plots, tables, provenance.

Reads   runs/PROFILE/: metrics, curves and provenance of every stage; params.yaml
Writes  reports/PROFILE/index.html (self-contained) and reports/PROFILE/report.md

The same records give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from stages.common import Stage, run_stage


def report(stage: Stage) -> dict[str, int]:
    from stages.claims import claims
    from stages.records import load
    from stages.report_page import write_page
    from stages.report_sections import document
    from stages.verdicts import Verdict

    records = load(stage)
    page = document(records)
    file = write_page(page, reports_directory(stage))
    print(f"{file}: {page.summary}", flush=True)
    verdicts = [claim.verdict for claim in claims(records)]
    return {
        "claims": len(verdicts),
        "claims_that_hold": verdicts.count(Verdict.HOLDS),
        "claims_that_do_not_hold": verdicts.count(Verdict.FAILS),
        "claims_that_cannot_be_tested": verdicts.count(Verdict.UNTESTED),
    }


def reports_directory(stage: Stage) -> Path:
    """reports/PROFILE, or DIR/reports under --out DIR."""
    if stage.out_data == stage.data_root:
        return Path("reports") / stage.params.profile
    return stage.out_data.with_name("reports")


if __name__ == "__main__":
    run_stage(report, __doc__, sections=())
