"""The configuration that docs/data.md shows is one the stages take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from ruamel.yaml import YAML

from data_pipeline.config import AnnotateConfig, ExecutorConfig, Source

ROOT = Path(__file__).parent.parent


def blocks() -> list[Any]:
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S)
    return [YAML(typ="safe").load(block) for block in found]


def test_the_guide_shows_what_the_stages_take() -> None:
    sources, scorers, runtime = blocks()
    kinds = [source.kind for source in TypeAdapter(list[Source]).validate_python(sources)]
    assert kinds == ["installed", "hub", "web", "files"]
    field = AnnotateConfig.model_fields["scorers"]
    assert len(TypeAdapter(field.annotation).validate_python(scorers["scorers"])) == 3
    assert ExecutorConfig(**runtime["runtime"]).executor == "slurm"
