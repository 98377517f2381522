"""Curation steps.

Numba keeps compiled code until the file of the function changes, but not until a file of what it calls does. So that no
stale code runs, it is kept in a directory of its own for each state of this package, unless NUMBA_CACHE_DIR is set.
"""

import os
from pathlib import Path

import xxhash
from numba.core import config

_HERE = Path(__file__).parent
_state = xxhash.xxh3_64()
for _file in sorted(_HERE.rglob("*.py")):
    _state.update(_file.read_bytes())
os.environ.setdefault("NUMBA_CACHE_DIR", str(_HERE / "__pycache__" / f"numba-{_state.hexdigest()}"))
config.reload_config()
