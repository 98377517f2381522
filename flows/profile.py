"""Write params.yaml for a profile: profiles/cpu.yaml, overlaid by profiles/NAME.yaml.

    python -m flows.profile              list the profiles
    python -m flows.profile smoke        write params.yaml for one

params.yaml is always the resolved file: what stands there is what runs. Values tuned there by hand go to
params.yaml.orig when a profile is written; put what should stay into profiles/. In an overlay a mapping is merged,
anything else replaces what stood there, and null removes the key (JSON merge patch, RFC 7396).
"""

from __future__ import annotations

import argparse
import difflib
import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from durable import replacing
from stages.frame.params import ParamsError, load_params, read_yaml

PROFILES = Path("profiles")
BASE = "cpu"


def names() -> list[str]:
    """The profiles there are, the base first. Raises ParamsError where there is no folder of them."""
    if not PROFILES.is_dir():
        raise ParamsError(f"{PROFILES.absolute()}: not found.\nRun from the repository's root.")
    return sorted((file.stem for file in PROFILES.glob("*.yaml")), key=lambda name: (name != BASE, name))


def describe(name: str) -> str:
    """The comment an overlay opens with."""
    if name == BASE:
        return "The default, and what the others overlay."
    lines = []
    for line in (PROFILES / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def resolve(name: str) -> str:
    """Text of params.yaml under the profile `name`. Raises ParamsError for an unknown one and for a broken overlay."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(names())}."
        raise ParamsError(f"Profile {name}: no profiles/{name}.yaml.\n{hint}")
    if name == BASE:
        return (PROFILES / f"{BASE}.yaml").read_text()
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 4096                       # keep one-line mappings on one line
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), _null)
    base, file = PROFILES / f"{BASE}.yaml", PROFILES / f"{name}.yaml"
    values = read_yaml(base, yaml)
    if unknown := merge(values, read_yaml(file, yaml, CommentedMap())):
        raise ParamsError(f"{file}: removes `{unknown[0]}`, which {base} does not have.\n"
                          "Correct the name, or leave it out.")
    values["profile"] = name
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _null(representer: RoundTripRepresenter, value: None) -> ScalarNode:
    """`null` stays a word; ruamel would leave its place empty."""
    node: ScalarNode = representer.represent_scalar("tag:yaml.org,2002:null", "null")
    return node


def merge(values: dict[str, Any], overlay: dict[str, Any]) -> list[str]:
    """Lay `overlay` over `values`, in place; comments of `values` stay. Names of what it removes and is not there."""
    unknown = []
    for key, value in overlay.items():
        if value is None:
            unknown += [] if key in values else [key]
            values.pop(key, None)
        elif isinstance(value, CommentedMap) and isinstance(values.get(key), CommentedMap):
            unknown += [f"{key}.{inner}" for inner in merge(values[key], value)]
        else:
            values[key] = value
    return unknown


def apply(name: str, target: Path = Path("params.yaml")) -> None:
    """Write `target` for the profile `name`, whole or not at all; one that is no profile's is kept, and named. Raises
    ParamsError if it would not be valid."""
    text = resolve(name)
    before = target.read_text() if target.exists() else None
    if before == text:
        return
    with replacing(target) as partial:
        partial.write_text(text)
        try:
            load_params(partial)
        except ParamsError as error:
            raise ParamsError(str(error).replace(str(partial), f"profiles/{name}.yaml")) from None
        if before is not None and not _is_a_profile(before):
            kept = target.with_name(f"{target.name}.orig")
            kept.write_text(before)
            print(f"{target} was no profile as it stands in profiles/: kept as {kept}.", flush=True)


def _is_a_profile(text: str) -> bool:
    """Whether it is what the profile that it names resolves to."""
    name = re.search(r"^profile: *(\S+)", text, re.M)
    try:
        return name is not None and resolve(name[1]) == text
    except ParamsError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="the profile; without it, list them")
    options = parser.parse_args()
    if options.name:
        apply(options.name)
        print(f"params.yaml: profile {options.name}")
    else:
        for name in names():
            print(f"{name:<16} {describe(name)}")


if __name__ == "__main__":
    main()
