"""Which code made something."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(*arguments: str) -> str:
    """What git says of this code, or "" where it is in no repository or git is not installed."""
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        return ""
