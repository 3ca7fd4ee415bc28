"""Dense references of the losses on logits: whole distributions in float64, by the plain definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_assets.student.losses import (
    cross_entropy_loss,
    importance_sampled_response_loss,
    jensen_shannon_loss,
    renormalised_response_loss,
    response_loss,
    rest_to_target_loss,
    reverse_response_loss,
    sampled_response_loss,
)

VOCABULARY = 11
DRAWS = 6


@dataclass(frozen=True)
class Case:
    """A teacher, a student and what a cache has of the teacher; [B, T] = [2, 5] positions."""

    student: Tensor
    teacher: Tensor
    k: int
    mask: Tensor
    targets: Tensor
    sampled_ids: Tensor
    sampled_counts: Tensor

    @classmethod
    def random(cls, k: int, *, spread: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
        generator = torch.Generator().manual_seed(seed)
        student = torch.randn(2, 5, VOCABULARY, generator=generator, dtype=torch.float64) * spread
        teacher = torch.randn(2, 5, VOCABULARY, generator=generator, dtype=torch.float64) * spread
        mask = torch.rand(2, 5, generator=generator) < 0.6
        drawn = torch.randint(0, VOCABULARY, (2, 5, DRAWS), generator=generator)
        ids = torch.zeros_like(drawn)
        counts = torch.zeros_like(drawn)
        for b in range(2):
            for t in range(5):  # the different ids first, then padding of id 0 and count 0, as the dataset has it
                different, n = torch.unique(drawn[b, t], return_counts=True)
                ids[b, t, : len(different)], counts[b, t, : len(n)] = different, n
        targets = torch.randint(0, VOCABULARY, (2, 5), generator=generator)
        return cls(student.to(dtype), teacher, k, mask, targets, ids, counts)

    @property
    def top(self) -> tuple[Tensor, Tensor]:
        values, ids = self.teacher.log_softmax(-1).topk(self.k)
        return ids, values


Loss = Callable[[Case, Tensor], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Of probabilities, a row each."""
    terms: Tensor = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return terms.sum(-1)


def softened(p: Tensor, temperature: float) -> Tensor:
    power = p ** (1 / temperature)
    return power / power.sum(-1, keepdim=True)


def in_bucket(p: Tensor, case: Case) -> Tensor:
    """The masses of the k ids and of all others, each id looked up by itself."""
    kept = torch.stack([p[..., i] for i in range(VOCABULARY)], -1).gather(-1, case.top[0])
    if case.k == VOCABULARY:
        return kept
    outside = torch.ones_like(p).scatter(-1, case.top[0], 0.0)
    return torch.cat([kept, (p * outside).sum(-1, keepdim=True)], -1)


def given_kept(p: Tensor, case: Case) -> Tensor:
    kept = p.gather(-1, case.top[0])
    return kept / kept.sum(-1, keepdim=True)


def both(cut: Callable[[Tensor, Case], Tensor], case: Case, student: Tensor, t: float) -> tuple[Tensor, Tensor]:
    return softened(cut(case.teacher.softmax(-1), case), t), softened(cut(student.softmax(-1), case), t)


def dense_jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def dense_renormalised(case: Case, student: Tensor, t: float) -> Tensor:
    p = torch.zeros_like(case.teacher).scatter(-1, case.top[0], given_kept(case.teacher.softmax(-1), case))
    return t**2 * kl(softened(p, t), (student / t).softmax(-1))


def dense_rest_to_target(case: Case, student: Tensor, t: float) -> Tensor:
    kept = case.teacher.softmax(-1).gather(-1, case.top[0])
    p = torch.zeros_like(case.teacher).scatter(-1, case.top[0], kept)
    p = p.scatter_add(-1, case.targets[..., None], 1 - kept.sum(-1, keepdim=True))
    return t**2 * kl(softened(p, t), (student / t).softmax(-1))


def dense_sampled(case: Case, student: Tensor, exponent: float) -> Tensor:
    shares = torch.zeros_like(case.teacher).scatter_add(-1, case.sampled_ids, case.sampled_counts.double())
    teacher = case.teacher.softmax(-1)
    proposal = softened(teacher, 1 / exponent)
    weights = shares * teacher / proposal
    return kl(weights / weights.sum(-1, keepdim=True), student.softmax(-1))


def drawn_logprobs(case: Case) -> Tensor:
    """With no number at all where there is padding."""
    found = case.teacher.log_softmax(-1).gather(-1, case.sampled_ids)
    return found.masked_fill(case.sampled_counts == 0, math.nan)


def pairs(t: float) -> dict[str, tuple[Loss, Loss]]:
    """Name → the loss, and the dense reference of every position."""
    found: dict[str, tuple[Loss, Loss]] = {
        "renormalised": (
            lambda c, s: renormalised_response_loss(s, *c.top, c.mask, temperature=t),
            lambda c, s: dense_renormalised(c, s, t),
        ),
        "rest to target": (
            lambda c, s: rest_to_target_loss(s, *c.top, c.targets, c.mask, temperature=t),
            lambda c, s: dense_rest_to_target(c, s, t),
        ),
        "cross-entropy": (
            lambda c, s: cross_entropy_loss(s, c.targets, c.mask),
            lambda c, s: -s.softmax(-1).log().gather(-1, c.targets[..., None])[..., 0],
        ),
        "draws": (
            lambda c, s: sampled_response_loss(s, c.sampled_ids, c.sampled_counts, c.mask),
            lambda c, s: dense_sampled(c, s, 1.0),
        ),
        "draws of a flatter proposal": (
            lambda c, s: importance_sampled_response_loss(
                s, c.sampled_ids, c.sampled_counts, drawn_logprobs(c), c.mask, exponent=0.6
            ),
            lambda c, s: dense_sampled(c, s, 0.6),
        ),
    }
    found["forward, bucket"] = (
        lambda c, s: response_loss(s, *c.top, c.mask, temperature=t),
        lambda c, s: t**2 * kl(*both(in_bucket, c, s, t)),
    )
    found["forward, left out"] = (
        lambda c, s: response_loss(s, *c.top, c.mask, temperature=t, tail="left_out"),
        lambda c, s: t**2 * kl(*both(given_kept, c, s, t)),
    )
    found["reverse, bucket"] = (
        lambda c, s: reverse_response_loss(s, *c.top, c.mask, temperature=t),
        lambda c, s: t**2 * kl(*both(in_bucket, c, s, t)[::-1]),
    )
    found["reverse, left out"] = (
        lambda c, s: reverse_response_loss(s, *c.top, c.mask, temperature=t, tail="left_out"),
        lambda c, s: t**2 * kl(*both(given_kept, c, s, t)[::-1]),
    )
    found["Jensen-Shannon, bucket"] = (
        lambda c, s: jensen_shannon_loss(s, *c.top, c.mask, beta=0.3, temperature=t),
        lambda c, s: t**2 * dense_jensen_shannon(*both(in_bucket, c, s, t), beta=0.3),
    )
    found["Jensen-Shannon, left out"] = (
        lambda c, s: jensen_shannon_loss(s, *c.top, c.mask, beta=0.3, temperature=t, tail="left_out"),
        lambda c, s: t**2 * dense_jensen_shannon(*both(given_kept, c, s, t), beta=0.3),
    )
    return found


NAMES = list(pairs(1.0))


def value_and_gradient(of: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = of(student)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def found_and_expected(name: str, case: Case, t: float = 1.0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value and gradient of the loss, and of the mean of the dense reference over the mask, in float64."""
    loss, dense = pairs(t)[name]
    expected = value_and_gradient(lambda s: dense(case, s)[case.mask].mean(), case.student.double())
    return value_and_gradient(lambda s: loss(case, s), case.student), expected
