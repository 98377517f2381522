"""What `make reproduce` prints: one line when a stage starts and one when it ends, and what is running in between."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time

SECONDS_BETWEEN_LINES = 20.0      # of one stage's progress, where there is no terminal to redraw


class Console:
    """Lines for a person. On a terminal the last line shows the running stages; elsewhere they print now and then."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.lock = threading.Lock()
        self.live = sys.stdout.isatty()
        self.running: dict[str, str] = {}
        self.printed: dict[str, float] = {}

    def line(self, text: str) -> None:
        with self.lock:
            self._print(text)

    def start(self, stage: str) -> None:
        with self.lock:
            self.running[stage] = ""
            self.printed[stage] = time.monotonic()
            self._event(stage, "started")

    def say(self, stage: str, text: str) -> None:
        with self.lock:
            self._event(stage, text)

    def progress(self, stage: str, text: str) -> None:
        with self.lock:
            if stage not in self.running:
                return
            self.running[stage] = text
            if self.live:
                self._redraw()
            elif time.monotonic() - self.printed[stage] >= SECONDS_BETWEEN_LINES:
                self.printed[stage] = time.monotonic()
                self._event(stage, text)

    def end(self, stage: str, text: str) -> None:
        with self.lock:
            self.running.pop(stage, None)
            self._event(stage, text)

    def _event(self, stage: str, text: str) -> None:
        self._print(f"{clock(time.monotonic() - self.started)}  {stage:<28}  {text}")

    def _print(self, text: str) -> None:
        try:
            print(("\r\033[K" if self.live else "") + text, flush=True)
        except BrokenPipeError:             # `| head`: nobody reads on, and the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self.live:
            self._redraw()

    def _redraw(self) -> None:
        shown = "   ".join(f"{stage} {text}".strip() for stage, text in self.running.items())
        print("\r\033[K" + shown[: shutil.get_terminal_size().columns - 1], end="", flush=True)


def clock(seconds: float) -> str:
    """`00:03:41`."""
    return f"{int(seconds) // 3600:02}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as aligned columns under a header."""
    header = {key: key for key in rows[0]}
    widths = {key: max(len(row[key]) for row in (header, *rows)) for key in header}
    lines = ["  ".join(row[key].ljust(widths[key]) for key in header).rstrip() for row in (header, *rows)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
