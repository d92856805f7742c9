import math
from dataclasses import astuple, replace
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from gan.config import ConfigError, ConvConfig, TrainConfig
from gan.data import Split
from gan.networks import build_generator
from gan.recipes import quick, vanilla
from gan.sampling import draw, draw_sheet
from gan.training import (
    DivergenceError,
    TrainState,
    choose_device,
    learning_rate,
    name_device,
    train,
    update_average,
    uses_bfloat16,
)

CPU = torch.device("cpu")
VANILLA = replace(vanilla(), epochs=2, batch_size=4)
QUICK = replace(
    quick(),
    networks=ConvConfig(latent_dim=4, width=2, fine_layers=1, dots=2),
    epochs=2,
    batch_size=4,
    penalty_interval=2,
    ema_halflife_images=10,
    precision="float32",
)
UNAVERAGED = replace(QUICK, ema_halflife_images=0)


def noise_data(size: int = 14) -> Split:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 28, 28), generator=rng, dtype=torch.uint8)
    return Split(images=images, labels=torch.arange(size) % 10)


@pytest.mark.parametrize("name", ["beta1", "beta2", "learning_rate", "cooldown", "r1_gamma"])
def test_a_whole_number_does_where_a_fraction_may_stand(name: str) -> None:
    whole = 0 if name.startswith("beta") else 1
    config = replace(QUICK, **{name: whole})
    fraction = replace(QUICK, **{name: float(whole)})
    first, second = (TrainState(c, torch.device("cpu")) for c in (config, fraction))
    for state in (first, second):
        next(train(state, noise_data(), report_every_s=0))
    assert weights(first) == weights(second)


def bars() -> Tensor:
    """Ten pictures that are easily told apart: a bar at the height of its digit."""
    pictures = torch.zeros(10, 28, 28, dtype=torch.uint8)
    for digit in range(10):
        pictures[digit, 2 * digit + 4 : 2 * digit + 8, 4:24] = 255
    return pictures


def weights(state: TrainState) -> bytes:
    """Every number of the three networks, bit by bit."""
    networks = (state.generator, state.discriminator, state.average)
    return b"".join(
        values.numpy().tobytes() for net in networks for values in net.state_dict().values()
    )


def fill(network: torch.nn.Module, value: float) -> None:
    for values in network.state_dict().values():
        if values.is_floating_point():
            values.fill_(value)


def trained(config: TrainConfig, data: Split | None = None) -> TrainState:
    state = TrainState(config, CPU)
    for _ in train(state, data or noise_data(), report_every_s=math.inf):
        pass
    return state


@pytest.mark.parametrize(
    "config",
    [VANILLA, QUICK, UNAVERAGED, replace(QUICK, precision="mixed")],
    ids=["vanilla", "quick", "unaveraged", "mixed"],
)
def test_the_same_seed_gives_the_same_weights_whatever_happens_around(config: TrainConfig) -> None:
    expected = weights(trained(config))

    torch.manual_seed(1234)
    state = TrainState(config, CPU)
    assert weights(state) != expected
    for _ in train(state, noise_data(), report_every_s=0):
        torch.rand(7)
        draw_sheet(state.sampler, seed=5)
    assert weights(state) == expected
    assert weights(trained(replace(config, seed=1))) != expected


def test_the_initial_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights(TrainState(QUICK, CPU))
    torch.manual_seed(2)
    assert weights(TrainState(QUICK, CPU)) == first
    assert weights(TrainState(replace(QUICK, seed=1), CPU)) != first


def test_the_course_follows_from_the_seed_too() -> None:
    state, other = (TrainState(replace(QUICK, seed=seed), CPU) for seed in (0, 1))
    for name in ("generator", "discriminator", "average"):
        getattr(other, name).load_state_dict(getattr(state, name).state_dict())
    assert weights(other) == weights(state)
    for started in (state, other):
        next(train(started, noise_data(), report_every_s=0))
    assert weights(other) != weights(state)


@pytest.mark.parametrize("config", [VANILLA, QUICK], ids=["vanilla", "quick"])
def test_training_leaves_the_global_random_state_alone(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("an accelerator's global state was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch.mps, "manual_seed", refuse)
    before = torch.get_rng_state()
    trained(config)
    assert torch.equal(torch.get_rng_state(), before)


def test_reports_at_the_end_of_every_epoch_even_if_never_due() -> None:
    data = noise_data(15)  # three whole batches of four; three images wait for the next epoch
    reports = list(train(TrainState(QUICK, CPU), data, report_every_s=math.inf))
    assert [(r.epoch, r.epoch_done, r.step, r.num_steps) for r in reports] == [
        (1, True, 3, 6),
        (2, True, 6, 6),
    ]


def test_reports_every_step_if_always_due() -> None:
    reports = list(train(TrainState(QUICK, CPU), noise_data(15), report_every_s=0))
    assert [(r.epoch, r.epoch_done, r.step) for r in reports] == [
        (1, False, 1),
        (1, False, 2),
        (1, True, 3),
        (2, False, 4),
        (2, False, 5),
        (2, True, 6),
    ]
    for report in reports:
        assert all(math.isfinite(value) for value in astuple(report))
        assert 0 < report.d_real < 1
        assert 0 < report.d_fake < 1
        assert report.images_per_s > 0
    assert all(report.seconds_left > 0 for report in reports[:-1])
    assert reports[-1].seconds_left == 0


@pytest.mark.parametrize("report_every_s", [0, math.inf])
def test_reported_values_are_means_over_the_epoch(report_every_s: float) -> None:
    """Of networks that stand still at their initial weights, which guess like a coin."""
    config = replace(VANILLA, batch_size=10, learning_rate=1e-12)
    state = TrainState(config, CPU)
    for report in train(state, noise_data(50), report_every_s=report_every_s):
        assert report.d_loss == pytest.approx(2 * math.log(2), abs=0.1)
        assert report.g_loss == pytest.approx(math.log(2), abs=0.1)
        assert report.d_real == pytest.approx(0.5, abs=0.05)
        assert report.d_fake == pytest.approx(0.5, abs=0.05)


def test_how_often_it_reports_changes_no_value() -> None:
    every = list(train(TrainState(QUICK, CPU), noise_data(), report_every_s=0))
    ends = list(train(TrainState(QUICK, CPU), noise_data(), report_every_s=math.inf))
    assert [r.d_loss for r in ends] == [r.d_loss for r in every if r.epoch_done]


def test_the_reported_loss_is_without_the_penalty() -> None:
    def first_loss(gamma: float) -> float:
        state = TrainState(replace(QUICK, r1_gamma=gamma, r2_gamma=gamma), CPU)
        return next(train(state, noise_data(), report_every_s=0)).d_loss

    assert first_loss(1e3) == first_loss(0)


def test_rare_penalties_are_as_many_times_as_strong() -> None:
    def after_one_step(interval: int, gamma: float) -> bytes:
        config = replace(QUICK, penalty_interval=interval, r1_gamma=gamma, r2_gamma=0, epochs=1)
        return weights(trained(config, noise_data(4)))

    assert after_one_step(4, 0.25) == after_one_step(1, 1)
    assert after_one_step(4, 0.25) != after_one_step(1, 0.25)


def test_penalties_come_only_every_so_many_steps() -> None:
    def after(epochs: int, interval: int, gamma: float) -> bytes:
        config = replace(QUICK, cooldown=0, epochs=epochs, r1_gamma=gamma / interval, r2_gamma=0)
        return weights(trained(replace(config, penalty_interval=interval), noise_data(4)))

    # Of two steps an interval of two or of eight penalises the first alone.
    assert after(2, 2, 1) == after(2, 8, 1)
    assert after(3, 2, 1) != after(3, 8, 1)


class Parabola(torch.nn.Module):
    """A discriminator whose squared gradient is known: 4 steepness^2 |image|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.steepness = torch.nn.Parameter(torch.tensor(1e-3))

    def forward(self, images: Tensor, digits: Tensor) -> Tensor:
        return self.steepness * images.square().flatten(1).sum(1)


def test_penalties_are_half_the_mean_squared_gradient_at_reals_and_at_fakes() -> None:
    data = noise_data(4)
    real_norm = (data.images / 127.5 - 1).square().sum((1, 2)).mean().item()
    fake_norm = 784 * math.tanh(1) ** 2

    def steepness_after_one_step(r1_gamma: float, r2_gamma: float) -> float:
        config = replace(QUICK, networks=ConvConfig(latent_dim=4, width=2), penalty_interval=3)
        config = replace(config, r1_gamma=r1_gamma, r2_gamma=r2_gamma)
        state = TrainState(replace(config, epochs=1, cooldown=0, learning_rate=0.01), CPU)
        fill(state.generator, 0)
        state.generator.get_parameter("layers.9.bias").data.fill_(
            1
        )  # each fake is tanh(1) all over
        parabola = Parabola()
        state.discriminator = parabola  # type: ignore[assignment]
        state.d_optimizer = torch.optim.SGD(parabola.parameters())  # type: ignore[assignment]
        for _ in train(state, data):
            pass
        return parabola.steepness.item()

    free = steepness_after_one_step(0, 0)
    for gammas in ((0.2, 0), (0, 0.2), (0.2, 0.1)):
        slope = sum(g * 4 * 1e-3 * n for g, n in zip(gammas, (real_norm, fake_norm), strict=True))
        pulled = free - steepness_after_one_step(*gammas)
        assert pulled == pytest.approx(0.01 * 3 * slope, rel=1e-3)


def test_the_learning_rate_falls_to_nothing_over_the_cooldown() -> None:
    config = replace(QUICK, learning_rate=0.1, cooldown=0.25)
    rates = [learning_rate(config, done) for done in (0, 0.5, 0.75, 0.875, 0.95, 1)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.02, 0])
    assert learning_rate(replace(config, cooldown=1), 0.3) == pytest.approx(0.07)
    assert learning_rate(replace(config, cooldown=0), 1) == 0.1


def test_the_last_step_takes_the_smallest_rate() -> None:
    state = trained(replace(QUICK, cooldown=1, learning_rate=0.1), noise_data(20))
    for optimizer in (state.g_optimizer, state.d_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 10)


def test_the_average_halves_its_distance_in_a_halflife() -> None:
    state = TrainState(replace(QUICK, batch_size=4, ema_halflife_images=40), CPU)
    fill(state.average, 1)
    fill(state.generator, 5)
    for step in range(1, 21):
        update_average(state)
        expected = 5 - 4 * 0.5 ** (step / 10)
        for name, values in state.average.state_dict().items():
            if values.is_floating_point():
                torch.testing.assert_close(values, torch.full_like(values, expected), msg=name)


def test_the_average_follows_the_generator_in_training() -> None:
    state = trained(replace(QUICK, ema_halflife_images=1e-3))
    torch.testing.assert_close(
        [v for v in state.average.state_dict().values() if v.is_floating_point()],
        [v for v in state.generator.state_dict().values() if v.is_floating_point()],
    )
    assert state.sampler is state.average
    assert not any(parameter.requires_grad for parameter in state.average.parameters())


def test_without_an_average_the_generator_is_the_sampler() -> None:
    state = TrainState(UNAVERAGED, CPU)
    assert state.sampler is state.generator
    for _ in train(state, noise_data()):
        assert state.sampler is state.generator


def test_after_training_everything_can_be_trained_on() -> None:
    state = trained(QUICK)
    for network in (state.generator, state.discriminator):
        assert network.training
        assert all(parameter.requires_grad for parameter in network.parameters())
    assert state.step == 6


def test_a_batch_larger_than_the_data_is_refused() -> None:
    state = TrainState(replace(QUICK, batch_size=15), CPU)
    with pytest.raises(ConfigError, match=r"^batch_size must be at most the 14 images .* not 15$"):
        next(train(state, noise_data(14)))


def test_a_trained_state_is_not_trained_again() -> None:
    # The learning rate, once fallen to nothing, would turn negative.
    state = trained(QUICK)
    expected = weights(state)
    assert list(train(state, noise_data())) == []
    assert weights(state) == expected


def test_losses_that_are_no_numbers_stop_the_training() -> None:
    state = TrainState(QUICK, CPU)
    fill(state.discriminator, math.nan)
    with pytest.raises(DivergenceError, match="no numbers any more in epoch 1"):
        next(train(state, noise_data(), report_every_s=0))


def test_a_batch_may_be_the_whole_data() -> None:
    reports = list(train(TrainState(replace(QUICK, batch_size=14), CPU), noise_data(14)))
    assert [report.step for report in reports] == [1, 2]


def nearest(images: Tensor) -> list[int]:
    """Which bar each image shows."""
    distances = torch.cdist(images.flatten(1).float(), bars().flatten(1).float())
    return distances.argmin(1).tolist()


def test_the_conditional_pair_learns_what_was_asked() -> None:
    labels = torch.arange(4000) % 10
    data = Split(images=bars()[labels], labels=labels)
    config = replace(
        QUICK,
        networks=ConvConfig(latent_dim=8, width=4),
        epochs=1,
        batch_size=20,
        learning_rate=2e-3,
        ema_halflife_images=200,
    )

    def num_right(state: TrainState) -> int:
        shown = nearest(draw(state.sampler, range(10), num=5, seed=0))
        return sum(digit == place // 5 for place, digit in enumerate(shown))

    assert num_right(trained(config, data)) >= 45
    assert num_right(TrainState(config, CPU)) <= 20


def test_the_vanilla_pair_learns_one_picture() -> None:
    data = Split(
        images=bars()[3].repeat(1000, 1, 1), labels=torch.full((1000,), 3, dtype=torch.int64)
    )

    def distance(state: TrainState) -> float:
        images = draw(state.sampler, [-1], num=20, seed=0).float()
        return (images.mean(0) - bars()[3].float()).abs().mean().item()

    config = replace(VANILLA, epochs=2, batch_size=10)
    assert distance(trained(config, data)) < distance(TrainState(config, CPU)) / 4


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device_there_is(
    cuda: bool, mps: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == torch.device(chosen)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "mps", "tpu", "", "CPU", "meta", "cuda:7"])
def test_an_absent_device_is_refused_in_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError) as refusal:
        choose_device(name)
    assert str(refusal.value) == f"device {name} is not on this machine; it has: cpu"


def with_features(monkeypatch: pytest.MonkeyPatch, **features: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(features))


def emulated(including_emulation: bool = True) -> bool:
    """What an old GPU says when asked for bfloat16."""
    return including_emulation


def test_a_processor_is_named_with_its_fastest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"cpu_name": "Abacus", "amx_bf16": False, "avx512_bf16": True, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert name_device(CPU) == "Abacus (avx512_bf16)"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Abacus"})
    assert name_device(CPU) == "Abacus"


def test_bfloat16_is_used_where_asked_for_and_native(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = replace(QUICK, precision="mixed")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    with_features(monkeypatch, avx512_bf16=True)
    assert uses_bfloat16(mixed, CPU)
    assert not uses_bfloat16(QUICK, CPU)
    assert not uses_bfloat16(mixed, torch.device("mps"))
    assert not uses_bfloat16(mixed, torch.device("cuda"))
    with_features(monkeypatch, amx_bf16=True, avx512_bf16=False)
    assert uses_bfloat16(mixed, CPU)
    with_features(monkeypatch, avx2=True)
    assert not uses_bfloat16(mixed, CPU)


def test_mixed_is_float32_where_bfloat16_is_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights(trained(QUICK))
    mixed = replace(QUICK, precision="mixed")
    with_features(monkeypatch)
    assert weights(trained(mixed)) == expected
    with_features(monkeypatch, avx512_bf16=True)
    assert weights(trained(mixed)) != expected


def test_weights_stay_float32_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    with_features(monkeypatch, avx512_bf16=True)
    state = trained(replace(QUICK, precision="mixed"))
    kinds = {k: v.dtype for k, v in build_generator(QUICK.networks).state_dict().items()}
    assert {k: v.dtype for k, v in state.sampler.state_dict().items()} == kinds
