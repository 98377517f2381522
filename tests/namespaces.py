"""Processes apart from the machine: with mounts of their own, as another user."""

from __future__ import annotations

import subprocess

import pytest

MOUNTS = ("--map-root-user", "--mount")
ORDINARY = ("--map-user=54321", "--map-group=54321")        # has what its group has, no name and no rights of root


def unshare(*how: str) -> list[str]:
    """The words before a command that run it apart; skips the test where the kernel gives users no namespaces."""
    words = ["unshare", "--user", *how]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this kernel gives users no namespaces")
    return words


def on_full(directory: str, size: str) -> list[str]:
    """The same, with no byte of room in `directory`."""
    mount = f'mount -t tmpfs -o size={size} full {directory}; cat /dev/zero > {directory}/ballast; exec "$@"'
    return [*unshare(*MOUNTS), "sh", "-c", mount, "sh"]
