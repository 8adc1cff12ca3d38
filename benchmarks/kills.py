"""Kill a small study at random moments of every kind of stage: its rows must equal those of an undisturbed run.

    taskset -c 1 python benchmarks/kills.py       # 40 moments for each target; on one core, so that each process has one thread
    python benchmarks/kills.py --moments 0        # only the disk that fills and the two runs at once

The targets are the command (main), the process of a stage (worker), and a rank of a stage that runs in two processes. A chain starts with
an empty folder and repeats the same command after each SIGKILL until the study is whole. In the first chain the clock jumps by up to a day
again and again (libfaketime; files keep the machine's own clock). The output has a line for each kill, every problem, and a table.
Linux only; the disk that fills is a tmpfs, which only root can mount.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import page

from tadistill.plan.kinds import KINDS, TRAINING

RECIPE = Path(__file__).with_suffix(".yaml")
COMMANDS = (("run",), ("advise", "--prompts", "12"))
TARGETS = {"main": tuple(KINDS), "worker": tuple(KINDS), "rank": tuple(k for k in KINDS if k in TRAINING)}
MOST = 4
"""Most kills of one stage in a chain."""
DAY = 86400
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


class Study:
    """A runs folder, the commands on it, and the problems found."""

    def __init__(self, folder: Path, draw: random.Random, name: str, *, clock: bool = False) -> None:
        self.folder, self.draw, self.name = folder, draw, name
        self.problems: list[str] = []
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.clock = folder / "clock" if clock else None
        if self.clock:
            self.jump()
            self.environment |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self.clock), "FAKETIME_CACHE_DURATION": "1",
                                 "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}  # fmt: skip

    def jump(self) -> None:
        """Move the clock of the processes that run by up to a day, forwards or back."""
        if self.clock:
            new = self.clock.with_suffix(".new")
            new.write_text(f"{self.draw.uniform(-DAY, DAY):+.0f}\n")
            new.replace(self.clock)

    def start(self, verb: str, *options: str) -> subprocess.Popen:
        """Start a command in a process group of its own; its output goes to a file."""
        command = [sys.executable, "-m", "tadistill", verb, str(RECIPE), *options, "--runs", str(self.folder / "runs")]
        with (self.folder / "output").open("w") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=self.environment)

    def end(self, process: subprocess.Popen, *codes: int) -> int:
        """Wait for a command; note another exit code than these, a traceback, or a process that it left behind."""
        code, text = process.wait(timeout=1200), (self.folder / "output").read_text()
        if code not in codes or "Traceback" in text:
            self.problems.append(f"{self.name}: exit code {code}\n{text}")
        for _ in range(100):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return code
            time.sleep(0.1)
        self.problems.append(f"{self.name}: processes of a command outlive it by ten seconds")
        os.killpg(process.pid, signal.SIGKILL)
        return code

    def finish(self) -> None:
        """Run both commands undisturbed."""
        for command in COMMANDS:
            self.end(self.start(*command), 0)

    def result(self) -> dict[str, object]:
        """Return what must be equal: rows, measures, digests of models, and the names of all files."""
        runs = self.folder / "runs"
        study, manifests = runs / "kills", [json.loads(p.read_text()) for p in sorted(runs.glob("store/*/*/manifest.json"))]
        return {
            "rows": json.loads((study / "results.json").read_text())["rows"],
            "csv": (study / "results.csv").read_text(),
            "measures": [json.loads((study / "advice.json").read_text())[name] for name in ("models", "pairs", "edges")],
            "digests": {m["key"]: {name: d for name, d in m["files"].items() if name != "metrics.jsonl"} for m in manifests},
            "files": sorted(str(p.relative_to(runs)) for p in runs.rglob("*") if p.is_file() and p.parent.name != "local"),
        }

    def compare(self, whole: dict[str, object]) -> None:
        """Note which parts of the result differ from those of the undisturbed run."""
        if not self.problems:
            mine = self.result()
            different = [name for name in whole if mine[name] != whole[name]]
            self.problems += [f"{self.name}: other {name}: {mine[name]!r:.3000}" for name in different]
        print(f"{self.name}: {'equal' if not self.problems else 'PROBLEM'}", *self.problems, sep="\n", flush=True)


def children(parent: int) -> list[int]:
    """Return the ids of the child processes, oldest first."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return []


def stage_of(pid: int) -> str:
    """Return the key of the stage whose lock a process holds; empty if none."""
    with contextlib.suppress(OSError):
        for fd in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if (path := Path(os.readlink(fd.path))).suffix == ".lock":
                    return path.stem
    return ""


class Chain:
    """Kills in one study, each at a random moment of a stage whose kind still lacks kills."""

    def __init__(self, study: Study, wanted: collections.Counter, done: collections.Counter, lengths: dict[str, tuple[str, float]]):
        self.study, self.wanted, self.done, self.lengths = study, wanted, done, lengths
        self.tries: collections.Counter[str] = collections.Counter()

    def go(self, whole: dict[str, object]) -> None:
        """Repeat each command until it succeeds, and compare."""
        for command in COMMANDS:
            code = 1
            while code and not self.study.problems:
                process, kills = self.study.start(*command), sum(self.done.values())
                expected = self._watch(process)
                code = self.study.end(process, *expected)
                if code and kills == sum(self.done.values()):
                    self.study.problems.append(f"{self.study.name}: a command that nobody killed ended with exit code {code}")
        self.study.compare(whole)

    def _watch(self, process: subprocess.Popen) -> tuple[int, ...]:
        """Kill until the command has ended or been killed; return the exit codes that this explains."""
        seen, codes = "", (0,)
        while process.poll() is None:
            time.sleep(0.005)
            workers = [worker for child in children(process.pid) for worker in children(child)]
            owner, key = next(((worker, key) for worker in workers if (key := stage_of(worker))), (0, ""))
            if not key or key == seen or key not in self.lengths:
                continue
            seen, (kind, length) = key, self.lengths[key]
            options = [who for who in TARGETS if self.wanted[who, kind] > 0 and (who != "rank" or len(workers) > 1)]
            delay = self.study.draw.uniform(0, length)
            if not options or self.tries[key] == MOST:
                continue
            self.tries[key] += 1
            time.sleep(delay / 2)
            self.study.jump()
            time.sleep(delay / 2)
            who = self.study.draw.choice(options)
            if stage_of(owner) != key or (who == "rank" and len(workers) < 2):
                continue
            victim = {"main": process.pid, "worker": owner, "rank": self.study.draw.choice(workers)}[who]
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                self.wanted[who, kind] -= 1
                self.done[who, kind] += 1
                print(f"{self.study.name}: {who} killed {delay:.2f} s into {kind} ({key})", flush=True)
                if who == "main":
                    return (-signal.SIGKILL,)
                codes = (0, 1)  # 0: the stage had just ended
        return codes


def disk_full(study: Study, whole: dict[str, object]) -> None:
    """Fill a small disk, enlarge it twice, and compare."""
    runs = study.folder / "runs"
    runs.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "kills", str(runs)], capture_output=True, check=False).returncode:
        print(f"{study.name}: left out, because a tmpfs cannot be mounted here")
        return
    try:
        for size in ("200k", "600k", "1m"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(runs)], check=True)
            study.end(study.start("run"), 1)
            if "free some space" not in (text := " ".join((study.folder / "output").read_text().split())):
                study.problems.append(f"{study.name}: no word about the disk: {text}")
        subprocess.run(["mount", "-o", "remount,size=1g", str(runs)], check=True)
        study.finish()
        study.compare(whole)
    finally:
        subprocess.run(["umount", str(runs)], check=True)


def two_at_once(study: Study, whole: dict[str, object]) -> None:
    """Run the same study twice at once, kill one, and compare."""
    pair = [study.start("run"), study.start("run")]
    time.sleep(study.draw.uniform(5, 30))
    os.kill(pair[0].pid, signal.SIGKILL)
    study.end(pair[0], -signal.SIGKILL)
    study.end(pair[1], 0)
    study.finish()
    study.compare(whole)


def table(done: collections.Counter) -> str:
    """Return the kills of each target and kind as a Markdown table."""
    rows = [
        (who, *(done[who, kind] if kind in kinds else "" for kind in KINDS), sum(n for (w, _), n in done.items() if w == who))
        for who, kinds in TARGETS.items()
    ]
    return page.table(("target", *KINDS, "all"), rows)


def main() -> None:
    """Parse the arguments, run the study undisturbed, disturb it, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=40, help="kills of each target")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    draw, start, studies = random.Random(given.seed), time.monotonic(), []
    wanted = collections.Counter((who, kinds[i % len(kinds)]) for who, kinds in TARGETS.items() for i in range(given.moments))
    done: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="kills-") as root:

        def study(name: str, **options: bool) -> Study:
            folder = Path(root) / name.replace(" ", "-")
            folder.mkdir()
            studies.append(Study(folder, draw, name, **options))
            return studies[-1]

        undisturbed = study("undisturbed")
        undisturbed.finish()
        assert not undisturbed.problems, undisturbed.problems
        whole, lengths = undisturbed.result(), {}
        for path in undisturbed.folder.glob("runs/store/*/*/manifest.json"):
            manifest = json.loads(path.read_text())
            lengths[manifest["key"]] = manifest["kind"], manifest["seconds"]
        if FAKETIME and given.moments:
            Chain(study("jumping clock", clock=True), wanted, done, lengths).go(whole)
        number = 0
        while +wanted and not any(s.problems for s in studies):
            number += 1
            Chain(study(f"chain {number}"), wanted, done, lengths).go(whole)
        disk_full(study("disk full"), whole)
        two_at_once(study("two at once"), whole)
    problems = sum(len(s.problems) for s in studies)
    jumped = "one of the chains with a jumping clock" if FAKETIME else "no jumping clock (install libfaketime)"
    print(f"\n{table(done)}\n\n{number + bool(FAKETIME)} chains, {jumped}; {time.monotonic() - start:.0f} s; {problems} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
