"""How a U-Net is trained: the config, checked once."""

from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ldm import unet
from ldm.lora import LoraTraining
from ldm.objective import NoiseSchedule
from ldm.upsampling import MAX_NOISE_LEVEL, NUM_NOISE_LEVELS
from pipelines.custom_resources import CustomResources
from pipelines.train.loader import LoaderConfig
from pipelines.train.sample_grid import SampleGrid
from pipelines.train.wandb_run import WandbConfig

__all__ = ["UnetTraining"]


class UnetTraining(BaseModel):
    """How to train a U-Net on cached latents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("small", description=f"layout: {', '.join(unet.PRESETS)}")
    init: str | None = Field(None, description="U-Net to start from instead: a folder in diffusers' format")
    lora: LoraTraining | None = Field(None, description="train a low-rank update of init instead")
    prediction: Literal["epsilon", "v_prediction", "flow"] = "v_prediction"
    zero_terminal_snr: bool = Field(False, description="the last timestep is pure noise (v_prediction)")
    min_snr_gamma: PositiveFloat | None = Field(5.0, description="of the loss weight; none for a uniform one")
    whitening: Literal["data", "vae"] = Field(
        "data", description="scale of the latents: measured on the dataset, or the VAE's own config"
    )
    condition_dropout: float = Field(0.1, ge=0, le=1, description="share of conditions replaced by none")
    max_noise_level: NonNegativeInt = Field(
        MAX_NOISE_LEVEL,
        lt=NUM_NOISE_LEVELS,
        description="of an upsampler: DDPM timestep up to which the low-resolution latent is noised",
    )
    data: LoaderConfig = LoaderConfig()
    steps: PositiveInt = 10_000
    batch_size: PositiveInt = Field(64, description="latents per step over all workers")
    accumulate: PositiveInt = Field(1, description="parts of a worker's share, on num_workers, in turn")
    learning_rate: PositiveFloat = 3e-4
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    warmup_steps: PositiveInt = 200
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    ema: Literal["constant", "power"] = "constant"
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of a constant EMA")
    ema_width: float = Field(
        0.05, gt=0, lt=0.28, description="of a power EMA: its std as a share of the run (Karras et al. 2024)"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights stay fp32")
    compile: bool = Field(False, description="torch.compile the U-Net")
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp2"] = Field("ddp", description="fsdp2 shards weights and optimizer state")
    seed: int = 0
    log_every: PositiveInt = 100
    validate_every: PositiveInt = Field(1_000, description="at the first logged step of as many")
    samples: SampleGrid = SampleGrid()
    wandb: WandbConfig | None = Field(None, description="Weights & Biases, beside TensorBoard")
    checkpoint_every: PositiveInt = Field(
        1_000, description="steps that a kill loses at most; a snapshot is begun twice as often"
    )
    keep_checkpoints: PositiveInt = Field(3, ge=2, description="an older one helps if the newest is torn")
    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = Field(None, description="go on with as few; default: num_workers")
    resize_check_s: PositiveFloat = Field(60.0, description="how often to look for room for more workers")
    num_gpus: float = Field(0.0, ge=0, description="per worker")
    resources: CustomResources = {}
    threads: PositiveInt | None = Field(None, description="torch threads per worker; default: Ray's choice")
    max_failures: NonNegativeInt = Field(3, description="of workers, after which the job gives up")

    @model_validator(mode="after")
    def _check(self) -> "UnetTraining":
        if self.zero_terminal_snr and self.prediction != "v_prediction":
            raise ValueError("zero_terminal_snr needs v_prediction: epsilon says nothing at zero SNR")
        if self.lora is not None and self.init is None:
            raise ValueError("lora needs init: the U-Net that it is an update of")
        # Of fewer workers some get a row more than others: only that number is known before.
        if self.batch_size % (self.num_workers * self.accumulate):
            parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
            raise ValueError(
                f"a batch of {self.batch_size} cannot be shared by {self.num_workers} workers evenly{parts}"
            )
        if (self.min_workers or 0) > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}")
        return self

    def parts(self, world: int) -> int:
        """Parts of a rank's share that are computed in turn, the same on every rank.

        On fewer workers than num_workers a share is larger: there are as many more parts, so that a part
        has no more rows than on num_workers, or one more.
        """
        of_full = self.num_workers * self.accumulate
        return max(1, -(-(self.batch_size // world) * of_full // self.batch_size))

    @property
    def snapshot_every(self) -> int:
        """Half of it: one is written while training goes on, and the one before it is there by then."""
        return max(1, self.checkpoint_every // 2)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(prediction=self.prediction, rescale_betas_zero_snr=self.zero_terminal_snr)
