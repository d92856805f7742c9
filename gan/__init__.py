"""A small craft of generative adversarial networks for MNIST: train, draw, keep, judge.

    data = gan.load_mnist(Path("data/mnist/raw"))
    state = gan.TrainState(gan.quick(), gan.choose_device("cpu"))
    for progress in gan.train(state, data.train):
        print(progress)
    eights = gan.draw(state.sampler, [8], num=16, seed=1)
    gan.save_bundle(state.sampler, Path("eights"))

It needs torch, numpy and safetensors, and nothing running. The judge and its scores are in
`gan.evaluation`.
"""

from gan.bundle import PRETRAINED, BundleError, load_bundle, save_bundle, verify_bundle
from gan.config import ConfigError, ConvConfig, MlpConfig, TrainConfig
from gan.data import DataError, Mnist, Split, load_mnist
from gan.recipes import RECIPES, best, configure, quick, vanilla
from gan.sampling import SamplingError, draw, draw_sheet, interpolate, tile
from gan.training import DivergenceError, Progress, TrainState, choose_device, train

__all__ = [
    "PRETRAINED",
    "RECIPES",
    "BundleError",
    "ConfigError",
    "ConvConfig",
    "DataError",
    "DivergenceError",
    "MlpConfig",
    "Mnist",
    "Progress",
    "SamplingError",
    "Split",
    "TrainConfig",
    "TrainState",
    "best",
    "choose_device",
    "configure",
    "draw",
    "draw_sheet",
    "interpolate",
    "load_bundle",
    "load_mnist",
    "quick",
    "save_bundle",
    "tile",
    "train",
    "vanilla",
    "verify_bundle",
]
