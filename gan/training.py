"""The training loop. Read `train` and `train_on_batch` from top to bottom: that is the method."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gan.config import ConfigError, TrainConfig
from gan.cuda_graph import CudaGraphs, Step, require_one_gpu
from gan.data import Split
from gan.errors import UserError
from gan.exchange import average_over_processes, share_of
from gan.losses import discriminator_loss, generator_loss, squared_gradients
from gan.networks import Discriminator, Generator, build_discriminator, build_generator
from gan.scan import cut_out


class DivergenceError(UserError):
    """A training that has gone wrong for good; a smaller learning rate may mend it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands. Losses and scores are means over the epoch so far."""

    epoch: int
    """The epoch under way or, if `epoch_done`, just finished; the first is 1."""
    epoch_done: bool
    step: int
    """Steps taken since the start of the training."""
    num_steps: int
    """Steps that the whole training takes."""
    d_loss: float
    """The discriminator's loss (the sum of its two terms), without the penalty."""
    g_loss: float
    d_real: float
    """D(x): the mean probability that the discriminator gives real images."""
    d_fake: float
    """D(G(z)): the same for fakes, in the discriminator's own step."""
    images_per_s: float
    """Real images a second since the last report."""
    seconds_left: float


class TrainState:
    """Everything that changes while training.

    The same config on the same kind of processor, with as many threads and the same torch, gives
    the same state: all randomness comes from `rng`, and initial weights are drawn on the CPU.
    `gan.checkpoint` keeps all of it.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.step = 0
        self.history: list[Progress] = []
        """The last report of every finished epoch."""
        self.order = torch.empty(0, dtype=torch.int64, device=device)
        """The order of the data in the epoch under way."""
        self.totals = torch.zeros(4, device=device)
        """Sums over the epoch under way: both losses, D(x), D(G(z))."""
        self.rng = torch.Generator(device).manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.generator = build_generator(config.networks).to(device)
            self.discriminator = build_discriminator(config.networks, self.rng).to(device)
        for network in (self.generator, self.discriminator):
            network.to(memory_format=torch.channels_last)  # convolutions are fastest so
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.g_optimizer = _adam(self.generator, config, device)
        self.d_optimizer = _adam(self.discriminator, config, device)

    @property
    def sampler(self) -> Generator:
        """The generator to draw with: the average of its weights if one is kept."""
        return self.average if self.config.ema_halflife_images > 0 else self.generator


def train(
    state: TrainState, data: Split, *, report_every_s: float = 1.0, cuda_graph: bool = False
) -> Iterator[Progress]:
    """Train on `data`, which lies on the state's device, and report on the way.

    Goes on where the state stands, on a CPU to the last bit as if there had been no break. Yields
    every `report_every_s` seconds and at the end of every epoch; only then does the host wait for
    the device, and the state is whole. What the caller does between two reports changes nothing
    in the training.

    Where torch.distributed has a process group, as under torchrun, each process takes its share of
    every batch, and all end with the same weights. It is the training that one device does with
    that batch, but for dropout, whose masks are the same for each share.

    With `cuda_graph` a CUDA device is given each step in one launch (`gan.cuda_graph`). That has
    not run on a GPU so far, which is why it must be asked for.

    Raises:
        ConfigError: the batch is larger than the data, or cannot be shared out evenly; or the
            state began with other data; or a CUDA graph is asked for where there can be none.
        DivergenceError: at a report, a loss is infinite or no number.
    """
    config = state.config
    _require_enough(data, state)
    share, steps_per_epoch = share_of(config.batch_size), len(data) // config.batch_size
    num_steps = config.epochs * steps_per_epoch
    images = cut_out(data.images, config.networks.side)
    for network in (state.generator, state.discriminator):
        network.train()
    take: Step = partial(train_on_batch, state, images, data.labels)
    if cuda_graph:
        require_one_gpu(state.device)
        take = CudaGraphs(take, state.rng)
    clock = _Clock(state, num_steps, report_every_s)

    while state.step < num_steps:
        epoch, done = divmod(state.step, steps_per_epoch)
        if done == 0:
            state.order = torch.randperm(len(data), generator=state.rng, device=state.device)
            state.totals.zero_()
        index = state.order[done * config.batch_size :][share]
        lr = learning_rate(config, state.step / num_steps)
        penalise = config.penalised and state.step % config.penalty_interval == 0
        take(index, lr, penalise)
        state.step += 1

        epoch_done = done + 1 == steps_per_epoch
        if epoch_done or clock.due():
            progress = clock.report(epoch + 1, epoch_done, state.totals / (done + 1))
            if epoch_done:
                state.history.append(progress)
            yield progress


def train_on_batch(
    state: TrainState,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    lr: float | Tensor,
    penalise: bool,
) -> None:
    """One step of each network; the sums of the epoch and the averaged generator follow.

    It neither waits for the device nor reads anything else that changes from step to step, so that
    a CUDA graph can do it again.

    Args:
        state: is trained, but for its `step`; its networks are in training mode.
        images: all real images, uint8 [n, side, side].
        labels: their digits, int64 [n].
        index: this process's share of the batch, int64.
        lr: both optimizers' step size; a tensor is float32 [].
        penalise: whether R1 and R2 penalties are due.
    """
    config, device, rng = state.config, state.device, state.rng
    generator, discriminator = state.generator, state.discriminator
    size, noise_shape = config.batch_size, (config.batch_size, config.networks.latent_dim)
    share = share_of(size)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config, device))
    real = images[index].unsqueeze(1).float() / 127.5 - 1
    digits = labels[index]

    # The discriminator's step: reals up, fakes down.
    with autocast, torch.no_grad():
        fake = generator(torch.randn(noise_shape, generator=rng, device=device)[share], digits)
    both = torch.cat([real, fake.float()]).requires_grad_(penalise)
    with autocast:
        logits = discriminator(both, digits.repeat(2)).float()
    d_loss = discriminator_loss(config.loss, *logits.chunk(2))
    penalty = torch.zeros_like(d_loss)
    if penalise:
        r1, r2 = squared_gradients(logits, both).view(2, -1).mean(1)
        penalty = config.penalty_interval * (config.r1_gamma * r1 + config.r2_gamma * r2) / 2
    take_step(state.d_optimizer, d_loss + penalty, lr)

    # The generator's step: its fakes up, past a discriminator that holds still.
    discriminator.requires_grad_(False)
    with autocast:
        fake = generator(torch.randn(noise_shape, generator=rng, device=device)[share], digits)
        again = discriminator(fake, digits).float()
        rival = None
        if config.loss == "relativistic":
            rival = discriminator(real, digits).float()
    g_loss = generator_loss(config.loss, rival, again)
    take_step(state.g_optimizer, g_loss, lr)
    discriminator.requires_grad_(True)

    update_average(state)
    probabilities = torch.sigmoid(logits).detach().view(2, -1).mean(1)
    state.totals += average_over_processes(
        [torch.cat([torch.stack([d_loss, g_loss]).detach(), probabilities])]
    )[0]


def _require_enough(data: Split, state: TrainState) -> None:
    num, began_with = len(data), len(state.order)
    if state.config.batch_size > num:
        raise ConfigError(
            f"batch_size must be at most the {num} images there are, not {state.config.batch_size}"
        )
    if state.step and began_with != num:
        raise ConfigError(
            f"this training began with {began_with} images and cannot go on with {num}"
        )


def _adam(
    network: Generator | Discriminator, config: TrainConfig, device: torch.device
) -> torch.optim.Adam:
    return torch.optim.Adam(
        network.parameters(),
        lr=config.learning_rate,
        betas=(float(config.beta1), float(config.beta2)),  # torch refuses a whole 0
        fused=device.type in ("cpu", "cuda"),
        capturable=device.type == "cuda",
    )


def learning_rate(config: TrainConfig, done: float) -> float:
    """Adam's step size when the share `done` (0 to 1) of the steps is taken."""
    if config.cooldown == 0:
        return config.learning_rate
    return config.learning_rate * min(1.0, (1 - done) / config.cooldown)


def take_step(optimizer: torch.optim.Optimizer, objective: Tensor, lr: float | Tensor) -> None:
    """Descend the objective's gradient once: its mean over all processes, if there are several."""
    optimizer.zero_grad(set_to_none=True)
    objective.backward()
    average_over_processes([p.grad for p in optimizer.param_groups[0]["params"]])
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


@torch.no_grad()
def update_average(state: TrainState) -> None:
    """Move the averaged generator towards the current one, batch-norm statistics included."""
    halflife = state.config.ema_halflife_images
    if halflife == 0:
        return
    weight = 1 - 0.5 ** (state.config.batch_size / halflife)
    for kept, now in (
        (state.average.parameters(), state.generator.parameters()),
        (state.average.buffers(), state.generator.buffers()),
    ):
        pairs = [(k, n) for k, n in zip(kept, now, strict=True) if k.is_floating_point()]
        if pairs:
            torch._foreach_lerp_([k for k, _ in pairs], [n for _, n in pairs], weight)


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA, then MPS, then CPU) or a device by name.

    Raises:
        ConfigError: this machine has no such device.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present.get(name, False):
        there = ", ".join(kind for kind, there in present.items() if there)
        raise ConfigError(f"device {name} is not on this machine; it has: {there}")
    return torch.device(name)


def name_device(device: torch.device) -> str:
    """What computes: the GPU by name, or the processor with what its fastest products need."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = ("amx_bf16", "avx512_bf16", "avx2")
    features = torch.cpu.get_capabilities()
    name = str(features.get("cpu_name") or platform.processor() or platform.machine())
    best = next((feature for feature in known if features.get(feature)), None)
    return f"{name} ({best})" if best else name


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Whether this training multiplies in bfloat16 on this device."""
    if config.precision == "float32":
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


class _Clock:
    """Says when a report is due, how fast it goes and how long it will take."""

    def __init__(self, state: TrainState, num_steps: int, report_every_s: float) -> None:
        self.state, self.num_steps, self.report_every_s = state, num_steps, report_every_s
        self.start = self.last = (time.perf_counter(), state.step)

    def due(self) -> bool:
        return time.perf_counter() - self.last[0] >= self.report_every_s

    def report(self, epoch: int, epoch_done: bool, means: Tensor) -> Progress:
        d_loss, g_loss, d_real, d_fake = means.tolist()  # waits for the device
        if not math.isfinite(d_loss + g_loss):
            raise DivergenceError(f"the losses are no numbers any more in epoch {epoch}")
        now, step = time.perf_counter(), self.state.step
        rate = (step - self.last[1]) / (now - self.last[0])
        overall = (step - self.start[1]) / (now - self.start[0])
        self.last = (now, step)
        return Progress(
            epoch=epoch,
            epoch_done=epoch_done,
            step=step,
            num_steps=self.num_steps,
            d_loss=d_loss,
            g_loss=g_loss,
            d_real=d_real,
            d_fake=d_fake,
            images_per_s=rate * self.state.config.batch_size,
            seconds_left=(self.num_steps - step) / overall,
        )
