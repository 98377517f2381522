"""Put locks, outputs and DVC's cache in order before plain `dvc repro`, as the flow does before it starts.

    python -m flows.mend
"""

from __future__ import annotations

import argparse
import sys

from flows import dvc_graph
from stages.frame.params import load_params


def main() -> None:
    argparse.ArgumentParser(prog="python -m flows.mend", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        dvc_graph.allow_no_git()
        if not dvc_graph.busy():                # else a stage runs, and DVC will wait for it
            print("".join(f"{line}\n" for line in dvc_graph.mend(load_params().runtime.verify_bytes)), end="")
    except dvc_graph.GraphError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
