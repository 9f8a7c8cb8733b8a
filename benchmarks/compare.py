"""CPU time of this code over that of another commit, task by task: python -m benchmarks.compare OLD

OLD is a clone of the other commit, from the first release (a8309e4) on. Each code works in a process of its own; the
two take turns, in changing order, so that what else the machine does falls on both. A ratio is the median over the
rounds of this code's time by the other's in the same round; above 1 is slower. `least` is the ratio of the shortest
times, which a busy machine changes least. Both codes must find the same numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

from benchmarks import compare_tasks
from utils.cli import Parser, script
from utils.errors import InputError, Stopped
from utils.files import atomic

ROOT = Path(__file__).parent.parent


class Worker:
    """A process that times tasks in a tree of the project, when asked."""

    def __init__(self, tree: Path, size: int, seconds: float):
        paths = os.pathsep.join(map(str, (tree, tree / "torch-radon_fix")))
        self.tree = tree
        self.process = subprocess.Popen(
            [sys.executable, compare_tasks.__file__, str(size), str(seconds)], cwd=tree, text=True,
            env=os.environ | {"PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def time(self, task: str) -> tuple[float, float]:
        """(seconds of one call, mean of its result)."""
        print(task, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if len(answer) != 2:
            raise Stopped(f"{task} failed in {self.tree}; what Python said is above")
        return float(answer[0]), float(answer[1])


def compare(workers: list[Worker], task: str, rounds: int) -> dict:
    """Median seconds of the old and the new code, and their ratio: median, quartiles and that of the least."""
    found = [worker.time(task)[1] for worker in workers]  # the first call compiles and builds tables
    if abs(found[0] - found[1]) > 1e-4 * abs(found[0]):
        raise Stopped(f"{task} gives {found[1]:g} here and {found[0]:g} in {workers[0].tree}: the two times could not "
                      "be compared")
    times = []
    for i in range(rounds):
        turn = [0, 1] if i % 2 else [1, 0]
        took = {side: workers[side].time(task)[0] for side in turn}
        times.append((took[0], took[1]))
    ratios = [new / old for old, new in times]
    low, ratio, high = quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    old, new = zip(*times, strict=True)
    return {"task": task, "old_ms": 1e3 * median(old), "new_ms": 1e3 * median(new), "ratio": ratio,
            "quartiles": [low, high], "least": min(new) / min(old)}


@script
def main(argv=None) -> None:
    parser = Parser("python -m benchmarks.compare", __doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="folder with a clone of the other commit")
    parser.add_argument("--rounds", type=int, default=25, help="of both codes, for each task")
    parser.add_argument("--seconds", type=float, default=0.1, help="that a task is repeated in a round, at least")
    parser.add_argument("--size", type=int, default=256, help="pixels of an image's side")
    parser.add_argument("--tasks", nargs="+", choices=compare_tasks.TASKS, metavar="TASK",
                        default=list(compare_tasks.TASKS), help=f"some of {', '.join(compare_tasks.TASKS)} (default: "
                        "all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too (default: nowhere)")
    args = parser.parse_args(argv)
    parser.at_least(args, {"rounds": 1, "size": 32})
    if not (args.old / "torch-radon_fix").is_dir():
        raise InputError(f"{args.old} holds no torch-radon_fix; expected a clone of this project at another commit")
    workers, rows = [Worker(tree.resolve(), args.size, args.seconds) for tree in (args.old, ROOT)], []
    try:
        print(f"{'task':<22}{'old ms':>10}{'new ms':>10}{'new/old':>9}{'least':>7}  quartiles")
        for task in args.tasks:
            rows.append(row := compare(workers, task, args.rounds))
            print(f"{task:<22}{row['old_ms']:>10.3f}{row['new_ms']:>10.3f}{row['ratio']:>9.3f}"
                  f"{row['least']:>7.3f}  {row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f}", flush=True)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    if args.json:
        with atomic(args.json) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
