"""Shows that steady calls neither wait for a GPU nor allocate: steady_calls.py TRACE.csv[.gz]

The trace is cupti_trace.cpp's of `gpu_bench profile`, which ends every forward and backward with a
cudaStreamSynchronize of its own. What stands between two of these is one call of the library (or,
the first time for a pack, the steps that build its tables). Exit code 1 when a call that is not the
first of its pack waits or allocates.
"""

import collections
import csv
import gzip
import re
import sys

WAITS = re.compile(r"Synchronize|Malloc$|MallocHost|HostAlloc|cudaFree$|FreeHost|Create")
BUILDS = "cudaHostAlloc"


def main():
    opened = gzip.open if sys.argv[1].endswith(".gz") else open
    threads = collections.defaultdict(list)
    with opened(sys.argv[1], "rt") as file:
        for row in csv.reader(file):
            if len(row) == 9 and row[0] == "call":
                name = re.sub(r"_v\d+$", "", row[5])
                threads[row[2]].append((int(row[3]), name))
    steady, first, wrong = 0, 0, 0
    names = collections.Counter()
    for calls in threads.values():
        window = []
        for _, name in sorted(calls):
            if name != "cudaStreamSynchronize":
                window.append(name)
                continue
            if "cudaMallocFromPoolAsync" in window and "cudaStreamWaitEvent" in window:
                found = collections.Counter(n for n in window if WAITS.search(n))
                if found[BUILDS]:
                    first += 1
                elif found:
                    wrong += 1
                    print("waits or allocates:", dict(found))
                else:
                    steady += 1
                    names.update(window)
            window = []
    print(
        f"{steady} steady calls, {first} that built a pack's tables, {wrong} that wait or allocate"
    )
    print("CUDA calls of the steady ones:", dict(names.most_common()))
    return 1 if wrong or not steady else 0


sys.exit(main())
