import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from gan.bundle import save_bundle
from gan.config import ConvConfig, MlpConfig
from gan.networks import Generator, build_generator
from gan.onnx_export import OPSET, to_onnx

EXPORT_ELSEWHERE = """
import hashlib, sys, torch
from pathlib import Path
from gan.bundle import load_bundle
from gan.onnx_export import to_onnx
print(hashlib.sha256(to_onnx(load_bundle(Path(sys.argv[1])))).hexdigest())
"""


def make(config: MlpConfig | ConvConfig) -> Generator:
    """A generator with statistics of its own in every batch norm, still in training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = build_generator(config)
        with torch.no_grad():
            for _ in range(5):
                generator(torch.randn(32, config.latent_dim), torch.arange(32) % 10)
        return generator


FINE = ConvConfig(width=4, fine_layers=1, dots=3)


@pytest.fixture(
    scope="module", params=[ConvConfig(width=4), FINE, MlpConfig()], ids=["conv", "fine", "mlp"]
)
def generator(request: pytest.FixtureRequest) -> Generator:
    return make(request.param)


@pytest.fixture(scope="module")
def exported(generator: Generator) -> bytes:
    return to_onnx(generator)


@pytest.mark.parametrize("num", [0, 1, 2, 7, 100])
def test_it_draws_what_torch_draws(generator: Generator, exported: bytes, num: int) -> None:
    noise = torch.randn(
        num, generator.config.latent_dim, generator=torch.Generator().manual_seed(1)
    )
    digits = torch.arange(num) % 10
    feed = {"latent": noise.numpy(), "digit": digits.numpy()}
    if generator.config.num_classes == 0:
        del feed["digit"]
    (images,) = onnxruntime.InferenceSession(exported).run(["image"], feed)

    generator.eval()
    with torch.no_grad():
        expected = generator(noise, digits)
    generator.train()
    torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-4, rtol=0)
    assert images.shape == (num, 1, 28, 28)


def test_it_says_what_goes_in_and_comes_out(generator: Generator, exported: bytes) -> None:
    model = onnx.load_from_string(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    session = onnxruntime.InferenceSession(exported)
    inputs = {put.name: (put.type, put.shape) for put in session.get_inputs()}
    expected = {
        "latent": ("tensor(float)", ["n", generator.config.latent_dim]),
        "digit": ("tensor(int64)", ["n"]),
    }
    if generator.config.num_classes == 0:
        del expected["digit"]
    assert inputs == expected
    (image,) = session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["n", 1, 28, 28])


def test_it_holds_no_path_of_the_machine(exported: bytes, pytestconfig: pytest.Config) -> None:
    for trace in (str(pytestconfig.rootpath), str(Path.home()), sys.prefix, ".py", "File "):
        assert trace.encode() not in exported


def test_exporting_leaves_the_generator_as_it_was(
    generator: Generator, exported: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: values.clone() for name, values in generator.state_dict().items()}
    random_state = torch.get_rng_state()
    assert to_onnx(generator) == exported
    assert torch.equal(torch.get_rng_state(), random_state)
    assert generator.training
    assert all(parameter.requires_grad for parameter in generator.parameters())
    for name, values in generator.state_dict().items():
        assert torch.equal(values, before[name])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes_in_other_processes(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    save_bundle(make(ConvConfig(width=4)), tmp_path / "bundle")
    digests = {
        subprocess.run(
            [sys.executable, "-c", EXPORT_ELSEWHERE, str(tmp_path / "bundle")],
            cwd=pytestconfig.rootpath,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
