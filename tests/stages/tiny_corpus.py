"""A small curated directory and a working directory in which stages run as a user runs them."""

import json
import sysconfig
from pathlib import Path

import polars as pl
import xxhash
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
LABELS = ["high", "medium-high", "medium", "medium-low", "low"]
MODULES = sorted(STDLIB.glob("[a-c]*.py"))


def write_curated(curated: Path) -> None:
    """Standard-library modules as `code`, pieces of the language reference as `docs`; no document is `medium-low`."""
    topics = (STDLIB / "pydoc_data" / "topics.py").read_text()
    texts = [(path.read_text(), "code") for path in MODULES if path.stat().st_size > 0]
    texts += [(topics[start : start + 4000], "docs") for start in range(0, 160_000, 4000)]
    rows = [
        {"id": xxhash.xxh3_128_hexdigest(text.encode()), "text": text, "source": "python", "path": str(number),
         "domain": domain, "license": "PSF-2.0", "quality": 0.5, "label": LABELS[number % 5]}
        for number, (text, domain) in enumerate(texts)
    ]
    parts = {"heldout/part-00000": pl.DataFrame(rows[::6]).drop("quality", "label")}
    train = pl.DataFrame([row for number, row in enumerate(rows) if number % 6]).filter(pl.col("label") != "medium-low")
    for shard in range(2):
        parts[f"train/part-{shard:05d}"] = train.gather_every(2, shard)
    for name, frame in parts.items():
        path = curated / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path)
    (curated / "manifest.json").write_text(json.dumps({"corpus_digest": "0" * 64}))


def write_params(directory: Path, **changes: object) -> None:
    """params.yaml of profile `tiny` in `directory`: the repository's, with small values and dotted `changes`."""
    yaml = YAML()
    values = yaml.load((ROOT / "params.yaml").read_text())
    small = {"profile": "tiny", "tokenizer.vocab_size": 1024, "tokenizer.training_megabytes": 0.3,
             "tokenize.validation_kilobytes_per_domain": 30, "runtime.workers": 1}
    for key, value in (small | changes).items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    for phase in values["tokenize"]["phases"]:
        phase["weights"] = {"code": 0.6, "docs": 0.4}
    with (directory / "params.yaml").open("w") as file:
        yaml.dump(values, file)


def contents(directory: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file()}
