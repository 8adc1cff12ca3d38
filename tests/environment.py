"""The environment that tests and the programs they start see, instead of the user's."""

import atexit
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

OWNED = ("TADISTILL_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SLURM_", "SBATCH_", "OPENAI_")
ALSO_OWNED = {
    *("CC_CLUSTER", "LOADEDMODULES", "PROJECT", "SCRATCH"),  # a cluster's login node
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),  # a launcher's
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "PYTHONWARNINGS"),  # how a terminal looks
    "PYTHONDONTWRITEBYTECODE",  # each program that a test starts would compile the package again
}

MEMORY, ROOM = "/dev/shm", 6 * 10**9


def own_environment() -> dict[str, str]:
    """Replace what changes behaviour in the user's environment, for every test and for the programs it starts; returns what was there.

    Import this before torch and the Hugging Face libraries: they read their variables when they are imported. The workers of
    pytest-xdist inherit the result.
    """
    if "TESTS_USER_ENVIRONMENT" not in os.environ:
        given = {name: value for name, value in os.environ.items() if name.startswith(OWNED) or name in ALSO_OWNED}
        for name in given:
            del os.environ[name]
        if "TMPDIR" not in os.environ and (folder := in_memory()):
            os.environ["TMPDIR"] = tempfile.tempdir = folder
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a background job (`make test &` in a script)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        home = tempfile.mkdtemp(prefix="tadistill-tests-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ |= {
            "TESTS_USER_ENVIRONMENT": json.dumps(given),
            "HF_HOME": f"{home}/huggingface",
            "HF_HUB_OFFLINE": "1",
            "TADISTILL_CACHE": f"{home}/tadistill",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
    return json.loads(os.environ["TESTS_USER_ENVIRONMENT"])


def in_memory() -> str | None:
    """Return a folder in memory for the temporary files of tests, if this machine has one with enough room, in which programs may run.

    Tests sync thousands of files and delete thousands of folders. On a disk, they wait for these as long as a twentieth of their time.
    """
    try:
        found = os.statvfs(MEMORY)
        memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    except (AttributeError, OSError, StopIteration):  # not on this system
        return None
    room = min(found.f_bavail * found.f_frsize, 1024 * int(memory.split()[1]) // 2)
    return MEMORY if room >= ROOM and not found.f_flag & os.ST_NOEXEC else None


USER = own_environment()
"""The user's variables that no test sees, for those that read real data where they are."""
