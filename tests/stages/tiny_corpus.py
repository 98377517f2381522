"""A working directory in which stages run as a user runs them."""

import sysconfig
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
MODULES = sorted(STDLIB.glob("[a-c]*.py"))


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
