import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gan.config import ConvConfig, Loss
from gan.losses import discriminator_loss, generator_loss, squared_gradients
from gan.networks import build_discriminator

LOSSES: tuple[Loss, Loss] = ("logistic", "relativistic")


def as_logit(probability: float) -> Tensor:
    return torch.tensor([probability]).logit()


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Real and fake logits, as many of each."""
    pairs = draw(st.lists(st.tuples(*[st.floats(-20, 20)] * 2), min_size=1, max_size=5))
    real, fake = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return real, fake


def test_logistic_losses_by_hand() -> None:
    real, fake = as_logit(0.8), as_logit(0.4)
    d_loss = discriminator_loss("logistic", real, fake)
    assert d_loss.item() == pytest.approx(-math.log(0.8) - math.log(0.6))
    assert generator_loss("logistic", None, fake).item() == pytest.approx(-math.log(0.4))


def test_relativistic_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    d_loss = discriminator_loss("relativistic", real, fake)
    assert d_loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2)
    g_loss = generator_loss("relativistic", real, fake)
    assert g_loss.item() == pytest.approx((math.log1p(math.exp(1)) + math.log1p(math.exp(-3))) / 2)


@given(logit_pairs())
def test_the_logistic_loss_is_the_sum_of_two_cross_entropies(pair: tuple[Tensor, Tensor]) -> None:
    real, fake = pair
    p_real, p_fake = real.sigmoid(), fake.sigmoid()
    entropies = F.binary_cross_entropy(p_real, torch.ones_like(p_real)) + F.binary_cross_entropy(
        p_fake, torch.zeros_like(p_fake)
    )
    torch.testing.assert_close(discriminator_loss("logistic", real, fake), entropies)
    torch.testing.assert_close(
        generator_loss("logistic", None, fake),
        F.binary_cross_entropy(p_fake, torch.ones_like(p_fake)),
    )


@given(logit_pairs(), st.floats(-5, 5))
def test_the_relativistic_loss_sees_only_differences_and_changes_sides(
    pair: tuple[Tensor, Tensor], shift: float
) -> None:
    real, fake = pair
    d_loss = discriminator_loss("relativistic", real, fake)
    g_loss = generator_loss("relativistic", real, fake)
    torch.testing.assert_close(
        discriminator_loss("relativistic", real + shift, fake + shift), d_loss
    )
    torch.testing.assert_close(g_loss, discriminator_loss("relativistic", fake, real))
    torch.testing.assert_close(d_loss - g_loss, (fake - real).mean())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30])
def test_huge_logits_stay_finite(loss: Loss, size: float) -> None:
    real, fake = torch.full((2,), size).requires_grad_(), torch.full((2,), -size).requires_grad_()
    for value in (discriminator_loss(loss, real, fake), generator_loss(loss, real, fake)):
        assert value.isfinite()
        for gradient in torch.autograd.grad(value, [real, fake], allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_generator_that_fools_nobody_still_gets_a_full_gradient(loss: Loss) -> None:
    real, fake = torch.full((4,), 50.0), torch.full((4,), -50.0).requires_grad_()
    (gradient,) = torch.autograd.grad(generator_loss(loss, real, fake), fake)
    torch.testing.assert_close(gradient, torch.full((4,), -1 / 4))


def test_squared_gradients_of_a_linear_discriminator() -> None:
    weight = torch.randn(28 * 28, dtype=torch.float64, requires_grad=True)
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    values = squared_gradients(images.flatten(1) @ weight, images)
    torch.testing.assert_close(values, weight.square().sum().expand(3))
    (second,) = torch.autograd.grad(values.mean(), weight)
    torch.testing.assert_close(second, 2 * weight)


def test_squared_gradients_of_a_quadratic_discriminator() -> None:
    curvature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    squares = images.square().flatten(1).sum(1)
    values = squared_gradients(curvature / 2 * squares, images)
    torch.testing.assert_close(values, curvature**2 * squares)
    (second,) = torch.autograd.grad(values.sum(), curvature)
    torch.testing.assert_close(second, 2 * curvature * squares.sum())


def test_squared_gradients_of_a_real_discriminator_are_its_slopes() -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(ConvConfig(width=2), torch.Generator()).double()
    images = torch.randn(4, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    digits = torch.arange(4)
    values = squared_gradients(discriminator(images, digits), images)

    (gradients,) = torch.autograd.grad(discriminator(images, digits).sum(), images)
    steepest = F.normalize(gradients.flatten(1)).view_as(images) * 1e-6
    with torch.no_grad():
        rise = discriminator(images + steepest, digits) - discriminator(images - steepest, digits)
    torch.testing.assert_close(values, (rise / 2e-6).square(), rtol=1e-4, atol=0)

    weights = discriminator.get_parameter("features.0.weight")
    (second,) = torch.autograd.grad(values.mean(), weights)
    assert second.abs().max() > 0
