"""Steps as graphs. Without a GPU, a tape of torch's operations does again what a graph would do."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gan import cuda_graph, training
from gan.config import ConfigError, Precision, TrainConfig
from gan.recipes import RECIPES
from gan.scan import cut_out
from gan.training import TrainState, train, train_on_batch
from tests.gan.test_training import QUICK, VANILLA, noise_data, weights

CPU = torch.device("cpu")
DATA = noise_data(16)
# Powers of two, so that every step size is the same in float32.
COURSE: dict[str, Any] = {"epochs": 8, "batch_size": 4, "learning_rate": 2**-11, "cooldown": 0.5}
CONFIGS = {
    "vanilla": replace(VANILLA, **COURSE),
    "quick": replace(QUICK, **COURSE),
    "mixed": replace(QUICK, precision="mixed", **COURSE),
    "relativistic": replace(QUICK, loss="relativistic", r2_gamma=0.2, **COURSE),
}
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Tape(TorchDispatchMode):
    """Notes each operation, with the memory it reads and writes, and does them all again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for kept, new in zip(results, again, strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Has the CPU's steps recorded on tapes; gives these."""
    made: list[Tape] = []

    def record(work: Callable[[], None], _: torch.Generator) -> Callable[[], None]:
        tape, plays = Tape(), count()
        with tape:
            work()
        made.append(tape)
        return lambda: tape.replay() if next(plays) else None  # recording was the first

    monkeypatch.setattr(training, "require_one_gpu", lambda _: None)
    monkeypatch.setattr(cuda_graph, "warm_up", lambda work: work())
    monkeypatch.setattr(cuda_graph, "record", record)
    return made


def course(state: TrainState, **options: bool) -> list[tuple[float, float]]:
    """The losses after each step of a training to its end."""
    reports = train(state, DATA.to(state.device), report_every_s=0, **options)
    return [(report.d_loss, report.g_loss) for report in reports]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_that_is_replayed_is_the_step(config: TrainConfig, tapes: list[Tape]) -> None:
    stepwise, replayed = TrainState(config, CPU), TrainState(config, CPU)
    assert course(replayed, cuda_graph=True) == course(stepwise)
    assert len(tapes) == (2 if config.penalised else 1)
    assert weights(replayed) == weights(stepwise)
    assert replayed.rng.get_state().equal(stepwise.rng.get_state())


def test_a_short_training_records_nothing(tapes: list[Tape]) -> None:
    config = replace(VANILLA, epochs=1, batch_size=8)
    stepwise, short = TrainState(config, CPU), TrainState(config, CPU)
    assert course(short, cuda_graph=True) == course(stepwise)
    assert not tapes


def test_where_there_is_no_gpu_graphs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^steps are CUDA graphs on a CUDA device alone, and"):
        course(TrainState(VANILLA, CPU), cuda_graph=True)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("recipe", [pytest.param(name, marks=gpu) for name in RECIPES])
def test_on_a_gpu_graphs_train_as_single_launches_do(recipe: str, precision: Precision) -> None:
    # On a CPU, the last bit of every step size moved the losses of 200 steps by up to 0.7%, with 64
    # images, of `vanilla` and of `quick` with steps as small as these.
    # Steps of the size of `quick` let such a bit decide where there is ink.
    config = replace(RECIPES[recipe](), epochs=200, batch_size=len(DATA), precision=precision)
    if config.networks.num_classes:
        config = replace(config, learning_rate=1e-5)
    stepwise, replayed = (TrainState(config, torch.device("cuda")) for _ in range(2))
    expected = torch.tensor(course(stepwise))
    torch.testing.assert_close(
        torch.tensor(course(replayed, cuda_graph=True)), expected, rtol=0.05, atol=0
    )
    assert replayed.rng.get_state().equal(stepwise.rng.get_state())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("recipe", [pytest.param(name, marks=gpu) for name in RECIPES])
def test_a_step_does_not_wait_for_a_gpu(recipe: str) -> None:
    config = replace(RECIPES[recipe](), batch_size=len(DATA))
    state = TrainState(config, torch.device("cuda"))
    images = cut_out(DATA.images, config.networks.side).to(state.device)
    labels = DATA.labels.to(state.device)
    index = torch.arange(len(DATA), device=state.device)
    train_on_batch(state, images, labels, index, 1e-5, config.penalised)
    try:
        torch.cuda.set_sync_debug_mode("error")
        train_on_batch(state, images, labels, index, 1e-5, config.penalised)
    finally:
        torch.cuda.set_sync_debug_mode("default")
