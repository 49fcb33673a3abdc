"""A small fixed-point model cut into stages, run by one process or by the schedule: the same sums in the same order.

F has norms, tanh and a mixing of tokens, weights differ from problem to problem, and microbatches differ in scale, so
that solves take from a few evaluations to all of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.comm.channel import TensorSpec
from megatron_implicit.config import SolverConfig
from megatron_implicit.schedules import Kind, Limits, Message, Outcome, StepPlan
from megatron_implicit.schedules.tape import StageTape
from megatron_implicit.solver import FixedPointSolve, SolveSettings, Step, drive

LENGTH, BATCH, WIDTH, VOCABULARY, LAYERS = 6, 2, 8, 13, 3

Parameters = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def layer(p: Parameters, index: int, h: Tensor, u: Tensor) -> Tensor:
    """A residual layer on [s, b, h] that mixes a token with the one before it."""
    y = rms(h, p[f"{index}.norm"]) @ p[f"{index}.in"] + u
    return h + torch.tanh(y + 0.5 * y.roll(1, 0)) @ p[f"{index}.out"]


@dataclass(frozen=True)
class Problem:
    """Everything that defines a step; the same wherever it runs."""

    seed: int
    plan: StepPlan
    settings: SolveSettings
    broken: int = -1
    """A microbatch whose embedding is NaN."""

    @classmethod
    def random(cls, seed: int, stages: int) -> "Problem":
        """Any limits, numbers of passes and solver."""
        choose = random.Random(seed)
        block, steps = choose.choice([1, 2, 4]), choose.choice([1, 2, 3])
        solver = SolverConfig(
            max_iterations=choose.choice([2, 5, 9]), tolerance=choose.choice([0.0, 0.05, 0.05]), phantom_steps=steps,
            phantom_damping=choose.choice([0.8, 1.0]), gradient=choose.choice(["phantom"] * 4 + ["unrolled"]),
        )  # fmt: skip
        unrolled = solver.gradient == "unrolled"
        limits = Limits(choose.choice([1, 2, 4]), block + choose.choice([0, 1, 4]), block)
        passes = solver.max_iterations if unrolled else steps
        plan = StepPlan(stages, choose.choice([3, 4, 6]), passes, limits, unrolled)
        return cls(seed, plan, SolveSettings.training(solver))

    def parameters(self) -> Parameters:
        """Of the whole model."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        scale = (0.2 + 0.5 * float(torch.rand((), generator=generator))) * WIDTH**-0.5
        p = {"embedding": normal(VOCABULARY, WIDTH), "injection_norm": torch.ones(WIDTH)}
        p |= {"injection": normal(WIDTH, WIDTH) * WIDTH**-0.5, "final_norm": torch.ones(WIDTH)}
        for index in range(LAYERS):
            p |= {f"{index}.norm": torch.ones(WIDTH), f"{index}.in": normal(WIDTH, WIDTH) * scale}
            p[f"{index}.out"] = normal(WIDTH, WIDTH) * scale
        return p

    def batch(self, microbatch: int) -> tuple[Tensor, Tensor, float]:
        """Tokens and labels, [s, b], and the scale of their embedding."""
        generator = torch.Generator().manual_seed(1000 * self.seed + microbatch)
        tokens = torch.randint(VOCABULARY, (LENGTH + 1, BATCH), generator=generator)
        scale = float("nan") if microbatch == self.broken else 0.2 + 2 * float(torch.rand((), generator=generator))
        return tokens[:-1], tokens[1:], scale


class ToyStage:
    """``StageModel``: parameters of one stage; the injection is replicated, the embedding tied to the head."""

    iterate = embedding = TensorSpec((LENGTH, BATCH, WIDTH), torch.float32)

    def __init__(self, problem: Problem, stage: int) -> None:
        stages = problem.plan.stages
        bounds = [index * LAYERS // stages for index in range(stages + 1)]
        self.problem, self.is_last = problem, stage == stages - 1
        self.layers = range(bounds[stage], bounds[stage + 1])
        names = ["injection", *(f"{index}.{name}" for index in self.layers for name in ("norm", "in", "out"))]
        names += ["injection_norm", "embedding"] if stage == 0 else []
        names += ["final_norm", "embedding"] if self.is_last else []
        whole = problem.parameters()
        self.p = {name: whole[name].clone().requires_grad_() for name in names}

    def embed(self, microbatch: int) -> Tensor:
        return embed(self.p, self.problem, microbatch)

    def inject(self, x: Tensor) -> Tensor:
        return x @ self.p["injection"]

    def evaluate(self, h: Tensor, u: Tensor) -> Tensor:
        for index in self.layers:
            h = layer(self.p, index, h, u)
        return rms(h, self.p["final_norm"]) if self.is_last else h

    def start(self, microbatch: int) -> FixedPointSolve:
        return FixedPointSolve(self.problem.settings, torch.zeros(self.iterate.shape))

    def loss(self, microbatch: int, z: Tensor, solve: FixedPointSolve) -> tuple[Tensor, Any]:
        loss = head(self.p, self.problem, microbatch, z)
        return loss, (float(loss.detach()), int(solve.trace().evaluations.max()))

    def finish(self) -> None:
        pass

    def gradients(self) -> Parameters:
        """By name."""
        return {name: value.grad for name, value in self.p.items() if value.grad is not None}


def embed(p: Parameters, problem: Problem, microbatch: int) -> Tensor:
    """x of a microbatch."""
    tokens, _, scale = problem.batch(microbatch)
    return rms(p["embedding"][tokens] * scale, p["injection_norm"]) * min(scale, 1.0)


def head(p: Parameters, problem: Problem, microbatch: int, z: Tensor) -> Tensor:
    """Its share of the step's loss."""
    labels = problem.batch(microbatch)[1]
    return F.cross_entropy((z @ p["embedding"].T).flatten(0, 1), labels.flatten()) / problem.plan.microbatches


@dataclass
class Result:
    """What a step gave."""

    reports: list[tuple[float, int]] = field(default_factory=list)
    """Loss and evaluations by microbatch."""
    gradients: Parameters = field(default_factory=dict)
    """Of the whole model; replicas added in order of stages."""

    def equals(self, other: "Result") -> bool:
        """Bit for bit."""
        return self.reports == other.reports and all(
            torch.equal(self.gradients[name], value) for name, value in other.gradients.items()
        )


def combine(parts: list[tuple[list[Any], Parameters]]) -> Result:
    """The stages' reports and gradients in order of stages."""
    result = Result(parts[-1][0])
    for _, gradients in parts:
        for name, value in gradients.items():
            result.gradients[name] = result.gradients[name] + value if name in result.gradients else value
    return result


def without_schedule(problem: Problem) -> Result:
    """All stages in this process, microbatch by microbatch, their backward passes in the static order."""
    plan, stages = problem.plan, [ToyStage(problem, stage) for stage in range(problem.plan.stages)]
    tapes = [StageTape(plan, stage, model) for stage, model in enumerate(stages)]
    for microbatch in range(plan.microbatches):
        message, payload = Message(plan.first_kind, microbatch, 0), tapes[0].admit(microbatch)
        while True:
            outcome = Outcome()
            for tape in tapes:
                outcome = tape.forward(message, payload)
                payload = outcome.tensors
            if outcome.step is Step.DONE:
                break
            again = message.kind is Kind.PHANTOM or outcome.step is Step.SOLVE
            message = Message(Kind[outcome.step.name], microbatch, message.evaluation + 1 if again else 0)
    gradients: dict[int, list[Tensor]] = {}
    for message in plan.backward_order:
        payload = gradients.get(message.microbatch, [])
        for tape in reversed(tapes):
            payload = tape.backward(message, payload).tensors
        gradients[message.microbatch] = payload
    return combine([(tape.finish(), stage.gradients()) for tape, stage in zip(tapes, stages)])


def textbook(problem: Problem) -> Result:
    """One autograd graph a microbatch, nothing cut: equal to rounding."""
    p, result = {name: value.requires_grad_() for name, value in problem.parameters().items()}, Result()
    for microbatch in range(problem.plan.microbatches):
        u = embed(p, problem, microbatch) @ p["injection"]

        def evaluate(z: Tensor, step: Step) -> Tensor:
            for index in range(LAYERS):
                z = layer(p, index, z, u)
            return rms(z, p["final_norm"])

        solve = FixedPointSolve(problem.settings, torch.zeros(ToyStage.iterate.shape))
        loss = head(p, problem, microbatch, drive(solve, evaluate))
        loss.backward()
        result.reports.append((float(loss.detach()), int(solve.trace().evaluations.max())))
    result.gradients = {name: value.grad for name, value in p.items()}
    return result
