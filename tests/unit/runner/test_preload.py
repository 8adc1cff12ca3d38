"""The server that forks the stages."""

import subprocess
import sys

import pytest

ENDS = """
import os
class Kept:
    def __del__(self, say=os.write):
        say(1, b"freed\\n")
kept = Kept()
kept.itself = kept
import tadistill.runner.preload
"""


@pytest.mark.slow
def test_what_the_server_has_frozen_is_freed_at_its_end():
    # triton of torch 2.15 writes a warning of 25 lines about what is not
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("freed\n", "")
