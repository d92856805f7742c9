"""The reckoned work of a step is the work that torch counts."""

import math
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import variants
from benchmarks.products import SQUARE, flops, multiply, step_products
from gan.config import MlpConfig
from gan.recipes import vanilla
from tests.gan.test_training import noise_data

CPU = torch.device("cpu")


def test_a_step_takes_the_products_of_the_formula() -> None:
    g = [100 * 256, 256 * 512, 512 * 1024, 1024 * 784]
    d = [784 * 1024, 1024 * 512, 512 * 256, 256]
    for b in (1, 100):
        config = replace(vanilla(), batch_size=max(b, 2))
        expected = 2 * config.batch_size * (4 * sum(g) - g[0] + 8 * sum(d) - 2 * d[0])
        assert flops(step_products(config)) == expected


def test_torch_counts_as_many_operations_in_the_leanest_loop() -> None:
    config = replace(vanilla(), networks=MlpConfig(dropout=0.0), batch_size=8, epochs=1)
    with FlopCounterMode(display=False) as counter:
        for _ in variants.train_with(variants.TRICKS, config, noise_data(16), CPU):
            pass
    assert counter.get_total_flops() == 2 * flops(step_products(config))


def test_a_product_is_counted_as_torch_counts_it() -> None:
    products = [(3, 5, 7), (2, 4, 6)]
    with FlopCounterMode(display=False) as counter:
        done = next(multiply(products, torch.float32, CPU)())
    assert counter.get_total_flops() == done == flops(products)
    assert flops(SQUARE) == 2 * math.prod(SQUARE[0])
