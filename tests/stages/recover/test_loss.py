"""The recovery loss: zero where both agree, a lower bound where the teacher was cut short."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stages.recover.loss import distillation, paper_loss, recovery_loss, teacher_of
from tests.tiny import PROPERTY

SIZES = st.tuples(st.integers(1, 6), st.integers(2, 12))
SEEDS, TEMPERATURES = st.integers(0, 99), st.sampled_from([0.5, 1.0, 2.0, 4.0])


def logits(size: tuple[int, int], seed: int) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@PROPERTY
@given(SIZES, SEEDS, TEMPERATURES, st.integers(1, 12))
def test_a_student_that_says_the_same_has_no_loss_and_no_gradient(
    size: tuple[int, int], seed: int, temperature: float, top: int
) -> None:
    said = logits(size, seed)
    student = said.clone().requires_grad_()
    loss = distillation(student, teacher_of(said, temperature, top), temperature).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-5


@PROPERTY
@given(SIZES, SEEDS, TEMPERATURES)
def test_all_tokens_give_the_textbook_divergence_in_its_direction(
    size: tuple[int, int], seed: int, temperature: float
) -> None:
    said, student = logits(size, seed), logits(size, seed + 1)
    p = (said.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    found = distillation(student, teacher_of(said, temperature), temperature)
    assert torch.allclose(found.double(), expected, atol=1e-4, rtol=1e-4)


@PROPERTY
@given(SIZES, SEEDS, TEMPERATURES)
def test_fewer_named_tokens_give_less_and_never_below_zero(
    size: tuple[int, int], seed: int, temperature: float
) -> None:
    said, student = logits(size, seed), logits(size, seed + 1)
    found = torch.stack(
        [
            distillation(student, teacher_of(said, temperature, top), temperature)
            for top in range(1, size[1] + 1)
        ]
    )
    assert bool((found >= -1e-5).all())
    assert bool((found.diff(dim=0) >= -1e-4).all())


@PROPERTY
@given(SIZES, SEEDS)
def test_a_position_more_of_the_same_changes_no_mean(size: tuple[int, int], seed: int) -> None:
    said, student = logits(size, seed), logits(size, seed + 1)
    labels = said.argmax(-1)
    losses = [
        recovery_loss(
            student.repeat(times, 1),
            labels.repeat(times),
            teacher_of(said.repeat(times, 1), 2.0),
            alpha=0.2,
            temperature=2.0,
        )[0]
        for times in (1, 3)
    ]
    assert torch.allclose(*losses, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    said, student = logits((3, 7), 1).double(), logits((3, 7), 2).double().requires_grad_()
    teacher = teacher_of(said, 2.0, 4)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return distillation(values, teacher, 2.0).sum()

    (found,) = torch.autograd.grad(loss(student), student)
    step, place = 1e-2, (1, 3)
    moved = [student.detach().clone() for _ in range(2)]
    moved[0][place] += step
    moved[1][place] -= step
    slope = (loss(moved[0]) - loss(moved[1])) / (2 * step)
    assert float(found[place]) == pytest.approx(float(slope), rel=1e-2, abs=1e-4)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    student, labels = logits((4, 9), 3), torch.tensor([0, 3, 8, 1])
    loss, parts = recovery_loss(student, labels, None, alpha=0.2, temperature=2.0)
    assert torch.equal(loss, F.cross_entropy(student, labels))
    assert parts.tolist() == [float(loss), 0.0]


def test_the_papers_scaling_grows_with_the_length_of_a_sequence_and_ours_does_not() -> None:
    said, student = (logits((4, 9), seed).view(1, 4, 9) for seed in (1, 2))
    labels = torch.full((1, 4), -100)
    labels[0, 0] = 3
    once = paper_loss(student, said, labels, alpha=1.0, temperature=1.0)
    none = paper_loss(student, said, labels, alpha=0.0, temperature=1.0)
    mean = distillation(student[0], teacher_of(said[0], 1.0), 1.0).mean()
    assert float(once - none) == pytest.approx(4 * float(mean), rel=1e-4)
