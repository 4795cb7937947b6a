# SPDX-License-Identifier: Apache-2.0
"""The optimizers of kernels/cpu beside torch.optim (foreach=False, fused=False), 20 steps; Lion,
LAMB and Muon beside their papers' formulas in torch.

Goal: training with zerod follows training with torch. AdamW's moments are made of the same
operations as torch's vector code for AVX2 and AVX-512, so there they must have the same bits. All
else may differ by roundings (torch's square root is not correctly rounded on every CPU, and it
rounds some products that are fused here): by a few units in the last place of the update.

    optimizers_vs_torch.py PATH_OF_LIBKERNELS_TEST_C
"""

import ctypes
import sys
from ctypes import byref, c_bool, c_double, c_size_t, c_uint64, c_void_p

try:
    import torch
except ImportError:
    print("torch cannot be imported: skipped")
    sys.exit(77)

STEPS = 20
RTOL = 2e-6
SIZE = 100_003  # odd: whole vectors, and edges
BLOCK = 64 * 1024


class Options(ctypes.Structure):
    _fields_ = [(name, c_double)
                for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")]


def load(path):
    library = ctypes.CDLL(path)
    library.zerod_kernels_target.restype = ctypes.c_char_p
    library.zerod_kernels_force_target.restype = ctypes.c_bool
    return library


def address(tensor):
    return c_void_p(None if tensor is None else tensor.data_ptr())


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of the paper."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                u = m.mul(beta1).add_(p.grad, alpha=1 - beta1)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * u.sign())
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


class Lamb(torch.optim.Optimizer):
    """Algorithm 2 of the paper, with DeepSpeed's clamp and bias correction."""

    def __init__(self, params, lr, betas, eps, weight_decay, eps_inside_sqrt, bias_correction,
                 coefficients):
        super().__init__(params, dict(lr=lr))
        self.settings = (betas, eps, weight_decay, eps_inside_sqrt, bias_correction, coefficients)
        self.steps = 0

    @torch.no_grad()
    def step(self):
        (beta1, beta2), eps, weight_decay, inside, correction, coefficients = self.settings
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            v = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
            m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            u = m / ((v + eps).sqrt() if inside else v.sqrt() + eps) + weight_decay * p
            p_norm, u_norm = p.double().norm().item(), u.double().norm().item()
            ratio = 1.0
            if p_norm > 0 and u_norm > 0:
                ratio = min(max(p_norm / u_norm, coefficients[0]), coefficients[1])
            rate = self.param_groups[0]["lr"] * ratio
            if correction:
                rate *= (1 - beta2 ** self.steps) ** 0.5 / (1 - beta1 ** self.steps)
            p.sub_(rate * u)


class Muon(torch.optim.Optimizer):
    """Keller Jordan's, with the iteration in fp64."""

    def __init__(self, params, lr, momentum, nesterov, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov,
                                      weight_decay=weight_decay))

    @staticmethod
    def orthogonalize(u):
        wide = u.double() if u.size(0) <= u.size(1) else u.double().mT
        x = wide / (wide.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x * max(1, u.size(0) / u.size(1)) ** 0.5
        return (x if u.size(0) <= u.size(1) else x.mT).float()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            mu = group["momentum"]
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - mu)
                u = p.grad.lerp(m, mu) if group["nesterov"] else m
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(self.orthogonalize(u), alpha=-group["lr"])


def run(library, make, ours, states, count, lr, exact=(), beginning=0.0, gain=None,
        shape=(SIZE,)):
    """`ours(library, step, scale, grads, count, p, *states, copy, fp16, n)`. A step moves a
    parameter by `lr` at most, or with `gain` by lr * gain * |gradient|. Returns the largest
    difference of a parameter, as a multiple of what is allowed."""
    generator = torch.Generator().manual_seed(count)
    theirs = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = make([theirs])
    p = theirs.detach().clone()
    beginnings = beginning if isinstance(beginning, dict) else dict.fromkeys(states, beginning)
    arrays = {name: torch.full(shape, beginnings.get(name, 0.0)) for name in states}
    fp16 = count % 2 == 0
    copy = torch.zeros(shape, dtype=torch.float16 if fp16 else torch.bfloat16)
    scale = 1.0 / (4 * count)
    moved = torch.zeros(shape)
    worst = 0.0
    for step in range(1, STEPS + 1):
        spread = 10.0 ** torch.randint(-6, 3, shape, generator=generator)
        grads = [torch.randn(shape, generator=generator) * spread for _ in range(count)]
        total = grads[0].clone()
        for g in grads[1:]:
            total += g
        theirs.grad = total * scale
        moved += lr if gain is None else lr * gain * theirs.grad.abs()
        optimizer.step()
        pointers = (c_void_p * count)(*(g.data_ptr() for g in grads))
        ours(library, step, scale, pointers, c_size_t(count), address(p),
             *(address(a) for a in arrays.values()), address(copy), c_bool(fp16),
             *(c_size_t(size) for size in shape))

        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            for name in exact:
                assert torch.equal(arrays[name], optimizer.state[theirs][name]), \
                    f"step {step}: {name} differs"
        assert torch.equal(copy, p.to(copy.dtype)), f"step {step}: 16-bit copy differs"
        # Relative to the parameter or to the steps that moved it, whichever is larger: a parameter
        # near zero has the rounding errors of the updates that brought it there.
        allowed = RTOL * (theirs.detach().abs() + moved)
        worst = max(worst, ((p - theirs.detach()).abs() / allowed).max().item())
    return worst


def adam(decoupled, lr, betas, eps, weight_decay):
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    name = "zerod_kernels_adamw" if decoupled else "zerod_kernels_adam"

    def ours(library, step, scale, grads, count, p, m, v, *copy):
        options = Options(lr, *betas, eps, weight_decay, scale)
        getattr(library, name)(byref(options), c_uint64(step), grads, count, p, m, v, *copy)

    moments = ("exp_avg", "exp_avg_sq")
    return dict(
        make=lambda params: kind(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                 foreach=False, fused=False),
        ours=ours, states=moments, lr=lr, exact=moments if decoupled else ())


def lion(lr, betas, weight_decay):
    def ours(library, step, scale, grads, count, p, m, *copy):
        library.zerod_kernels_lion(c_double(lr), c_double(betas[0]), c_double(betas[1]),
                                   c_double(weight_decay), c_double(scale), grads, count, p, m,
                                   *copy)

    return dict(make=lambda params: Lion(params, lr, betas, weight_decay), ours=ours,
                states=("exp_avg",), lr=lr, exact=("exp_avg",))


def adagrad(lr, lr_decay, weight_decay, beginning):
    def ours(library, step, scale, grads, count, p, total, *copy):
        library.zerod_kernels_adagrad(c_double(lr), c_double(lr_decay), c_double(1e-10),
                                      c_double(weight_decay), c_uint64(step), c_double(scale),
                                      grads, count, p, total, *copy)

    return dict(
        make=lambda params: torch.optim.Adagrad(
            params, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=beginning, foreach=False, fused=False),
        ours=ours, states=("sum",), lr=lr, beginning=beginning)


def sgd(lr, momentum, dampening, weight_decay, nesterov):
    def ours(library, step, scale, grads, count, p, *rest):
        b, *copy = rest if momentum else (None, *rest)
        library.zerod_kernels_sgd(c_double(lr), c_double(momentum), c_double(dampening),
                                  c_double(weight_decay), c_bool(nesterov), c_uint64(step),
                                  c_double(scale), grads, count, p, b, *copy)

    return dict(
        make=lambda params: torch.optim.SGD(
            params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, foreach=False, fused=False),
        ours=ours, states=("momentum_buffer",) if momentum else (), lr=lr,
        gain=4 / (1 - momentum))


def rmsprop(lr, alpha=0.99, weight_decay=0.0, momentum=0.0, centered=False, eps=1e-8):
    names = [name for name, kept in (("momentum_buffer", momentum > 0), ("grad_avg", centered))
             if kept]

    def ours(library, step, scale, grads, count, p, v, *rest):
        rest = list(rest)
        b = rest.pop(0) if momentum > 0 else None
        a = rest.pop(0) if centered else None
        library.zerod_kernels_rmsprop(c_double(lr), c_double(alpha), c_double(eps),
                                      c_double(weight_decay), c_double(momentum), c_double(scale),
                                      grads, count, p, v, b, a, *rest)

    states = ("square_avg", *names)
    # Centered, digits are lost where v - a^2 cancels.
    largest = lr / (1 - alpha) ** 0.5 / (1 - momentum) * (4 if centered else 1)
    return dict(
        make=lambda params: torch.optim.RMSprop(
            params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum,
            centered=centered, foreach=False),
        ours=ours, states=states, lr=largest,
        exact=() if weight_decay else tuple({*states} - {"momentum_buffer"}))


def adadelta(lr, rho=0.9, weight_decay=0.0, eps=1e-6):
    def ours(library, step, scale, grads, count, p, v, u, *copy):
        library.zerod_kernels_adadelta(c_double(lr), c_double(rho), c_double(eps),
                                       c_double(weight_decay), c_double(scale), grads, count, p,
                                       v, u, *copy)

    return dict(
        make=lambda params: torch.optim.Adadelta(
            params, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, foreach=False),
        ours=ours, states=("square_avg", "acc_delta"), lr=lr * eps ** 0.5,
        exact=() if weight_decay else ("square_avg",))


def adamax(lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    def ours(library, step, scale, grads, count, p, m, u, *copy):
        options = Options(lr, *betas, eps, weight_decay, scale)
        library.zerod_kernels_adamax(byref(options), c_uint64(step), grads, count, p, m, u, *copy)

    states = ("exp_avg", "exp_inf")
    return dict(
        make=lambda params: torch.optim.Adamax(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False),
        ours=ours, states=states, lr=lr, exact=() if weight_decay else states)


def nadam(lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3,
          decoupled=False):
    def ours(library, step, scale, grads, count, p, m, v, *copy):
        options = Options(lr, *betas, eps, weight_decay, scale)
        library.zerod_kernels_nadam(byref(options), c_double(momentum_decay), c_bool(decoupled),
                                    c_uint64(step), grads, count, p, m, v, *copy)

    states = ("exp_avg", "exp_avg_sq")
    return dict(
        make=lambda params: torch.optim.NAdam(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            momentum_decay=momentum_decay, decoupled_weight_decay=decoupled, foreach=False),
        ours=ours, states=states, lr=lr, exact=() if weight_decay and not decoupled else states)


def radam(lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False):
    def ours(library, step, scale, grads, count, p, m, v, *copy):
        options = Options(lr, *betas, eps, weight_decay, scale)
        library.zerod_kernels_radam(byref(options), c_bool(decoupled), c_uint64(step), grads,
                                    count, p, m, v, *copy)

    states = ("exp_avg", "exp_avg_sq")
    # Its first steps are those of a mean of gradients, which are not divided by their size.
    return dict(
        make=lambda params: torch.optim.RAdam(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled_weight_decay=decoupled, foreach=False),
        ours=ours, states=states, lr=lr, gain=10,
        exact=() if weight_decay and not decoupled else states)


def asgd(lr, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0):
    def ours(library, step, scale, grads, count, p, ax, *copy):
        library.zerod_kernels_asgd(c_double(lr), c_double(lr), c_double(lambd), c_double(alpha),
                                   c_double(t0), c_double(weight_decay), c_uint64(step),
                                   c_double(scale), grads, count, p, ax, *copy)

    return dict(
        make=lambda params: torch.optim.ASGD(
            params, lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay,
            foreach=False),
        ours=ours, states=("ax",), lr=lr, gain=4)


def rprop(lr, etas=(0.5, 1.2), step_sizes=(1e-6, 50)):
    def ours(library, step, scale, grads, count, p, prev, size, *copy):
        library.zerod_kernels_rprop(c_double(etas[0]), c_double(etas[1]), c_double(step_sizes[0]),
                                    c_double(step_sizes[1]), c_double(scale), grads, count, p,
                                    prev, size, *copy)

    states = ("prev", "step_size")
    return dict(
        make=lambda params: torch.optim.Rprop(
            params, lr=lr, etas=etas, step_sizes=step_sizes, foreach=False),
        ours=ours, states=states, lr=lr, beginning={"step_size": lr}, exact=states)


def lamb(lr, weight_decay, eps=1e-6, inside=False, correction=True, coefficients=(0.01, 10.0)):
    betas = (0.9, 0.999)

    def ours(library, step, scale, grads, count, p, m, v, *copy):
        options = Options(lr, *betas, eps, weight_decay, scale)
        library.zerod_kernels_lamb(byref(options), c_bool(inside), c_bool(correction),
                                   c_double(coefficients[0]), c_double(coefficients[1]),
                                   c_uint64(step), grads, count, p, m, v, *copy, c_size_t(BLOCK))

    return dict(
        make=lambda params: Lamb(params, lr, betas, eps, weight_decay, inside, correction,
                                 coefficients),
        ours=ours, states=("exp_avg", "exp_avg_sq"), lr=lr * coefficients[1])


def muon(lr, shape, momentum=0.95, nesterov=True, weight_decay=0.0, gram=False):
    def ours(library, step, scale, grads, count, p, m, *copy):
        library.zerod_kernels_muon(c_double(lr), c_double(momentum), c_bool(nesterov),
                                   c_double(weight_decay), c_bool(gram), c_double(scale), grads,
                                   count, p, m, *copy)

    return dict(make=lambda params: Muon(params, lr, momentum, nesterov, weight_decay), ours=ours,
                states=("momentum_buffer",), lr=lr, exact=("momentum_buffer",), shape=shape)


CASES = {
    "AdamW": (adam(True, 1e-3, (0.9, 0.999), 1e-8, 0.01), 1),
    "AdamW, 2 gradients": (adam(True, 3e-4, (0.9, 0.95), 1e-8, 0.1), 2),
    "AdamW, small beta1": (adam(True, 1e-2, (0.4, 0.99), 1e-6, 0.0), 1),
    "AdamW, no beta1": (adam(True, 1e-3, (0.0, 0.999), 1e-8, 0.01), 3),
    "Adam": (adam(False, 1e-3, (0.9, 0.999), 1e-8, 0.0), 1),
    "Adam, weight decay": (adam(False, 1e-3, (0.9, 0.95), 1e-8, 0.1), 2),
    "Lion": (lion(1e-4, (0.9, 0.99), 0.0), 1),
    "Lion, weight decay": (lion(1e-3, (0.95, 0.98), 0.1), 3),
    "Adagrad": (adagrad(1e-2, 0.0, 0.0, 0.0), 1),
    "Adagrad, all": (adagrad(1e-2, 0.1, 0.01, 0.5), 2),
    "SGD": (sgd(1e-2, 0.0, 0.0, 0.0, False), 1),
    "SGD, weight decay": (sgd(1e-2, 0.0, 0.0, 0.1, False), 2),
    "SGD, momentum": (sgd(1e-2, 0.9, 0.0, 0.1, False), 1),
    "SGD, dampening": (sgd(1e-2, 0.9, 0.5, 0.0, False), 1),
    "SGD, Nesterov": (sgd(1e-2, 0.9, 0.0, 0.1, True), 4),
    "RMSprop": (rmsprop(1e-3), 1),
    "RMSprop, weight decay": (rmsprop(1e-2, alpha=0.9, weight_decay=0.1, eps=1e-6), 2),
    "RMSprop, momentum": (rmsprop(1e-3, momentum=0.9), 1),
    "RMSprop, centered": (rmsprop(1e-3, centered=True), 3),
    "RMSprop, all": (rmsprop(1e-3, 0.95, 0.1, momentum=0.8, centered=True), 2),
    "Adadelta": (adadelta(1.0), 1),
    "Adadelta, weight decay": (adadelta(0.3, rho=0.8, weight_decay=0.1, eps=1e-5), 2),
    "Adamax": (adamax(2e-3), 1),
    "Adamax, weight decay": (adamax(2e-3, (0.4, 0.9), 1e-6, 0.1), 2),
    "NAdam": (nadam(2e-3), 1),
    "NAdam, weight decay": (nadam(2e-3, (0.8, 0.95), 1e-6, 0.1), 2),
    "NAdam, decoupled": (nadam(2e-3, (0.5, 0.9), weight_decay=0.1, momentum_decay=0.5,
                               decoupled=True), 3),
    "NAdam, no decay of the momentum": (nadam(2e-3, (0.99, 0.999), momentum_decay=0.0), 1),
    "RAdam": (radam(1e-3), 1),
    "RAdam, soon rectified": (radam(1e-3, (0.8, 0.9), 1e-6, 0.1), 2),
    "RAdam, never rectified": (radam(1e-3, (0.9, 0.4)), 1),
    "RAdam, decoupled": (radam(1e-3, weight_decay=0.1, decoupled=True), 3),
    "ASGD": (asgd(1e-2), 1),
    "ASGD, all": (asgd(1e-2, lambd=0.1, alpha=0.5, t0=3.0, weight_decay=0.1), 2),
    "Rprop": (rprop(1e-2), 1),
    "Rprop, within bounds": (rprop(1e-2, etas=(0.3, 1.7), step_sizes=(5e-3, 0.02)), 2),
    "LAMB": (lamb(1e-3, 0.0), 1),
    "LAMB, weight decay": (lamb(1e-2, 0.1), 2),
    "LAMB, eps inside": (lamb(1e-2, 0.01, eps=1e-3, inside=True), 3),
    "LAMB, no correction": (lamb(1e-2, 0.01, correction=False, coefficients=(0.1, 0.3)), 1),
    "Muon, wide": (muon(0.02, (48, 190)), 1),
    "Muon, wide, gram": (muon(0.02, (48, 190), gram=True), 1),
    "Muon, tall": (muon(0.02, (321, 64), weight_decay=0.1), 2),
    "Muon, tall, gram": (muon(0.02, (321, 64), weight_decay=0.1, gram=True), 2),
    "Muon, square": (muon(0.02, (100, 100), momentum=0.4, nesterov=False, gram=True), 3),
}


def main():
    library = load(sys.argv[1])
    torch.set_num_threads(1)
    wrong = []
    for target in (b"AVX3", b"AVX2", b"SCALAR"):
        if not library.zerod_kernels_force_target(target):
            print(f"{target.decode()}: not on this CPU")
            continue
        for name, (case, count) in CASES.items():
            worst = run(library, count=count, **case)
            print(f"{target.decode()} {name}: {worst:.3f} of the allowed difference")
            if not worst <= 1.0:
                wrong.append((target.decode(), name))
    assert not wrong, f"parameters differ from torch's by more than is allowed: {wrong}"


if __name__ == "__main__":
    main()
