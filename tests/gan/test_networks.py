import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gan.config import ConvConfig, MlpConfig
from gan.networks import (
    ConvDiscriminator,
    ConvGenerator,
    Dropout,
    MlpDiscriminator,
    MlpGenerator,
    build_discriminator,
    build_generator,
)

FINE = ConvConfig(latent_dim=3, width=2, fine_layers=2)
INKED = ConvConfig(latent_dim=3, width=2, dots=2)
PAIRS = [MlpConfig(), ConvConfig(), ConvConfig(latent_dim=3, width=1), FINE, INKED]


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def linear_sizes(network: nn.Module) -> list[tuple[int, int]]:
    return [
        (layer.in_features, layer.out_features)
        for layer in network.modules()
        if isinstance(layer, nn.Linear)
    ]


def dropout(p: float, seed: int = 0) -> Dropout:
    return Dropout(p, torch.Generator().manual_seed(seed)).train()


def test_the_vanilla_pair_has_the_published_layers() -> None:
    generator = MlpGenerator(MlpConfig())
    discriminator = MlpDiscriminator(MlpConfig(), torch.Generator())
    assert linear_sizes(generator) == [(100, 256), (256, 512), (512, 1024), (1024, 784)]
    assert linear_sizes(discriminator) == [(784, 1024), (1024, 512), (512, 256), (256, 1)]
    assert num_parameters(generator) == 1_486_352
    assert num_parameters(discriminator) == 1_460_225

    between = [nn.Linear, nn.LeakyReLU] * 3
    assert [type(layer) for layer in generator.layers] == [*between, nn.Linear, nn.Tanh]
    between = [nn.Linear, nn.LeakyReLU, Dropout] * 3
    assert [type(layer) for layer in discriminator.layers] == [*between, nn.Linear]
    for layer in [*generator.modules(), *discriminator.modules()]:
        if isinstance(layer, nn.LeakyReLU):
            assert layer.negative_slope == 0.2
        if isinstance(layer, Dropout):
            assert layer.threshold / 65536 == pytest.approx(0.3, abs=1 / 65536)


@pytest.mark.parametrize("config", PAIRS)
def test_images_and_scores_have_their_shapes_and_ranges(config: MlpConfig | ConvConfig) -> None:
    torch.manual_seed(0)
    generator = build_generator(config)
    discriminator = build_discriminator(config, torch.Generator())
    digits = torch.arange(5) if config.num_classes else None
    noise = torch.randn(5, config.latent_dim) * 100
    images = generator(noise, digits)
    assert images.shape == (5, 1, config.side, config.side)
    scores = discriminator(images, digits)
    assert scores.shape == (5,)
    assert scores.isfinite().all()
    sheets = generator.eval()(noise, digits)
    assert sheets.shape == (5, 1, 28, 28)
    for drawn in (images, sheets):
        assert drawn.dtype == torch.float32
        assert drawn.abs().max() <= 1


def test_each_config_builds_its_pair() -> None:
    assert isinstance(build_generator(MlpConfig()), MlpGenerator)
    assert isinstance(build_discriminator(MlpConfig(), torch.Generator()), MlpDiscriminator)
    assert isinstance(build_generator(ConvConfig()), ConvGenerator)
    assert isinstance(build_discriminator(ConvConfig(), torch.Generator()), ConvDiscriminator)


def test_the_digit_matters_to_the_conditional_pair() -> None:
    torch.manual_seed(0)
    config = ConvConfig(latent_dim=4, width=2)
    generator = build_generator(config).eval()
    discriminator = build_discriminator(config, torch.Generator())
    noise, digits = torch.randn(1, 4).expand(10, -1), torch.arange(10)
    images = generator(noise, digits)
    assert len(torch.unique(images.flatten(1), dim=0)) == 10
    scores = discriminator(images[:1].expand(10, -1, -1, -1), digits)
    assert len(torch.unique(scores)) == 10


def layers(network: nn.Module) -> list[str]:
    return [type(m).__name__ for m in network.modules() if not list(m.children())]


def test_fine_layers_are_all_that_they_change() -> None:
    plain = ConvConfig(latent_dim=3, width=2)
    generator, discriminator = ConvGenerator(FINE), ConvDiscriminator(FINE)
    convolution = ["Conv2d", "BatchNorm", "ReLU"]
    assert layers(generator) == [*layers(ConvGenerator(plain))[:-1], *convolution * 2, "Conv2d"]
    assert layers(discriminator) == ["Conv2d", "LeakyReLU"] * 2 + layers(ConvDiscriminator(plain))
    full_size = [
        (layer.in_channels, layer.out_channels)
        for network in (generator, discriminator)
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1) and layer.out_channels < 8
    ]
    assert full_size == [(2, 2), (2, 2), (2, 1), (1, 2), (2, 2)]


def test_ink_is_scanned_and_laid() -> None:
    plain = ConvConfig(latent_dim=3, width=2)
    generator = ConvGenerator(INKED)
    assert layers(generator) == [*layers(ConvGenerator(plain)), "Scan", "Centring"]
    noise, digits = torch.randn(4, 3), torch.arange(4)
    box, sheet = generator.train()(noise, digits), generator.eval()(noise, digits)
    assert box.shape == (4, 1, 20, 20)
    assert sheet.shape == (4, 1, 28, 28)
    for images in (box, sheet):
        levels = (images + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", PAIRS)
def test_a_score_depends_on_its_own_image_alone(config: MlpConfig | ConvConfig) -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(config, torch.Generator()).train()
    images = torch.randn(4, 1, config.side, config.side, requires_grad=True)
    discriminator(images, torch.arange(4))[2].backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).tolist() == [False, False, True, False]


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    units = torch.ones(1000, 1000)
    for p in (0.1, 0.3, 0.9):
        dropped = dropout(p)(units)
        spread = (p * (1 - p) / 1e6) ** 0.5
        assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=5 * spread)
        assert dropped.double().mean().item() == pytest.approx(1, abs=5 * spread / (1 - p))
        kept = dropped[dropped != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-3, atol=0)


def test_dropout_decides_for_each_unit_alone() -> None:
    # Four units share one 64-bit word: no two of the four may go together.
    dropped = (dropout(0.5)(torch.ones(250_000, 4)) == 0).double()
    correlations = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlations.abs().max() < 5 / 500


@pytest.mark.parametrize("size", range(10))
def test_dropout_takes_any_number_of_units(size: int) -> None:
    assert dropout(0.5)(torch.ones(size)).shape == (size,)


def test_dropout_at_its_edges() -> None:
    units = torch.randn(1000)
    assert dropout(0.0)(units) is units
    assert dropout(0.3).eval()(units) is units
    assert dropout(1 - 1e-12)(units).isfinite().all()


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
@example(0, 2**32)
def test_dropout_draws_from_its_own_generator_alone(seed: int, other: int) -> None:
    units = torch.ones(256)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    first = dropout(0.5, seed)(units)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(other)
    assert torch.equal(dropout(0.5, seed)(units), first)
    # torch's generator on a CPU, a Mersenne twister, takes the lower 32 bits of a seed.
    same = seed % 2**32 == other % 2**32
    assert torch.equal(dropout(0.5, other)(units), first) == same


def test_dropout_passes_the_gradient_where_it_passed_the_unit() -> None:
    units = torch.ones(1000, requires_grad=True)
    dropped = dropout(0.3)(units)
    dropped.sum().backward()
    assert units.grad is not None
    torch.testing.assert_close(units.grad, dropped)


def test_two_dropouts_of_one_generator_differ() -> None:
    rng = torch.Generator().manual_seed(0)
    units: Tensor = torch.ones(256)
    first, second = (Dropout(0.5, rng).train()(units) for _ in range(2))
    assert not torch.equal(first, second)
