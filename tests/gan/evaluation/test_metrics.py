import math

import pytest
import torch
from torch import Tensor

from gan.evaluation import metrics
from gan.evaluation.metrics import (
    closeness,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    nearest_image_distances,
    squared_radii,
    support,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: list[float], root: list[list[float]], seed: int) -> Tensor:
    """Points whose sample mean is exactly `mean`, and covariance exactly `root @ root.T`."""
    points = normal(500, len(mean), seed=seed).double()
    points -= points.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(points.T.cov()), points.T, upper=False
    )
    return (torch.tensor(root).double() @ white).T + torch.tensor(mean).double()


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_frechet_distance_is_what_torchmetrics_gives() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class AsTheyAre(torch.nn.Identity):
        num_features = 6

    a, b = normal(300, 6, seed=1).relu(), 2 * normal(200, 6, seed=2).relu()
    b[:, 5] = 0  # a unit that never fires makes a covariance singular
    metric = FrechetInceptionDistance(AsTheyAre())
    metric.update(a.double(), real=False)
    metric.update(b.double(), real=True)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_of_gaussians_with_diagonal_covariances() -> None:
    a = gaussian([1.0, 2.0, 3.0], [[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]], seed=1)
    b = gaussian([1.0, 0.0, 6.0], [[4.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0]], seed=2)
    means = 2.0**2 + 3.0**2
    deviations = (1 - 4) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(means + deviations, rel=1e-9)


def test_frechet_distance_of_gaussians_whose_covariances_do_not_commute() -> None:
    a = gaussian([0.0, 0.0], [[2.0, 0.0], [1.0, 1.0]], seed=1)
    b = gaussian([0.0, 1.0], [[1.0, 0.0], [-1.0, 3.0]], seed=2)
    left, right = a.T.cov(), b.T.cov()
    # The trace of the root of a 2x2 matrix with positive eigenvalues.
    product = left @ right
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = 1 + float(left.trace() + right.trace()) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_a_symmetric_distance() -> None:
    a, b = normal(300, 16, seed=1), 2 * normal(200, 16, seed=2) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a + 3, a) == pytest.approx(16 * 3**2, rel=1e-5)


def test_frechet_distance_of_a_collapsed_set_is_finite() -> None:
    points = normal(300, 16)
    expected = float(points.mean(0).square().sum() + points.T.cov().trace())
    assert frechet_distance(torch.zeros(50, 16), points) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_its_definition() -> None:
    a, b = normal(7, 3, seed=1), normal(5, 3, seed=2) + 1

    def mean(x: Tensor, y: Tensor, *, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum((float(x[i] @ y[j]) / 3 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a, same=True) + mean(b, b, same=True) - 2 * mean(a, b, same=False)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert kernel_distance(b, a) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_of_equal_distributions_is_around_zero_whatever_the_number() -> None:
    distances = torch.tensor(
        [kernel_distance(normal(60, 8, seed=i), normal(90, 8, seed=100 + i)) for i in range(100)]
    )
    far = kernel_distance(normal(60, 8), normal(90, 8, seed=1) + 0.5)
    assert distances.mean().abs() < 3 * distances.std() / 10
    assert distances.min() < 0 < far
    assert far > distances.max()


def test_the_fifth_neighbour_on_a_line() -> None:
    radii = squared_radii(torch.arange(10.0)[:, None])
    assert radii.tolist() == pytest.approx([25, 16, 9, 9, 9, 9, 9, 9, 16, 25])


def test_support_on_a_line() -> None:
    real = torch.arange(10.0)[:, None]
    # Six of a kind lie at each other's feet: their own balls reach nowhere.
    inside = support(column(*[4.25] * 6, *[100.0] * 6), real)
    assert (inside.precision, inside.recall) == (0.5, 0.0)
    assert inside.density == pytest.approx(6 * 10 / (5 * 12))
    assert inside.coverage == 1.0
    # Only the ball around 0, of radius 5, reaches -3.5.
    aside = support(column(*[-3.5] * 6, *[100.0] * 6), real)
    assert (aside.precision, aside.recall) == (0.5, 0.0)
    assert aside.density == pytest.approx(6 * 1 / (5 * 12))
    assert aside.coverage == pytest.approx(0.1)
    # The widest ball, of 4.5 around 3.5, reaches all real points but 9.
    low = support(column(-1.0, 0.0, 1.0, 2.0, 3.0, 3.5), real)
    assert low.precision == 1.0
    assert low.recall == pytest.approx(0.9)


def test_support_of_a_set_on_itself_is_whole_and_far_away_is_none() -> None:
    points = normal(1200, 8)
    own, far = support(points, points), support(points + 100, points)
    assert (own.precision, own.recall, own.coverage) == (1, 1, 1)
    assert own.density == pytest.approx(1.2, abs=0.05)  # five others, on average, and itself
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_support_tells_lost_modes_from_invented_ones() -> None:
    real = torch.cat([normal(500, 4, seed=1), normal(500, 4, seed=2) + 10])
    lost = support(normal(1000, 4, seed=3), real)
    invented = support(torch.cat([real + 0.01, normal(1000, 4, seed=4) - 10]), real)
    assert lost.precision > 0.9
    assert lost.recall < 0.55
    assert lost.coverage < 0.55
    assert invented.precision < 0.55
    assert invented.recall > 0.9


def test_support_takes_known_radii() -> None:
    a, b = normal(600, 4, seed=1), normal(700, 4, seed=2)
    assert support(a, b, squared_radii(b)) == support(a, b)


def test_nearest_distances_are_those_of_all_pairs_and_a_copy_is_at_zero() -> None:
    queries, references = normal(1100, 20, seed=1), normal(2 * metrics.TILE + 1, 20, seed=2)
    queries[5], queries[6] = references[7], references[-1]
    nearest = nearest_distances(queries, references)
    torch.testing.assert_close(nearest, torch.cdist(queries, references).min(1).values)
    assert nearest[5] == nearest[6] == 0


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("num", [1, 17, 1100])
def test_nearest_images_are_those_of_all_pairs_and_a_copy_is_at_zero(
    bytewise: bool, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_multiplies_bytes", lambda device: bytewise)
    rng = torch.Generator().manual_seed(0)
    queries, references = (
        torch.randint(256, (size, 28, 28), generator=rng, dtype=torch.uint8)
        for size in (num, metrics.TILE + 1)
    )
    references[3], references[4] = 0, 255
    queries[0] = references[-1]
    found = nearest_image_distances(queries, references)
    points = [images.flatten(1).double() / 255 for images in (queries, references)]
    expected = torch.cdist(*points, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    torch.testing.assert_close(found, expected.float())
    assert found[0] == 0


def test_closeness_of_unseen_points_of_copies_and_of_a_few_copies() -> None:
    train, test, unseen = (normal(2000, 5, seed=seed) for seed in range(3))
    from_test = nearest_distances(test, train)
    fair = closeness(nearest_distances(unseen, train), from_test)
    assert fair.memorisation == pytest.approx(0.01, abs=0.01)
    assert fair.nearest == pytest.approx(1, abs=0.1)
    copied = closeness(nearest_distances(train, train), from_test)
    assert (copied.memorisation, copied.nearest) == (1, 0)
    few = torch.cat([unseen[:1900], train[:100]])
    assert closeness(nearest_distances(few, train), from_test).memorisation > 0.045
