"""Write down what annotate's sources and evaluation sets and an outside tokenizer are made of at the moment; read none.

    python -m stages.sources

Their files lie where DVC does not look. This stage always runs, in a second; annotate and tokenize depend on what it
writes, and run again when files were added, removed or changed (name, size, time), when another version of a package is
installed, or when a branch of the Hub moved.

Writes  data/PROFILE/sources.json, data/PROFILE/outside_tokenizer.json (null where tokenize.tokenizer is)
        runs/PROFILE/sources/   metrics.json, provenance.json
"""

from __future__ import annotations

from typing import Any

from stages.frame.common import Stage, run_stage, write


def sources(stage: Stage) -> dict[str, Any]:
    """Write what the sources and an outside tokenizer are, by content; metrics."""
    from data_pipeline.sources.identity import identity, pinned, stamp

    config, tokenizer = pinned(stage.params.annotate), stage.params.tokenize.tokenizer
    write(stage.out_data / "sources.json", identity(config))
    write(stage.out_data / "outside_tokenizer.json", tokenizer and stamp([tokenizer]))
    return {"sources": len(config.sources)}


if __name__ == "__main__":
    run_stage(sources, __doc__, sections=("annotate", "tokenize"))
