# SPDX-License-Identifier: Apache-2.0
"""AdamW of kernels/cpu beside torch.optim.AdamW(foreach=False, fused=False), 20 steps.

Goal: training with zerod follows training with torch. The moments are made of the same
operations as torch's vector code for AVX2 and AVX-512, so there they must have the same bits. The
parameters may differ by roundings of the denominator (torch's square root is not correctly
rounded on every CPU): by a few units in the last place of the update, never by more.

    adamw_vs_torch.py PATH_OF_LIBKERNELS_TEST_C
"""

import ctypes
import sys

try:
    import torch
except ImportError:
    print("torch cannot be imported: skipped")
    sys.exit(77)

STEPS = 20
RTOL = 2e-6
SIZE = 100_003  # odd: whole vectors, and edges


class Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double)
                for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")]


def load(path):
    library = ctypes.CDLL(path)
    library.zerod_kernels_target.restype = ctypes.c_char_p
    library.zerod_kernels_force_target.restype = ctypes.c_bool
    return library


def adamw(library, options, step, grads, p, m, v, copy):
    pointers = (ctypes.c_void_p * len(grads))(*(g.data_ptr() for g in grads))
    library.zerod_kernels_adamw(
        ctypes.byref(options), ctypes.c_uint64(step), pointers, ctypes.c_size_t(len(grads)),
        ctypes.c_void_p(p.data_ptr()), ctypes.c_void_p(m.data_ptr()),
        ctypes.c_void_p(v.data_ptr()), ctypes.c_void_p(copy.data_ptr()),
        ctypes.c_size_t(p.numel()))


def compare(library, lr, betas, eps, weight_decay, count):
    """Returns the largest difference of a parameter, as a multiple of what is allowed."""
    generator = torch.Generator().manual_seed(count)
    theirs = torch.nn.Parameter(torch.randn(SIZE, generator=generator))
    optimizer = torch.optim.AdamW([theirs], lr=lr, betas=betas, eps=eps,
                                  weight_decay=weight_decay, foreach=False, fused=False)
    p = theirs.detach().clone()
    m, v = torch.zeros(SIZE), torch.zeros(SIZE)
    copy = torch.zeros(SIZE, dtype=torch.bfloat16)
    scale = 1.0 / (4 * count)
    options = Options(lr, *betas, eps, weight_decay, scale)
    worst = 0.0
    for step in range(1, STEPS + 1):
        spread = 10.0 ** torch.randint(-6, 3, (SIZE,), generator=generator)
        grads = [torch.randn(SIZE, generator=generator) * spread for _ in range(count)]
        total = grads[0].clone()
        for g in grads[1:]:
            total += g
        theirs.grad = total * scale
        optimizer.step()
        adamw(library, options, step, grads, p, m, v, copy)

        state = optimizer.state[theirs]
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert torch.equal(m, state["exp_avg"]), f"step {step}: first moment differs"
            assert torch.equal(v, state["exp_avg_sq"]), f"step {step}: second moment differs"
        assert torch.equal(copy, p.to(torch.bfloat16)), f"step {step}: 16-bit copy differs"
        # Relative to the parameter or to the step that moved it, whichever is larger: a parameter
        # near zero has the rounding errors of the updates that brought it there.
        allowed = RTOL * (theirs.detach().abs() + step * lr)
        worst = max(worst, ((p - theirs.detach()).abs() / allowed).max().item())
    return worst


def main():
    library = load(sys.argv[1])
    torch.set_num_threads(1)
    cases = [
        (1e-3, (0.9, 0.999), 1e-8, 0.01, 1),
        (3e-4, (0.9, 0.95), 1e-8, 0.1, 2),
        (1e-2, (0.4, 0.99), 1e-6, 0.0, 1),
        (1e-3, (0.0, 0.999), 1e-8, 0.01, 3),
    ]
    for name in (b"AVX3", b"AVX2", b"SCALAR"):
        if not library.zerod_kernels_force_target(name):
            print(f"{name.decode()}: not on this CPU")
            continue
        for case in cases:
            worst = compare(library, *case)
            print(f"{name.decode()} {case}: {worst:.3f} of the allowed difference")
            assert worst <= 1.0, "a parameter differs from torch's by more than is allowed"


if __name__ == "__main__":
    main()
