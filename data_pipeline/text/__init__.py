"""Text as all steps see it: its words, their n-grams, its language.

Numba keeps compiled code until the file of the function changes, but not until a file of what it calls does. So that no
stale code runs, it is kept in a directory of its own for each state of the folders that hold compiled code, unless
NUMBA_CACHE_DIR is set. Every file with compiled code imports from this package, and so comes after this.
"""

import os
from pathlib import Path

import xxhash
from numba.core import config

_HERE = Path(__file__).parent
_state = xxhash.xxh3_64()
for _folder in ("text", "annotate", "tokenize"):
    for _file in sorted((_HERE.parent / _folder).rglob("*.py")):
        _state.update(_file.read_bytes())
os.environ.setdefault("NUMBA_CACHE_DIR", str(_HERE / "__pycache__" / f"numba-{_state.hexdigest()}"))
config.reload_config()
