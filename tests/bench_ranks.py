"""How a step scales over processes on this machine: the same cores as threads of one process, or as processes.

    python tests/bench_ranks.py                                       # full size, 2 and 3 groups, 1 and 2 processes
    python tests/bench_ranks.py --groups 3 --quick                    # at the size of --quick

Each row is okd_train.py itself, in turns (A B A B), timed from its log without the first step; cores are shared out as threads.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def step_seconds(groups, processes, cores, steps, rest):
    """Median seconds of a step, from log.jsonl."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, str(ROOT / "okd_train.py"), "--groups", str(groups), "--nproc", str(processes), "--steps", str(steps + 1),
                   "--log-every", "1", "--sample-every", "100000", "--save-every", "100000", "--out", f"{tmp}/run", *rest]
        env = dict(os.environ, OMP_NUM_THREADS=str(max(1, cores // processes)))
        subprocess.run(command, check=True, capture_output=True, env=env)
        at = [json.loads(line)["seconds"] for line in Path(tmp, "run", "log.jsonl").read_text().splitlines()]
        return statistics.median(b - a for a, b in zip(at, at[1:]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--groups", default="2,3")
    p.add_argument("--processes", default="1,2")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=3, help="timed steps per run")
    a, rest = p.parse_known_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "?")
    print(f"{cpu}, {cores} cores; {' '.join(rest) or 'sagan, batch 25, 64x64'}\n{'groups':>6} {'processes':>9} {'threads':>7} {'s/step':>8} {'against 1':>9}")
    for groups in map(int, a.groups.split(",")):
        seen = {w: [] for w in map(int, a.processes.split(","))}
        for _ in range(a.rounds):
            for w in seen:
                seen[w].append(step_seconds(groups, w, cores, a.steps, rest))
        first = next(iter(seen.values()))
        for w, rows in seen.items():
            print(f"{groups:6} {w:9} {max(1, cores // w):7} {statistics.median(rows):8.3f} {statistics.median(r / f for r, f in zip(rows, first)):9.3f}", flush=True)


if __name__ == "__main__":
    main()
