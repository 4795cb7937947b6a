#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""AdamW of kernels/cpu beside the limit that memory sets and beside torch.

    compare.py PATH_OF_LIBBENCH_KERNELS_C [--parameters N] [--rounds N] [--threads 1,2]

All contenders work on the same arrays and take turns within each round, so that what else the
machine does meets them alike. Each has two figures, the median and the minimum over the rounds:
on a machine that is not idle, the minima say more. The limit is the fastest of the pure-traffic
loops (with and without prefetching, copy stored through or past the caches) with the same reads
and writes. torch does its fused step and a cast of the result to bf16.
"""

import argparse
import ctypes
import statistics
import time

import torch

PREFETCHES = (0, 256, 512, 1024, 2048)  # bytes


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def load(path):
    library = ctypes.CDLL(path)
    for name in ("adamw", "adamw_split", "traffic"):
        getattr(library, f"zerod_bench_{name}").restype = ctypes.c_double
    library.zerod_bench_target.restype = ctypes.c_char_p
    library.zerod_bench_force_target.restype = ctypes.c_bool
    return library


def contenders(library, n, threads):
    """Returns {name: function that runs once and returns its seconds}."""
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(n, generator=generator))
    p.grad = torch.randn(n, generator=generator)
    copy = p.detach().to(torch.bfloat16)
    remainder = torch.zeros(n, dtype=torch.int16)
    optimizer = torch.optim.AdamW([p], lr=1e-4, fused=True)
    optimizer.step()
    m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
    assert copy.data_ptr() % 64 == 0, "the traffic loop stores whole cache lines"
    g, size = p.grad, ctypes.c_size_t(n)

    def ours(out):
        return library.zerod_bench_adamw(threads, pointer(g), pointer(p), pointer(m), pointer(v),
                                         pointer(out), size)

    def split():
        return library.zerod_bench_adamw_split(threads, pointer(g), pointer(copy),
                                               pointer(remainder), pointer(m), pointer(v), size)

    def traffic(out, stream, ahead):
        return library.zerod_bench_traffic(threads, ctypes.c_bool(stream), ctypes.c_size_t(ahead),
                                           pointer(g), pointer(p), pointer(m), pointer(v),
                                           pointer(out), size)

    def torch_fused(cast):
        start = time.perf_counter()
        optimizer.step()
        if cast:
            copy.copy_(p.detach())
        return time.perf_counter() - start

    runs = {
        "zerod AdamW + copy": lambda: ours(copy),
        "zerod AdamW": lambda: ours(None),
        "zerod AdamW split": split,
        "torch fused + cast": lambda: torch_fused(True),
        "torch fused": lambda: torch_fused(False),
    }
    for ahead in PREFETCHES:
        runs[f"traffic, ahead {ahead}"] = lambda a=ahead: traffic(None, False, a)
        for stream in (False, True):
            name = f"traffic + copy, {'streamed' if stream else 'stored'}, ahead {ahead}"
            runs[name] = lambda s=stream, a=ahead: traffic(copy, s, a)
    return runs


def measure(runs, n, rounds):
    """Returns {name: (median, minimum)} in ns per parameter."""
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    names = list(runs)
    for r in range(rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            seconds[name].append(runs[name]())
    return {name: (statistics.median(values) / n * 1e9, min(values) / n * 1e9)
            for name, values in seconds.items()}


def report(threads, target, figures):
    print(f"\n{threads} thread(s), {target}: ns per parameter, and the limit as a share of it")
    print(f"  {'':40s} {'median':>7s}             {'minimum':>7s}")
    for name, values in figures.items():
        kind = "traffic + copy" if "copy" in name or "cast" in name else "traffic, "
        columns = []
        for i, value in enumerate(values):
            limit = min(v[i] for other, v in figures.items() if other.startswith(kind))
            columns.append(f"{value:7.3f}  {limit / value * 100:5.1f} %")
        print(f"  {name:40s} " + "    ".join(columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("--parameters", type=int, default=32 << 20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--target", default="", help="AVX2 or AVX3; the best by default")
    arguments = parser.parse_args()
    if arguments.rounds < 7:
        parser.error("a median of fewer than 7 rounds says little")
    if arguments.parameters % 64:
        parser.error("--parameters must be a multiple of 64")
    library = load(arguments.library)
    if not library.zerod_bench_force_target(arguments.target.encode()):
        parser.error(f"this CPU has no {arguments.target}")
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        figures = measure(contenders(library, arguments.parameters, threads),
                          arguments.parameters, arguments.rounds)
        report(threads, library.zerod_bench_target().decode(), figures)


if __name__ == "__main__":
    main()
