# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose step of an element depends on its whole tensor, through daemons: beside plain
PyTorch on several grids, and the stages against each other."""

import pytest
import torch

import cluster
from plain import plain

GRIDS = [(1, 1), (1, 2), (2, 1)]  # nodes, ranks of each
STAGES = (0, 3)
STEPS = 6
CLIP = 0.3


class Lamb(torch.optim.Optimizer):
    """The paper's algorithm 2, with DeepSpeed's bounds and its correction of the whole update."""

    def __init__(self, params, lr, betas, eps, weight_decay, min_coeff=0.01, max_coeff=10.0,
                 bias_correction=True, eps_inside_sqrt=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.eps, self.bounds = eps, (min_coeff, max_coeff)
        self.bias_correction, self.eps_inside_sqrt = bias_correction, eps_inside_sqrt
        self.ratios = []

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                v = state.setdefault("v", torch.zeros_like(p))
                t = state["t"] = state.get("t", 0) + 1
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                inside = self.eps_inside_sqrt
                below = (v + self.eps).sqrt() if inside else v.sqrt() + self.eps
                update = m / below + group["weight_decay"] * p
                weight_norm, update_norm = p.norm().item(), update.norm().item()
                ratio = 1.0
                if weight_norm and update_norm:
                    ratio = min(max(weight_norm / update_norm, self.bounds[0]), self.bounds[1])
                self.ratios.append(ratio)
                rate = group["lr"]
                if self.bias_correction:
                    rate *= (1 - beta2**t) ** 0.5 / (1 - beta1**t)
                p.sub_(rate * ratio * update)


class Muon(torch.optim.Optimizer):
    """The author's, in fp32, and AdamW for what is no matrix."""

    def __init__(self, params, muon_lr, adam_lr, momentum, betas, eps, weight_decay):
        super().__init__(params, {"weight_decay": weight_decay})
        self.rates, self.momentum, self.betas, self.eps = (muon_lr, adam_lr), momentum, betas, eps

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                rate = self.rates[0] if p.dim() == 2 else self.rates[1]
                update = (self._matrix if p.dim() == 2 else self._adam)(p, self.state[p])
                p.mul_(1 - rate * group["weight_decay"]).sub_(rate * update)

    def _matrix(self, p, state):
        m = state.setdefault("m", torch.zeros_like(p))
        m.lerp_(p.grad, 1 - self.momentum)
        x = p.grad.lerp(m, self.momentum)
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x * max(1, p.shape[0] / p.shape[1]) ** 0.5

    def _adam(self, p, state):
        m = state.setdefault("m", torch.zeros_like(p))
        v = state.setdefault("v", torch.zeros_like(p))
        t = state["t"] = state.get("t", 0) + 1
        m.lerp_(p.grad, 1 - self.betas[0])
        v.lerp_(p.grad.square(), 1 - self.betas[1])
        m, v = m / (1 - self.betas[0] ** t), v / (1 - self.betas[1] ** t)
        return m / (v.sqrt() + self.eps)


MUON = {"muon_lr": 0.02, "adam_lr": 0.003, "momentum": 0.9, "betas": (0.8, 0.95), "eps": 1e-8,
        "weight_decay": 0.1}
SHARED = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CASES = {
    "lamb": ({"type": "Lamb", "params": SHARED}, lambda p: Lamb(p, **SHARED)),
    "lamb-bounded": (
        {"type": "lamb", "params": {**SHARED, "max_coeff": 0.5, "min_coeff": 0.3,
                                    "bias_correction": False, "eps_inside_sqrt": True}},
        lambda p: Lamb(p, **SHARED, max_coeff=0.5, min_coeff=0.3, bias_correction=False,
                       eps_inside_sqrt=True)),
    "muon": ({"type": "Muon", "params": MUON}, lambda p: Muon(p, **MUON)),
    "muon-standard": ({"type": "muon", "params": {**MUON, "ns_method": "standard"}},
                      lambda p: Muon(p, **MUON)),
}


@pytest.fixture(scope="module", params=GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def results(request):
    nodes, per_node = request.param
    runs = {}
    for name, (section, _) in CASES.items():
        for stage in STAGES:
            zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
            runs[f"{name}-{stage}"] = {"steps": STEPS, "config": {
                "train_micro_batch_size_per_gpu": 8, "gradient_clipping": CLIP,
                "optimizer": section, "zero_optimization": zero}}
    with cluster.daemons(nodes) as running:
        world = nodes * per_node
        return world, cluster.run("workers:train_small", running, world, runs=runs,
                                  metrics=[node.metrics for node in running])


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_pytorch(name, results):
    world, ranks = results
    losses, norms, weights = plain(CASES[name][1], STEPS, clip=CLIP, world=world)
    result = ranks[0][f"{name}-{STAGES[0]}"]
    # The iteration magnifies what rounding does to a matrix's small singular values.
    loose = 20 if name.startswith("muon") else 1
    assert result["losses"] == pytest.approx(losses, rel=1e-5 * loose)
    assert result["norms"] == pytest.approx(norms, rel=1e-5 * loose)
    for parameter, value in weights.items():
        torch.testing.assert_close(result["state"][parameter], value, rtol=1e-4, atol=2e-6 * loose)


@pytest.mark.parametrize("name", CASES)
def test_stages_have_the_same_bits(name, results):
    _, ranks = results
    first = ranks[0][f"{name}-{STAGES[0]}"]["state"]
    for rank in ranks:
        for stage in STAGES:
            for parameter, value in rank[f"{name}-{stage}"]["state"].items():
                assert torch.equal(value, first[parameter]), (stage, parameter)


def test_the_ratios_are_not_all_alike():
    """Else these tests would pass for what has no norms."""
    made = []
    for name in ("lamb", "lamb-bounded"):
        make = CASES[name][1]
        plain(lambda p, make=make: made.append(make(p)) or made[-1], STEPS, clip=CLIP)
    assert len({round(ratio, 3) for ratio in made[0].ratios}) > 10
    assert {0.5} < set(made[1].ratios)
