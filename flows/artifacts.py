"""What the flow publishes on Prefect's pages: the plan, progress bars, metrics tables and the report."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.dvc_graph import Node, ProgressLine

SECONDS_BETWEEN_UPDATES = 2.0


def key(text: str) -> str:
    """An artifact key: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def publish_plan(nodes: dict[str, Node], stale: set[str]) -> None:
    rows = [
        {"stage": name, "plan": "run" if name in stale else "cached", "needs": ", ".join(sorted(node.needs))}
        for name, node in nodes.items()
    ]
    create_table_artifact(table=rows, key="plan", description="Stages in order, and what this run does with each.")


def publish_metrics(metrics: dict[str, dict[str, float]], profile: str) -> None:
    """One table a stage, one row a variant, from `runs/PROFILE/STAGE[/VARIANT]/metrics.json`."""
    tables: dict[str, list[dict[str, float | str]]] = {}
    for file, values in metrics.items():
        parts = Path(file).parts
        if parts[:2] == ("runs", profile):
            tables.setdefault(parts[2], []).append({"variant": "/".join(parts[3:-1]), **values})
    for stage, rows in tables.items():
        create_table_artifact(table=rows, key=key(f"metrics-{stage}"), description=f"Metrics of {stage}")


def publish_report(directory: Path) -> None:
    """The claims as a table, and a link to the report's page."""
    found = json.loads((directory / "claims.json").read_text())
    rows = [{name: claim[name] for name in ("number", "title", "paper", "ours", "answer", "because")}
            for claim in found["claims"]]
    create_table_artifact(table=rows, key="claims",
                          description=", ".join(f"{answer}: {count}" for answer, count in found["counts"].items()))
    page = (directory / "index.html").absolute()
    create_link_artifact(link=page.as_uri(), link_text=str(page), key="report-page", description="The report")


class ProgressBar:
    """A stage's progress artifact: created with its first step, then updated now and then."""

    def __init__(self, stage: str):
        self.stage = stage
        self.id: UUID | None = None
        self.updated = 0.0

    def update(self, progress: ProgressLine) -> None:
        now = time.monotonic()
        if now - self.updated < SECONDS_BETWEEN_UPDATES and progress.step < progress.total:
            return
        self.updated = now
        percent = min(100.0, 100.0 * progress.step / progress.total)
        if self.id is None:
            created = create_progress_artifact(
                progress=percent, key=key(f"progress-{self.stage}"), description=progress.text
            )
            self.id = created if isinstance(created, UUID) else None
        else:
            update_progress_artifact(artifact_id=self.id, progress=percent, description=progress.text)
