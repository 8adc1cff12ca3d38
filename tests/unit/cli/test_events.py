"""With `--log json`, stdout has events alone."""

import json
import subprocess
import sys

import pytest

WORK = """
import os
from tadistill.cli.shared import terminal_for
from tadistill.terminal import output
with output():
    terminal = terminal_for(False, False, "json")
    print("from the user's code")
    for number in range(99):
        os.system("echo from another process")
        terminal.event("note", text="an event")
"""


@pytest.mark.slow
def test_stdout_has_events_alone_and_its_reader_may_leave():
    program = subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(program.stdout.readline())["text"] == "an event"  # type: ignore[union-attr]
    program.stdout.close()  # type: ignore[union-attr]
    said = program.stderr.read().splitlines()  # type: ignore[union-attr]
    assert program.wait() == 141
    assert {*said} <= {"from another process", "from the user's code"}
    assert "from another process" in said
