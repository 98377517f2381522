"""Orchestration: DVC owns the graph, Prefect runs and shows it.

Prefect reads its settings when it is imported, and importing anything from this package comes first: they are set here.
Prefect keeps to itself in `.prefect/`: no user profile, no account, no telemetry. What the environment already says
wins, so PREFECT_API_URL=... reports to a server of your own.
"""

import os
from pathlib import Path

PREFECT_HOME = Path(os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").absolute())))
for name, value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_PROFILES_PATH": str(PREFECT_HOME / "profiles.toml"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",     # the terminal is for flows.console; all else is in the UI
}.items():
    os.environ.setdefault(name, value)
