"""Try the whole fault matrix and write it as a table and as data.

    python -m tests.cluster.matrix --out benchmarks/results [--work DIR] [--only REGEX]

With --work the starting points and finished cases of an earlier call are kept: the command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.cluster import hosts, strike
from tests.cluster.cases import FAULTS, LEFT_OUT, MOMENTS, VICTIMS, Case, Result, every_combination, left_out, tried
from tests.cluster.launches import GRACE_SECONDS, HANG_SECONDS
from tests.cluster.materials import Materials, materials
from tests.cluster.nodes import Cluster, obstacle

Attempt = Callable[[Cluster, Materials, Path], Result]


def attempts() -> Iterator[tuple[str, Attempt]]:
    """Every case by name, with what tries it."""
    for case in tried():
        yield case.name, lambda cluster, made, directory, case=case: strike.try_case(case, cluster, made, directory)
    for name in hosts.CASES:
        yield (
            f"two hosts: {name}",
            lambda cluster, made, directory, name=name: hosts.try_case(name, cluster, made, directory),
        )


def run_matrix(work: Path, only: str, say: Callable[[str], None]) -> list[Result]:
    """Try what has not been survived before; results in the order of the matrix."""
    work.mkdir(parents=True, exist_ok=True)
    record = work / "results.jsonl"
    known: dict[str, Result] = {}
    if record.exists():
        for line in record.read_text().splitlines():
            result = Result(**json.loads(line))
            known[result.case] = result
    with tempfile.TemporaryDirectory() as keys, Cluster(Path(keys) / "cluster") as cluster:
        made = materials(work / "materials", cluster)
        for name, attempt in attempts():
            if not re.search(only, name) or (name in known and not known[name].problems):
                continue
            result = known[name] = attempt(cluster, made, work / "cases")
            with record.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            say(f"{'LOST     ' if result.problems else 'survived '} {result.seconds:6.1f} s  {name}")
            for problem in result.problems:
                say("    " + problem.replace("\n", "\n    "))
    return [known[name] for name, _ in attempts() if name in known]


def table(results: list[Result]) -> str:
    """One row a fault and victim, one column a moment; then the cases of two hosts, and what was left out."""
    outcome = {result.case: "survived" if not result.problems else "LOST" for result in results}

    def cell(fault: str, moment: str, victim: str) -> str:
        cases = [
            case for case in every_combination() if (case.fault, case.moment, case.victim) == (fault, moment, victim)
        ]
        if left_out(cases[0]):
            return f"- ({_reason_number(cases[0])})"
        found = {outcome.get(case.name, "not tried") for case in cases}
        return "LOST" if "LOST" in found else "not tried" if "not tried" in found else "survived"

    rows = [("fault", "victim", *MOMENTS)]
    rows += [
        (fault, victim, *(cell(fault, moment, victim) for moment in MOMENTS)) for fault in FAULTS for victim in VICTIMS
    ]
    lines = ["".join(f"{text:16}" for text in row).rstrip() for row in rows]
    lines += ["", "two hosts"]
    lines += [f"{outcome.get(f'two hosts: {name}', 'not tried'):10} {name}" for name in hosts.CASES]
    lines += ["", "left out because"] + [f"({number}) {rule.reason}" for number, rule in enumerate(LEFT_OUT, start=1)]
    survived = sum(not result.problems for result in results)
    lines += ["", f"tried {len(results)}, survived {survived}"]
    return "\n".join(lines) + "\n"


def report(results: list[Result], command: str, work: Path) -> dict[str, Any]:
    def portable(result: Result) -> dict[str, Any]:
        tree = json.dumps(asdict(result)).replace(str(work / "cases"), "OUT").replace(sys.prefix, ".venv")
        return dict(json.loads(tree))

    return {
        "command": command,
        "tried": len(results),
        "survived": sum(not result.problems for result in results),
        "not_tried_yet": [name for name, _ in attempts() if name not in {result.case for result in results}],
        "settings": {"hang_seconds": HANG_SECONDS, "grace_seconds": GRACE_SECONDS},
        "machine": {"system": platform.system(), "cpus": len(os.sched_getaffinity(0))},
        "cases": [portable(result) for result in results],
        "left_out": [{"case": case.name, "reason": left_out(case)} for case in every_combination() if left_out(case)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for fault_matrix.json and fault_matrix.txt")
    parser.add_argument("--work", type=Path, help="directory kept between calls; default: a temporary one")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    arguments = parser.parse_args()
    if reason := obstacle():
        sys.exit(f"fault matrix: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        results = run_matrix(work, arguments.only, lambda line: print(line, flush=True))
    text = table(results)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fault_matrix.txt").write_text(text)
    written = report(results, "python -m tests.cluster.matrix --out benchmarks/results", work)
    (arguments.out / "fault_matrix.json").write_text(json.dumps(written, indent=1) + "\n")
    sys.exit(any(result.problems for result in results))


def _reason_number(case: Case) -> int:
    return next(number for number, rule in enumerate(LEFT_OUT, start=1) if rule.applies(case))


if __name__ == "__main__":
    main()
