"""Ask a program of this machine. Imports no torch."""

import shutil
import subprocess

_SECONDS = 30


def ask(*command: str) -> str | None:
    """What a program printed; None where it is not on PATH, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return done.stdout if done.returncode == 0 else None
