"""The adversarial losses and penalties: the method's whole mathematics, as pure functions.

Logits are float [n]; images are float [n, 1, 28, 28]. Each function returns a scalar, the mean
over the batch, unless it says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gan.config import Loss


def discriminator_loss(loss: Loss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises.

    `logistic`: binary cross-entropy on reals as 1 plus on fakes as 0: the SUM of the two, not their
    mean (Goodfellow et al. 2014, equation 1). `relativistic`: each real is to score above the fake
    it is paired with (Jolicoeur-Martineau 2019; R3GAN, Huang et al. 2024, section 2.1).
    """
    if loss == "logistic":
        return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    return F.softplus(fake_logits - real_logits).mean()


def generator_loss(loss: Loss, real_logits: Tensor | None, fake_logits: Tensor) -> Tensor:
    """What the generator minimises; only `relativistic` looks at the reals' logits.

    `logistic`: the non-saturating form, cross-entropy on fakes as 1 (Goodfellow et al. 2014,
    section 3). `relativistic`: each fake is to score above its real.
    """
    if loss == "logistic":
        return F.softplus(-fake_logits).mean()
    assert real_logits is not None
    return F.softplus(real_logits - fake_logits).mean()


def squared_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of each logit's gradient at its image: float [n], differentiable.

    Its mean times gamma / 2 is the R1 penalty where the images are real and the R2 penalty where
    they are fakes (Mescheder et al. 2018, equations 9 and 10). `images` must require gradients,
    and each logit must depend on its own image alone.
    """
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients.square().flatten(1).sum(1)
