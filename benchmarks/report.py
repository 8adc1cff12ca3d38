"""Measure how long a report takes: of a study like the quickstart, and of 60 arms with 5 seeds and 6 sets.

    taskset -c 1 python benchmarks/report.py

The studies are synthetic: the files of finished stages with random scores. Times are CPU seconds of a new process, with the imports, as
`tadistill report` needs them; building the study is not timed. `--profile` prints where the time of the large study goes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.unit.report.builder import ArmSpec, StudySpec, build_study

REPORT = """
import time, sys
from pathlib import Path
from tadistill.report import read_results, summary_table, write_report
from tadistill.store import Store
imported = time.process_time()
results = read_results(Path(sys.argv[1]), Store(Path(sys.argv[2])))
read = time.process_time()
page = write_report(results)
summary_table(results)
done = time.process_time()
print(imported, read - imported, done - read, page.stat().st_size, (page.parent / "results.json").stat().st_size)
"""
LIMITS = {"quickstart": 3.0, "large": 20.0}
"""CPU seconds that a report may take."""


def specs(quick: bool) -> dict[str, StudySpec]:
    """Return the studies: name -> what the builder writes."""
    small = [
        ArmSpec("teacher", ("xl",), gain=6.0, flops=0.0),
        ArmSpec("sft", ("s",), gain=-3.0, flops=4e16),
        ArmSpec("direct", ("xl", "s")),
    ]
    small += [ArmSpec(f"kd{i}", ("xl", "s"), gain=-0.2 * i, method=f"kind {i}") for i in range(4)]
    chains = [ArmSpec(f"chain{i}", ("xl", "l", "s"), gain=0.1 * i, flops=7e17) for i in range(1 if quick else 29)]
    twins = [ArmSpec(f"direct-as-{c.name}", ("xl", "s"), compute=f"as {c.name}", flops=7e17) for c in chains]
    sets = {f"set{i}": 100 for i in range(5)}
    both = {
        "quickstart": StudySpec([*small, *chains[:1], *twins[:1]], seeds=(1, 2, 3), sets=sets, decoding_seeds=2, steps=160, numbered=True)
    }
    large = [*small[1:3], *chains, *twins]
    return both | {
        "large": StudySpec(
            large, seeds=(1, 2, 3, 4, 5), sets=sets | {"set5": 100}, decoding_seeds=5, steps=200, answer="yes", numbered=True
        )
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--profile", action="store_true", help="print where the time of the large study goes")
    options.add_argument("--quick", action="store_true", help="a small study in place of the large one: says that it runs")
    given = options.parse_args()
    slow = []
    for name, spec in specs(given.quick).items():
        with tempfile.TemporaryDirectory() as folder:
            study = build_study(Path(folder), spec)
            stages = len(json.loads((study.study_dir / "plan.json").read_text())["stages"])
            profiled = ["-m", "cProfile", "-s", "tottime"] if given.profile and name == "large" else []
            program = Path(folder) / "program.py"
            program.write_text(REPORT)
            command = [sys.executable, *profiled, str(program), str(study.study_dir), str(study.store_dir)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            imports, read, written, page, data = map(float, said.splitlines()[0].split())
            total, size = (
                imports + read + written,
                f"{len(spec.arms)} arms, {len(spec.seeds)} seeds, {len(spec.sets)} sets, {stages} stages",
            )
            print(f"{name}: {size}: {total:.2f} s (imports {imports:.2f}, reading {read:.2f}, writing {written:.2f})", end="")
            print(f"; page {page / 1e6:.2f} MB, results.json {data / 1e6:.1f} MB")
            if profiled:
                print("\n".join(said.splitlines()[1:45]))
            slow += [name] if total > LIMITS[name] else []
    if slow:
        sys.exit(f"too slow: {', '.join(slow)}")


if __name__ == "__main__":
    main()
