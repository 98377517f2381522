"""Write down what annotate's sources and evaluation sets are made of at the moment; read none of them.

    python -m stages.sources

Their files lie where DVC does not look. This stage always runs, in a second; annotate depends on what it writes, and
runs again when files were added, removed or changed (name, size, time), when another version of a package is installed,
or when a branch of the Hub moved.

Writes  data/PROFILE/sources.json
        runs/PROFILE/sources/   metrics.json, provenance.json
"""

from __future__ import annotations

from typing import Any

from stages.frame.common import Stage, run_stage, write


def sources(stage: Stage) -> dict[str, Any]:
    """Write what the sources are, by content; metrics."""
    from data_pipeline.sources.identity import identity, pinned

    config = pinned(stage.params.annotate)
    write(stage.out_data / "sources.json", identity(config))
    return {"sources": len(config.sources)}


if __name__ == "__main__":
    run_stage(sources, __doc__, sections=("annotate",))
