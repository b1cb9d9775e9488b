"""Sums and gradients in closed form: those of the losses that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.recover import fused
from stages.recover.fused import summed_losses
from stages.recover.loss import Teacher, distillation, teacher_of
from tests.tiny import PROPERTY


def case(seed: int, rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher, labels, and which positions are real."""
    source = torch.Generator().manual_seed(seed)
    student, said = 3 * torch.randn(2, rows, tokens, generator=source)
    labels = torch.randint(tokens, (rows,), generator=source)
    return student, said, labels, torch.rand(rows, generator=source) < 0.7


def gradient(student: Tensor, weights: tuple[float, float], sums: tuple[Tensor, Tensor]) -> Tensor:
    (weights[0] * sums[0] + weights[1] * sums[1]).backward()
    found = student.grad
    assert found is not None
    student.grad = None
    return found


@PROPERTY
@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(2, 12),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.none() | st.integers(1, 12),
    st.integers(1, 40),
)
def test_sums_and_gradients_are_those_of_autograd(
    seed: int, rows: int, tokens: int, temperature: float, top: int | None, part: int
) -> None:
    student, said, labels, real = case(seed, rows, tokens)
    student.requires_grad_()
    teacher = teacher_of(said[real], temperature, top)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_PART", part)  # one row at a time, several, or all
        found = summed_losses(student, labels, real, teacher, temperature)
        ours = gradient(student, (0.3, 0.7), found)
    expected = (
        F.cross_entropy(student[real], labels[real], reduction="sum"),
        distillation(student[real], teacher, temperature).sum(),
    )
    assert torch.allclose(torch.stack(found), torch.stack(expected), atol=1e-4, rtol=1e-5)
    assert torch.allclose(ours, gradient(student, (0.3, 0.7), expected), atol=1e-5, rtol=1e-4)
    assert not ours[~real].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_a_teacher_it_is_the_cross_entropy(temperature: float) -> None:
    student, _, labels, real = case(0, 7, 5)
    student.requires_grad_()
    likelihood, nothing = summed_losses(student, labels, real, None, temperature)
    assert nothing.item() == 0
    expected = F.cross_entropy(student[real], labels[real], reduction="sum")
    ours = gradient(student, (1.0, 1.0), (likelihood, nothing))
    assert torch.allclose(likelihood, expected)
    assert torch.allclose(ours, gradient(student, (1.0, 0.0), (expected, expected)), atol=1e-6)


def test_a_student_that_leaves_nothing_over_has_a_finite_gradient() -> None:
    """Named tokens hold all of the student's mass in fp32 and half of the teacher's."""
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    half = torch.tensor([[0.5]]).log()
    teacher = Teacher(torch.zeros(1, 1, dtype=torch.int64), half, half[0])
    label, real = torch.zeros(1, dtype=torch.int64), torch.ones(1).bool()
    sums = summed_losses(student, label, real, teacher, 1.0)
    found = gradient(student, (1.0, 1.0), sums)
    # One half is missing at the second token, which is all of the rest.
    assert torch.allclose(found, torch.tensor([[0.5, -0.5, 0.0]]), atol=1e-6)
