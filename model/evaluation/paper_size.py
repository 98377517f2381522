"""How much of the paper's tasks a model reads and writes (`paper_tasks`), for planning: nothing is loaded for it.

Counted on 57 items of each task, drawn evenly over its parts, with a tokenizer of bytes and a row a pass, as on a GPU.
`tests/model/evaluation/test_paper_tasks.py` counts some again.
"""

from __future__ import annotations

from typing import NamedTuple

from model.evaluation.schema import Generation


class PaperSize(NamedTuple):
    """One task's.

    Attributes:
        items: there are.
        passes: rows an item: options that differ in more than the last token, and the right answer where it is scored
            apart.
        bytes: UTF-8 of a row, mean.
        written: tokens an answer may have where the model writes it; 0 where it does not, or what grades it is not in
            requirements.lock.
        program: whether it is a program.
    """

    items: int
    passes: int
    bytes: float
    written: int = 0
    program: bool = False


PAPER_SIZES = {
    "mmlu": PaperSize(14_042, 2, 2593), "gsm8k_cot": PaperSize(1319, 1, 2798, written=256),
    "minerva_math": PaperSize(5000, 1, 2579), "leaderboard_math_hard": PaperSize(1324, 1, 2865),
    "minerva_math500": PaperSize(500, 1, 2577), "humaneval": PaperSize(164, 1, 678, written=1024, program=True),
    "mbpp": PaperSize(500, 1, 1043, written=256, program=True), "arc_challenge": PaperSize(1172, 2, 5963),
    "hellaswag": PaperSize(10_042, 4, 4052), "winogrande": PaperSize(1267, 2, 644),
    "commonsense_qa": PaperSize(1221, 2, 1011), "piqa": PaperSize(1838, 2, 171), "openbookqa": PaperSize(500, 4, 71),
    "social_iqa": PaperSize(1954, 3, 132),
}


def read(most: int, context: int, bytes_a_token: float) -> float:
    """Tokens of all rows of at most `most` items a task, each cut to `context` tokens."""
    return sum(min(most, size.items) * size.passes * min(context, size.bytes / bytes_a_token)
               for size in PAPER_SIZES.values())


def written(most: int, generation: Generation) -> float:
    """Tokens of all answers at most, where the model writes them."""
    if generation == "none":
        return 0
    return sum(min(most, size.items) * size.written for size in PAPER_SIZES.values()
               if generation == "code" or not size.program)
