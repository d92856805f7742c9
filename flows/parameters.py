"""Types of the flows' parameters: Prefect refuses what they do not allow, before anything runs."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gan.config import NUM_SEEDS, ConfigError
from gan.training import choose_device


def _present(device: str) -> str:
    try:
        choose_device(device)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return device


RecipeName = Literal["quick", "best", "vanilla"]
DeviceName = Annotated[Literal["auto", "cuda", "mps", "cpu"], AfterValidator(_present)]
Devices = Annotated[int, Field(ge=1, le=64)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=2, le=60_000)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=NUM_SEEDS)]
NumSamples = Annotated[int, Field(ge=100, le=10_000)]
MaxDelayHours = Annotated[float, Field(gt=0)]
VersionName = (
    Annotated[int, Field(ge=1, lt=10**9)] | Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
)
