"""Orchestration: DVC owns the graph, Prefect runs and shows it.

Prefect reads its settings when it is imported, and importing anything from this package comes first: they are set here.
Prefect keeps to itself in `.prefect/`: no user profile, no account, no telemetry. What the environment already says
wins, so PREFECT_API_URL=... reports to a server of your own. A proxy is never asked for this machine's own addresses.
"""

import os
import sys
from pathlib import Path
from types import TracebackType

from stages.frame.common import settle

if sys.argv[:1] == ["-m"]:      # `python -m` is looking for one of this package's commands
    settle()
PREFECT_HOME = Path(os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").absolute())))
for name, value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_PROFILES_PATH": str(PREFECT_HOME / "profiles.toml"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",     # the terminal is for flows.console; all else is in the UI
    "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",       # what Prefect says of itself while its server is away
}.items():
    os.environ.setdefault(name, value)
direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
if direct != "*" and "127.0.0.1" not in direct:
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [direct, "127.0.0.1", "localhost"]))
# Prefect's client refuses to start beside a SOCKS proxy, even one that it would not ask: the stages get it back.
SOCKS = {name: os.environ.pop(name) for name, value in list(os.environ.items())
         if name.lower().endswith("_proxy") and value.startswith("socks")}


def _say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C is no mistake to be traced, even while packages are being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nStopped. Run the same command again.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_stopped
