"""Start a real Slurm for the tests of this folder, or skip them with a reason."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm.sh")


@pytest.fixture(scope="session")
def slurm():
    """A running Slurm; its clients find it through SLURM_CONF."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"there is no Slurm here ({', '.join(missing)} missing); as root on Debian: tests/slurm/slurm.sh install")
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # not under pytest's folder: munge wants short paths and a private chain of owners
    directory.chmod(0o755)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_TEST_PORT"] = str(20000 + os.getpid() % 20000)  # two runs on one machine do not meet
    try:
        # to files, not pipes: the daemons keep their output open
        with (directory / "up.log").open("w") as log:
            up = subprocess.run([SCRIPT, "up", directory], stdout=log, stderr=log, timeout=120, check=False)
        assert up.returncode == 0, (directory / "up.log").read_text()
        os.environ["SLURM_CONF"] = str(directory / "etc" / "slurm.conf")
        yield directory
    finally:
        subprocess.run([SCRIPT, "down", directory], timeout=120, check=False)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(directory, ignore_errors=True)
