"""Summarises what cupti_trace.cpp wrote: trace_report.py TRACE.csv PHASES.txt [--kernels].

PHASES.txt is what gpu_bench profile printed. For every phase and GPU: the time from the mark to the
last end, the busy time of every kernel, and the CUDA calls that wait or allocate.
"""

import collections
import csv
import re
import sys

MARK = 3_000_001
WAITS = re.compile(
    r"Synchronize|cudaMalloc(_|$)|cudaFree(_|$)|cudaMallocHost|cudaHostAlloc|cuMemAlloc"
)


def short(name):
    name = re.sub(r"^void ", "", name)
    match = re.search(r"(\d+)([A-Za-z_][A-Za-z_0-9]*kernel)", name)
    if name.startswith("_Z") and match:
        return match.group(2)[:40]
    return name[:64]


def is_mark(work):
    """Whether a piece of work is one of the profiler's marks around a phase."""
    return work[2] == "memset" and MARK <= int(work[6]) < MARK + 16 * 1000


def main():
    phases = {}
    with open(sys.argv[2]) as file:
        for line in file:
            match = re.match(r"phase (\d+): (.*)", line)
            if match:
                phases[int(match.group(1))] = match.group(2)
    work, calls = [], []
    with open(sys.argv[1], newline="") as file:
        for row in csv.reader(file):
            if len(row) != 9:
                continue
            kind, device, stream, start, end, name, grid, block, shared = row
            item = (int(start), int(end), kind, int(device), int(stream), name, grid, block, shared)
            (calls if kind == "call" else work).append(item)
    work.sort()
    calls.sort()
    devices = sorted({w[3] for w in work})
    for device in devices:
        own = [w for w in work if w[3] == device]
        marks = [
            (w[1], (int(w[6]) - MARK) // 16, w[4])
            for w in own
            if is_mark(w) and (int(w[6]) - MARK) % 16 == 0
        ]
        # Three marks a phase; the last is taken.
        last = {}
        for i, (time, phase, stream) in enumerate(marks):
            until = marks[i + 1][0] if i + 1 < len(marks) else own[-1][1] + 1
            last[phase] = (time, until, stream)
        for phase, (begin, until, stream) in sorted(last.items()):
            inside = [w for w in own if begin <= w[0] < until and not is_mark(w)]
            if not inside:
                continue
            # Work after a pause of 20 ms belongs to something else.
            kept = []
            end = begin
            for w in inside:
                if w[0] - end > 20_000_000:
                    break
                kept.append(w)
                end = max(end, w[1])
            print(f"\n== {phases.get(phase, phase)}  GPU {device}: {(end - begin) / 1e6:.3f} ms")
            if "--kernels" in sys.argv:
                for w in kept:
                    print(
                        f"  {(w[0] - begin) / 1e3:9.1f} +{(w[1] - w[0]) / 1e3:8.1f} us  s{w[4]:<4d}"
                        f" {short(w[5]):66s} {w[6]:>16s} x{w[7]} {w[8]}"
                    )
            busy = collections.Counter()
            number = collections.Counter()
            for w in kept:
                key = (w[4] == stream, short(w[5]))
                busy[key] += w[1] - w[0]
                number[key] += 1
            for key, time in busy.most_common(12):
                where = "compute " if key[0] else "exchange"
                print(f"    {where} {time / 1e6:8.3f} ms {number[key]:4d} x {key[1]}")
            counted = collections.Counter(
                c[5] for c in calls if begin - 300_000 <= c[0] < end and WAITS.search(c[5])
            )
            if counted:
                print("    calls:", dict(counted))


main()
