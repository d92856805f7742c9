"""A generator's card: what it is, how it was made, how well it draws, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch

from gan.bundle import name_architecture
from gan.config import TrainConfig
from gan.evaluation.scores import Scores, explain, score_rows
from gan.networks import build_generator
from gan.onnx_export import OPSET


def write_model_card(
    config: TrainConfig,
    scores: Scores,
    *,
    dataset_digest: str,
    git_commit: str,
    computed_by: Mapping[str, str],
) -> str:
    """The card of a trained generator, as markdown; the same input gives the same text.

    Args:
        config: what it was trained with.
        scores: what its drawings scored. Floors stand beside them if they were measured alike.
        dataset_digest: the id of the data, `DatasetRef.digest`.
        git_commit: the commit of the code that trained it.
        computed_by: names and values of what else decides the bits, such as processor and threads.

    Raises:
        JudgeError: the judge's card, which has the floors, is missing.
    """
    latent_dim = config.networks.latent_dim
    if config.networks.num_classes:
        asked, digits = "[8]", "digits 0 to 9, or -1 for any"
        told = "can be told which digit"
        inputs = f"`latent`, float [n, {latent_dim}], and `digit`, int64 [n], 0 to 9"
    else:
        asked, digits = "[-1]", "-1 alone, which means any digit"
        told = "cannot be told which digit"
        inputs = f"`latent`, float [n, {latent_dim}]"
    shares = ", ".join(f"{share:.1%}" for share in scores.digit_histogram)
    return f"""# A generator of handwritten digits: recipe `{config.recipe}`, seed {config.seed}

One half of a generative adversarial network, trained on MNIST. It draws grey images of 28 x 28
pixels and {told}.

![a hundred of its digits](samples.png)

## Use

With the package `gan` of this project and torch; every file is checked, nothing is unpickled:

```python
from pathlib import Path
from gan import draw, load_bundle

images = draw(load_bundle(Path("mnist-gan-generator")), {asked}, num=16, seed=1)
```

This gives uint8 [16, 28, 28], 0 (paper) to 255 (ink). It takes {digits}. The
same seed draws the same images.

Where torch does not run, `generator.onnx` (opset {OPSET}) does:

- in: {inputs}; the noise is standard normal
- out: `image`, float [n, 1, 28, 28] in [-1, 1]; a pixel is round((image + 1) * 127.5)

## Training

{_table(["what", "value"], _training_rows(config, dataset_digest, git_commit, computed_by))}

## Scores

{scores.num_samples:,} drawn images, rounded to 8 bits, against the 10,000 test images of MNIST, by
the judge `{scores.judge}`. "Real" is what as many real training images score in the place of drawn
ones, where that was measured.

{_table(["score", "drawn", "real", "better", "what it is"], _score_rows(scores))}

The judge reads the digits 0 to 9 in these shares: {shares}.

## Limits

- It draws digits like MNIST's and nothing else: centred, upright, as Americans wrote them around
  1990. It is no model of handwriting at large.
- {_limit_of_asking(scores)}
- The scores are those of one small judge, one seed of drawings and one training. They compare with
  scores of the same judge and as many images only.
- Memorisation: {scores.memorisation_pixels:.2%} of the drawings in pixels and \
{scores.memorisation_features:.2%} in the judge's features lie nearer
  to a training image than 99% of the test images do. For new real images it would be 1%.
- It was not tested for any use in which a wrong digit does harm.

## Data and licence

MNIST, 60,000 training images by Yann LeCun, Corinna Cortes and Christopher Burges, made from
NIST's Special Databases 1 and 3. LeCun and Cortes hold its copyright and make it available under
the Creative Commons Attribution-Share Alike 3.0 licence, says the documentation of Keras. The code
is under the MIT licence.
"""


def _training_rows(
    config: TrainConfig, dataset_digest: str, git_commit: str, computed_by: Mapping[str, str]
) -> list[list[str]]:
    fields = asdict(config)
    networks = fields.pop("networks")
    with torch.device("meta"):
        num_weights = sum(
            weight.numel() for weight in build_generator(config.networks).parameters()
        )
    known = {
        "recipe": fields.pop("recipe"),
        "architecture": name_architecture(config.networks),
        "generator's weights": f"{num_weights:,}",
        **networks,
        **fields,
        "data": dataset_digest,
        "commit": git_commit,
        **computed_by,
    }
    return [[name, f"`{value}`"] for name, value in known.items()]


def _score_rows(scores: Scores) -> list[list[str]]:
    return [
        [name, f"{value:.4f}", floor, explain(name).better, meaning]
        for name, value, floor, meaning in score_rows(scores)
    ]


def _limit_of_asking(scores: Scores) -> str:
    if scores.digit_as_asked is None:
        return "It cannot be asked for a digit; some digits come more often than others."
    missed = 1 - scores.digit_as_asked
    return f"The judge reads another digit than asked in {missed:.2%} of its drawings."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
