"""Rules that drop text no model should learn from: machine output, data, fragments and repetition.

A rule is a range for one feature (`annotate.features.measures`). Thresholds belong to a kind of text and to a way of
counting: `web` has the published ones, all made for pages of running English; `prose` and `code` keep those that API
documentation and source code can meet, wider where such text differs by design, and the source then says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.annotate.features.measures import FEATURES
from data_pipeline.config import DataError, RulesConfig

GOPHER = "Gopher, section A.1.1"                # arXiv 2112.11446
GOPHER_REPETITION = "Gopher, table A1"
C4 = "C4"                                       # arXiv 1910.10683, less its rule on the end of lines, as FineWeb does
FINEWEB = "FineWeb"                             # arXiv 2406.17557, section 3.6
NEMOTRON_CC = "Nemotron-CC"                     # arXiv 2412.02595: heuristic_filter_english_pipeline of NeMo Curator
CODEX = "Codex"                                 # arXiv 2107.03374, section 3.1
STARCODER = "StarCoder"                         # arXiv 2305.06161, section 3
CODE_FILTERS = "NeMo Curator, code filters"
OWN = "this project"
CONFIG = "configuration"


class Rule(NamedTuple):
    """A document breaks it where the feature is below `low` or above `high`."""

    feature: str
    low: float | None
    high: float | None
    source: str


class Broken(NamedTuple):
    """The first rule each document breaks, all of shape (documents,)."""

    rules: NDArray[np.int32]        # index into the rules; -1 for none
    above: NDArray[np.bool_]        # above `high`, else below `low`
    values: NDArray[np.float32]     # of the feature


def _runs(top: Sequence[float], duplicate: dict[int, float], source: str) -> list[Rule]:
    """Shares of characters in the commonest 2-, 3- and 4-gram, and in duplicate n-grams."""
    return [Rule(f"top_{n}gram", None, limit, source) for n, limit in zip((2, 3, 4), top, strict=True)] + [
        Rule(f"duplicate_{n}grams", None, limit, source) for n, limit in duplicate.items()
    ]


WEB = [
    Rule("characters", 200, None, "Gopher's 50 words"),
    Rule("words", 50, 100_000, GOPHER),
    Rule("mean_word_length", 3, 10, GOPHER),
    Rule("hashes", None, 0.1, GOPHER),
    Rule("ellipses", None, 0.1, GOPHER),
    Rule("bullet_lines", None, 0.9, GOPHER),
    Rule("ellipsis_lines", None, 0.3, GOPHER),
    Rule("alphabetic_words", 0.8, None, GOPHER),
    Rule("stop_words", 2, None, GOPHER),
    Rule("duplicate_paragraphs", None, 0.3, GOPHER_REPETITION),
    Rule("duplicate_paragraph_characters", None, 0.2, GOPHER_REPETITION),
    Rule("duplicate_lines", None, 0.3, GOPHER_REPETITION),
    Rule("duplicate_line_characters", None, 0.2, GOPHER_REPETITION),
    *_runs(
        (0.20, 0.18, 0.16), {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}, GOPHER_REPETITION),
    Rule("lorem_ipsum_lines", None, 0, C4),
    Rule("curly_bracket_lines", None, 0, C4),
    Rule("c4_sentences", 5, None, C4),
    Rule("terminal_lines", 0.12, None, FINEWEB),
    Rule("short_lines", None, 0.67, FINEWEB),
    Rule("duplicate_line_text", None, 0.01, FINEWEB),
    Rule("newlines", None, 0.3, FINEWEB),
    Rule("other_characters", None, 0.25, NEMOTRON_CC),
    Rule("digits", None, 0.15, NEMOTRON_CC),
    Rule("url_characters", None, 0.2, NEMOTRON_CC),
    Rule("white_space", None, 0.25, NEMOTRON_CC),
    Rule("brackets", None, 0.1, NEMOTRON_CC),
    Rule("boilerplate_paragraphs", None, 0.4, NEMOTRON_CC),
    Rule("end_marked_lines", 0.15, None, NEMOTRON_CC),
    Rule("longest_word", None, 1000, NEMOTRON_CC),
]
# Parameters documented again in each function of a module repeat by design, and API documentation has short entries.
PROSE = [
    Rule("words", 30, None, "Gopher's 50, wider for entries of reference works"),
    Rule("characters", 200, 400_000, OWN),
    Rule("encoded_run", None, 255, OWN),
    Rule("longest_line", None, 1000, STARCODER),
    Rule("mean_word_length", 2.5, 12, "Gopher's 3 to 10, wider for identifiers"),
    Rule("hashes", None, 0.1, GOPHER),
    Rule("ellipses", None, 0.1, GOPHER),
    Rule("alphabetic_words", 0.7, None, "Gopher's 0.8, wider for examples and tables"),
    Rule("stop_words", 2, None, GOPHER),
    Rule("bullet_lines", None, 0.9, GOPHER),
    Rule("ellipsis_lines", None, 0.3, GOPHER),
    Rule("duplicate_line_characters", None, 0.4, "Gopher's 0.2, wider for repeated parameters"),
    *_runs((0.20, 0.18, 0.16), {}, GOPHER_REPETITION),
    Rule("duplicate_10grams", None, 0.33, "Gopher's 0.1, wider for repeated parameters"),
]
# Lines such as `else:` and `return result`, and calls with the same arguments, repeat by design.
CODE = [
    Rule("lines", 5, 20_000, CODE_FILTERS),
    Rule("characters", 200, 400_000, OWN),
    Rule("encoded_run", None, 255, OWN),
    Rule("longest_line", None, 1000, STARCODER),
    Rule("generated", None, 0, CODEX),
    Rule("mean_line_length", None, 100, STARCODER),
    Rule("letters", 0.25, None, STARCODER),
    Rule("digits", None, 0.20, "Nemotron-CC's 0.15, wider for tables of tests"),
    Rule("comment_lines", None, 0.85, CODE_FILTERS),
    Rule("duplicate_line_characters", None, 0.6, "Gopher's 0.2, wider for code"),
    *_runs((0.25, 0.25, 0.25), {10: 0.40}, "Gopher's, wider for code"),
]
RULES: dict[str, list[Rule]] = {"code": CODE, "prose": PROSE, "reference": CODE, "web": WEB}


def rules_of(config: RulesConfig, field: str) -> list[Rule]:
    """The rules of the set `config` names, with its thresholds in place of the set's; new features come last.

    A threshold of (None, None) takes a rule away. `field` is where the configuration stands, for the message of the
    DataError that a feature which is not one raises.
    """
    if unknown := sorted(config.thresholds.keys() - FEATURES.keys()):
        raise DataError(
            f"{field}.thresholds names no feature: {', '.join(unknown)}\n"
            f"choose from: {', '.join(FEATURES)}"
        )
    rules = {rule.feature: rule for rule in RULES[config.set]}
    for feature, (low, high) in config.thresholds.items():
        rules[feature] = Rule(feature, low, high, CONFIG)
    return [rule for rule in rules.values() if rule.low is not None or rule.high is not None]


def first_broken(features: pa.StructArray | pa.ChunkedArray, rules: Sequence[Rule]) -> Broken:
    """For each row of the column `features`, the first of `rules` it breaks."""
    count = len(features)
    broken = Broken(np.full(count, -1, np.int32), np.zeros(count, bool), np.zeros(count, np.float32))
    columns = pa.table({"features": features}).flatten()
    for index, rule in enumerate(rules):
        values = columns[f"features.{rule.feature}"].to_numpy()
        # In 32 bits on both sides: a share of exactly 0.2 is not above 0.2.
        below = values < np.float32(-np.inf if rule.low is None else rule.low)
        above = values > np.float32(np.inf if rule.high is None else rule.high)
        new = (below | above) & (broken.rules < 0)
        broken.rules[new] = index
        broken.above[new] = above[new]
        broken.values[new] = values[new]
    return broken


def reason(rule: Rule, above: bool) -> str:
    """Why documents go that break the rule on this side: "digits > 0.15"."""
    return f"{rule.feature} > {rule.high:g}" if above else f"{rule.feature} < {rule.low:g}"
