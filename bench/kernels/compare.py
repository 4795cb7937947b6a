#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The optimizers of kernels/cpu beside the limit that memory sets and beside their peers.

    compare.py PATH_OF_LIBBENCH_KERNELS_C [--optimizers AdamW,...] [--parameters N] [--rounds N]
               [--threads 1,2] [--target AVX2] [--muon 768x3072,...]

All contenders of an optimizer work on the same arrays and take turns within each round, so that
what else the machine does meets them alike. Each has two figures, the median and the minimum over
the rounds: on a machine that is not idle, the minima say more.

The limit is the fastest of the pure-traffic loops (with and without prefetching, copy stored
through or past the caches) with the same reads and writes. LAMB's is that of its two passes, one
after the other. The peer is torch: the fused step where there is one (AdamW, Adam, Adagrad, SGD),
else the formula in foreach operations (Lion, LAMB); beside a step that writes the 16-bit copy, it
is followed by a cast to bf16. Where DeepSpeed is installed (DS_ACCELERATOR=cpu, and what it needs
to compile its kernels the first time), its CPU optimizers are further peers.

Muon's step is its matrix products, which memory does not limit; --muon gives the shapes of the
matrices whose orthogonalization is set beside the same iteration in torch, fp32, one thread.
"""

import argparse
import ctypes
import functools
import statistics
import time

import torch

PREFETCHES = (0, 256, 512, 1024, 2048)  # bytes
ROUNDS_MIN = 7


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def load(path):
    library = ctypes.CDLL(path)
    for name in ("step", "adamw_split", "traffic", "orthogonalize"):
        getattr(library, f"zerod_bench_{name}").restype = ctypes.c_double
    library.zerod_bench_target.restype = ctypes.c_char_p
    library.zerod_bench_force_target.restype = ctypes.c_bool
    return library


# ---- Peers: functions that do one step on p, p.grad and the states ---------------------------

def torch_fused(make, names):
    """Peer and states of torch.optim's fused step."""
    def peer(p, states):
        optimizer = make([p])
        optimizer.step()
        for name, state in zip(names, states):
            optimizer.state[p][name] = state
        return optimizer.step
    return peer


def foreach_lion(p, states, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.01):
    ps, gs, ms = [p.data], [p.grad], [states[0]]

    def step():
        u = torch._foreach_mul(ms, beta1)
        torch._foreach_add_(u, gs, alpha=1 - beta1)
        torch._foreach_sign_(u)
        torch._foreach_mul_(ps, 1 - lr * weight_decay)
        torch._foreach_add_(ps, u, alpha=-lr)
        torch._foreach_mul_(ms, beta2)
        torch._foreach_add_(ms, gs, alpha=1 - beta2)
    return step


def foreach_lamb(p, states, lr=1e-6, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    ps, gs, ms, vs = [p.data], [p.grad], [states[0]], [states[1]]

    def step():
        torch._foreach_mul_(ms, beta1)
        torch._foreach_add_(ms, gs, alpha=1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)
        d = torch._foreach_sqrt(vs)
        torch._foreach_add_(d, eps)
        u = torch._foreach_div(ms, d)
        torch._foreach_add_(u, ps, alpha=weight_decay)
        ratio = torch._foreach_norm(ps)[0].item() / torch._foreach_norm(u)[0].item()
        torch._foreach_add_(ps, u, alpha=-lr * min(max(ratio, 0.01), 10.0))
    return step


@functools.cache
def deepspeed_optimizers():
    """{optimizer: what makes DeepSpeed's from parameters}, {} where they cannot be had."""
    try:
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.lion import DeepSpeedCPULion
    except ImportError as error:
        print(f"  (without DeepSpeed: {error})")
        return {}
    return {
        "AdamW": lambda ps: DeepSpeedCPUAdam(ps, lr=1e-4, weight_decay=0.01, adamw_mode=True),
        "Adam": lambda ps: DeepSpeedCPUAdam(ps, lr=1e-4, weight_decay=0.01, adamw_mode=False),
        "Lion": lambda ps: DeepSpeedCPULion(ps, lr=1e-4, weight_decay=0.01),
        "Adagrad": lambda ps: DeepSpeedCPUAdagrad(ps, lr=1e-4),
    }


# name -> (states, traffic passes as (reads, updates, with copy), peer's name, peer)
OPTIMIZERS = {
    "AdamW": (2, [(1, 3, True)], "torch fused", torch_fused(
        lambda ps: torch.optim.AdamW(ps, lr=1e-4, weight_decay=0.01, fused=True),
        ("exp_avg", "exp_avg_sq"))),
    "Adam": (2, [(1, 3, True)], "torch fused", torch_fused(
        lambda ps: torch.optim.Adam(ps, lr=1e-4, weight_decay=0.01, fused=True),
        ("exp_avg", "exp_avg_sq"))),
    "Lion": (1, [(1, 2, True)], "torch foreach", foreach_lion),
    "Adagrad": (1, [(1, 2, True)], "torch fused", torch_fused(
        lambda ps: torch.optim.Adagrad(ps, lr=1e-4, fused=True), ("sum",))),
    "SGD": (1, [(1, 2, True)], "torch fused", torch_fused(
        lambda ps: torch.optim.SGD(ps, lr=1e-6, momentum=0.9, fused=True),
        ("momentum_buffer",))),
    "LAMB": (2, [(2, 2, False), (2, 1, True)], "torch foreach", foreach_lamb),
}


# ---- Contenders ------------------------------------------------------------------------------

def timed(step, p=None, copy=None):
    start = time.perf_counter()
    step()
    if copy is not None:
        copy.copy_(p.detach())
    return time.perf_counter() - start


def traffic_runs(library, threads, n, passes, arrays, copy):
    """{(pass, with copy, description): run} for all ways of all passes."""
    g, p, *states = arrays

    def run(reads, updates, out, stream, ahead):
        # What is only read is the gradient, and in LAMB's passes the weights or the states.
        update = [p, *states][:updates] if reads == 1 or updates == 1 else states
        others = [t for t in (g, p, *states) if all(t is not u for u in update)]
        if reads == 2 and updates == 1:
            others = states
        return library.zerod_bench_traffic(
            threads, ctypes.c_size_t(reads), ctypes.c_size_t(updates), ctypes.c_bool(stream),
            ctypes.c_size_t(ahead), pointers(others[:reads]), pointers(update), pointer(out),
            ctypes.c_size_t(n))

    runs = {}
    for index, (reads, updates, has_copy) in enumerate(passes):
        for ahead in PREFETCHES:
            runs[index, False, f"ahead {ahead}"] = \
                lambda r=reads, u=updates, a=ahead: run(r, u, None, False, a)
            for stream in (False, True) if has_copy else ():
                way = f"{'streamed' if stream else 'stored'}, ahead {ahead}"
                runs[index, True, way] = \
                    lambda r=reads, u=updates, s=stream, a=ahead: run(r, u, copy, s, a)
    return runs


def contenders(library, name, n, threads):
    """Returns ({name: run}, {key: traffic run}); a run returns its seconds."""
    state_count, passes, peer_name, make_peer = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(n, generator=generator))
    p.grad = torch.randn(n, generator=generator)
    states = [torch.full((n,), 0.01) for _ in range(state_count)]
    copy = p.detach().to(torch.bfloat16)
    assert copy.data_ptr() % 64 == 0, "the traffic loop stores whole cache lines"
    a, b = (states + [None, None])[:2]

    def ours(out):
        seconds = library.zerod_bench_step(
            name.encode(), threads, pointer(p.grad), pointer(p), pointer(a), pointer(b),
            pointer(out), ctypes.c_size_t(n))
        assert seconds >= 0, name
        return seconds

    peers = {peer_name: make_peer(p, states)}
    if name in deepspeed_optimizers():
        peers["deepspeed"] = deepspeed_optimizers()[name]([p]).step
    runs = {f"zerod {name} + copy": lambda: ours(copy), f"zerod {name}": lambda: ours(None)}
    if name == "AdamW":
        remainder = torch.zeros(n, dtype=torch.int16)
        runs["zerod AdamW split"] = lambda: library.zerod_bench_adamw_split(
            threads, pointer(p.grad), pointer(copy), pointer(remainder), pointer(a), pointer(b),
            ctypes.c_size_t(n))
    for peer, step in peers.items():
        runs[f"{peer} + cast"] = lambda s=step: timed(s, p, copy)
        runs[peer] = lambda s=step: timed(s)
    return runs, traffic_runs(library, threads, n, passes, [p.grad, p, *states], copy)


def measure(runs, rounds):
    """Returns {name: seconds of each round}; who begins changes from round to round."""
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    names = list(runs)
    for r in range(rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            seconds[name].append(runs[name]())
    return seconds


def limit(seconds, passes, with_copy, of):
    """The sum over the passes of the best way, in seconds."""
    total = 0.0
    for index, (_, _, has_copy) in enumerate(passes):
        wanted = with_copy and has_copy
        total += min(of(values) for key, values in seconds.items()
                     if key[:2] == (index, wanted))
    return total


def report(name, runs, seconds, n):
    passes, peer_name = OPTIMIZERS[name][1:3]
    for run in runs:
        with_copy = "copy" in run or "cast" in run
        peer = f"{peer_name} + cast" if with_copy else peer_name
        columns = []
        for of in (statistics.median, min):
            value = of(seconds[run])
            share = limit({k: v for k, v in seconds.items() if isinstance(k, tuple)}, passes,
                          with_copy, of) / value
            columns.append(f"{value / n * 1e9:7.3f} ns  {share * 100:5.1f} %  "
                           f"{of(seconds[peer]) / value:5.2f} x")
        print(f"  {run:26s} " + "     ".join(columns))


def compare_optimizers(library, arguments, threads):
    target = library.zerod_bench_target().decode()
    print(f"\n{threads} thread(s), {target}: ns per parameter, the limit as a share of it, and "
          f"how often it fits in torch's\n  {'':26s} {'median':36s}{'minimum'}")
    for name in arguments.optimizers.split(","):
        runs, traffic = contenders(library, name, arguments.parameters, threads)
        seconds = measure({**runs, **traffic}, arguments.rounds)
        report(name, runs, seconds, arguments.parameters)


# ---- Muon's iteration ------------------------------------------------------------------------

def torch_orthogonalize(u):
    tall = u.size(0) > u.size(1)
    x = u.mT if tall else u
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


def compare_muon(library, shapes, rounds):
    torch.set_num_threads(1)
    print("\nMuon's iteration, 1 thread: ms, and how often it fits in torch's standard one")
    for shape in shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        u, work = torch.randn(rows, columns), torch.empty(rows, columns)

        def ours(gram):
            work.copy_(u)
            return library.zerod_bench_orthogonalize(
                ctypes.c_bool(gram), pointer(work), ctypes.c_size_t(rows),
                ctypes.c_size_t(columns))

        runs = {"zerod standard": lambda: ours(False), "zerod gram": lambda: ours(True),
                "torch standard": lambda: timed(lambda: torch_orthogonalize(u))}
        seconds = measure(runs, rounds)
        for run in runs:
            columns_out = [f"{of(seconds[run]) * 1e3:9.2f} ms  "
                           f"{of(seconds['torch standard']) / of(seconds[run]):5.2f} x"
                           for of in (statistics.median, min)]
            print(f"  {shape:12s} {run:15s} " + "     ".join(columns_out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="or none")
    parser.add_argument("--parameters", type=int, default=32 << 20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--target", default="", help="AVX2 or AVX3; the best by default")
    parser.add_argument("--muon", default="", help="shapes such as 768x3072,1024x1024")
    arguments = parser.parse_args()
    if arguments.rounds < ROUNDS_MIN:
        parser.error(f"a median of fewer than {ROUNDS_MIN} rounds says little")
    if arguments.parameters % 64:
        parser.error("--parameters must be a multiple of 64")
    if arguments.optimizers == "none":
        arguments.optimizers = ""
    unknown = [name for name in filter(None, arguments.optimizers.split(","))
               if name not in OPTIMIZERS]
    if unknown:
        parser.error(f"no optimizer {unknown}; there are {', '.join(OPTIMIZERS)}")
    library = load(arguments.library)
    if not library.zerod_bench_force_target(arguments.target.encode()):
        parser.error(f"this CPU has no {arguments.target}")
    for threads in map(int, arguments.threads.split(",")) if arguments.optimizers else ():
        torch.set_num_threads(threads)
        compare_optimizers(library, arguments, threads)
    if arguments.muon:
        compare_muon(library, arguments.muon, arguments.rounds)


if __name__ == "__main__":
    main()
