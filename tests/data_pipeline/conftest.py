from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from data_pipeline.annotate.quality import training_text

installed_reference = functools.cache(training_text.installed_reference)


@pytest.fixture(scope="module")
def little_reference() -> Iterator[int]:
    """Where a corpus has no reference text, the scorers read the standard library's: here little of it, and once.
    Bytes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_text, "INSTALLED_BYTES", 200_000)
        patch.setattr(training_text, "installed_reference", installed_reference)
        yield training_text.INSTALLED_BYTES
