"""How a step scales over processes on this machine: the same cores as threads of one process, or as processes.

    python tests/bench_ranks.py --groups 2                  # full size, 1 and 2 processes
    python tests/bench_ranks.py --groups 3 --quick --timed 25

Each run is okd_train.py itself, whose flags are all taken, in turns (A B A B), timed from its log without the first
step; cores are shared out as threads.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import okd_train


def step_seconds(argv, steps, processes):
    """Median seconds of a step, from log.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        last = ["--nproc", processes, "--steps", steps + 1, "--log-every", 1, "--sample-every", 10 ** 6,
                "--save-every", 10 ** 6, "--out", out]
        env = dict(os.environ, OMP_NUM_THREADS=str(threads(processes)))
        command = [sys.executable, okd_train.__file__, *argv, *map(str, last)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        at = [line["seconds"] for line in okd_train.read_lines(out / "log.jsonl")]
    return statistics.median(b - a for a, b in zip(at, at[1:]))


def threads(processes):
    return max(1, okd_train.cores() // processes)


def run(argv):
    p = okd_train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--processes", default="1,2")
    p.add_argument("--rounds", type=bench.natural, default=2)
    p.add_argument("--timed", type=bench.natural, default=3, help="timed steps of a run")
    own, argv = p.parse_known_args(argv)
    s, script, _ = okd_train.parse(argv)
    print(f"{bench.cpu_name()}, {okd_train.cores()} cores; {script.name}, groups {s.groups}; {' '.join(argv)}")
    print(f"{'processes':>9} {'threads':>7} {'s/step':>8} {'against the first':>17}")
    seen = {processes: [] for processes in map(int, own.processes.split(","))}
    for _ in range(own.rounds):
        for processes, seconds in seen.items():
            seconds.append(step_seconds(argv, own.timed, processes))
    first = next(iter(seen.values()))
    for processes, seconds in seen.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, first))
        print(f"{processes:9} {threads(processes):7} {statistics.median(seconds):8.3f} {ratio:17.3f}", flush=True)


def main(argv=None):
    okd_train.guarded("bench_ranks.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
