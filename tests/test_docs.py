"""The configuration that the guides show is one the stages take, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from ruamel.yaml import YAML

from data_pipeline.config import AnnotateConfig, ExecutorConfig, Source
from stages.frame.params import RuntimeConfig

ROOT = Path(__file__).parent.parent


def blocks(guide: str) -> list[Any]:
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / guide).read_text(), re.S)
    return [YAML(typ="safe").load(block) for block in found]


def test_the_guide_shows_what_the_stages_take() -> None:
    sources, scorers, runtime = blocks("data.md")
    kinds = [source.kind for source in TypeAdapter(list[Source]).validate_python(sources)]
    assert kinds == ["installed", "hub", "web", "files"]
    field = AnnotateConfig.model_fields["scorers"]
    assert len(TypeAdapter(field.annotation).validate_python(scorers["scorers"])) == 3
    assert ExecutorConfig(**runtime["runtime"]).executor == "slurm"


def test_the_guide_to_gpus_shows_launchers_and_layouts() -> None:
    common = {"executor": "local", "workers": 1, "slots": 1, "threads": 1, "stage_timeout_minutes": 60}
    torchrun, slurm = (RuntimeConfig(**common, **block["runtime"]) for block in blocks("gpu.md"))
    assert torchrun.launcher.kind == "torchrun"
    assert torchrun.launcher.processes == 2 * torchrun.parallel.tensor * torchrun.parallel.pipeline
    assert slurm.launcher.processes == 1536 and slurm.launcher.slurm.directives == ["--exclusive"]


def anchors(page: Path) -> set[str]:
    """GitHub's, of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for link, path, anchor in re.findall(r"\]\((?!http)(([^)#\s]*)#?([^)\s]*))\)", page.read_text()):
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken
