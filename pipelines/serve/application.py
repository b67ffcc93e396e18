"""The deployments of a server, put together: what ``ldm serve`` runs, and what ``serve deploy`` builds."""

import warnings
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.deployment import Application

from ldm.autoencoder import load
from ldm.cascade import Upsampler
from ldm.checkpoint import check_vae
from ldm.model_card import ModelCard, read_card
from pipelines.json_logs import is_json
from pipelines.serve.conditioner import Conditioner
from pipelines.serve.config import ServeConfig, StagePool
from pipelines.serve.decoder import Decoder
from pipelines.serve.ingress import Ingress
from pipelines.serve.job_runner import JobRunner
from pipelines.serve.keys import KeyRing
from pipelines.serve.sampler import Sampler
from pipelines.serve.upsampler import UpsamplerReplica
from pipelines.vae_source import on_every_node

__all__ = ["Checked", "application", "build"]

# A replica that is to go has so long to end what it has.
DRAIN_S = 600.0
# Of the router's pauses between two looks for a replica with room: with Ray's own, replicas stand idle.
MAX_BACKOFF_S = 0.02
LOOK_BACK_S = 2.0
METRICS_EVERY_S = 0.5


class Checked:
    """A config of which all files were found, and fit each other."""

    def __init__(self, config: ServeConfig) -> None:
        """UserError for what is missing, damaged or does not fit."""
        self.config = config
        self.cards = {
            name: _on_every_node(read_card(source.folder, source.vae))
            for name, source in config.models.items()
        }
        self.upsamplers = [Upsampler.read(stage.checkpoint) for stage in config.upsamplers]
        self._check_upsamplers()
        self.keys = KeyRing.load(config.access.key_file)

    @property
    def first(self) -> ModelCard:
        return next(iter(self.cards.values()))

    def _check_upsamplers(self) -> None:
        if not self.upsamplers:
            return
        autoencoder = load(self.first.vae)
        for upsampler in self.upsamplers:
            check_vae(autoencoder, upsampler.info.vae_fingerprint, f"upsampler {upsampler.folder}")


def application(checked: Checked) -> Application:
    """For ``serve.run``."""
    config, cards = _absolute(checked.config), checked.cards
    adapters = {name: source.lora for name, source in config.models.items() if source.lora is not None}
    texts = {name: card for name, card in cards.items() if card.condition == "text"}
    stages: dict[str, Any] = {
        "conditioner": _deployment(Conditioner, "conditioner", config.conditioner).bind(
            texts, config.conditioner
        )
        if texts
        else None,
        "sampler": _deployment(Sampler, "sampler", config.sampler).bind(cards, adapters, config.sampler),
        "upsamplers": [
            _deployment(UpsamplerReplica, f"upsampler-{number}", stage).bind(stage, number, checked.first.vae)
            for number, stage in enumerate(config.upsamplers, start=1)
        ],
        "decoder": _deployment(Decoder, "decoder", config.decoder).bind(cards, config),
    }
    factors = tuple(upsampler.factor for upsampler in checked.upsamplers)
    one = StagePool(num_cpus=0.1, max_ongoing=1000)
    runner = _deployment(JobRunner, "jobs", one).bind(cards, factors, config, **stages)
    ingress = _deployment(serve.ingress()(Ingress), "ingress", config.ingress)
    bound: Application = ingress.bind(cards, factors, config, runner, **stages)
    return bound


def build(arguments: dict[str, Any]) -> Application:
    """For ``serve deploy``: ``import_path: pipelines.serve.application:build``, ``args:`` a `ServeConfig`."""
    return application(Checked(ServeConfig.model_validate(arguments)))


def _deployment(kind: type, name: str, pool: StagePool) -> Any:
    made: Any = serve.deployment(kind)
    return made.options(
        name=name,
        ray_actor_options={
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            "resources": pool.resources,
        },
        max_ongoing_requests=pool.max_ongoing,
        graceful_shutdown_timeout_s=DRAIN_S,
        # The ingress has a log of its own, and the stages' calls are in the metrics.
        logging_config={"enable_access_log": False, "encoding": "JSON" if is_json() else "TEXT"},
        request_router_config=RequestRouterConfig.model_validate({"max_backoff_s": MAX_BACKOFF_S}),
        autoscaling_config=_autoscaling(kind, pool),
    )


def _autoscaling(kind: type, pool: StagePool) -> AutoscalingConfig:
    by_work = hasattr(kind, "record_autoscaling_stats")
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]  # Ray's own
        policy_function="pipelines.serve.work_left:WorkLeft", policy_kwargs={"target_s": pool.target_s}
    )
    with warnings.catch_warnings():
        # Variables of the environment, it says, replace metrics_interval_s: 2.60 reads them nowhere.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _autoscaling_config(pool, {"policy": policy} if by_work else {})


def _autoscaling_config(pool: StagePool, policy: dict[str, Any]) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
        upscale_delay_s=pool.upscale_delay_s,
        downscale_delay_s=pool.downscale_delay_s,
        look_back_period_s=LOOK_BACK_S,
        metrics_interval_s=METRICS_EVERY_S,
        target_ongoing_requests=pool.max_ongoing / 2,
        **policy,
    )


def _on_every_node(card: ModelCard) -> ModelCard:
    """With folders that replicas, which run elsewhere, find."""
    text_encoder = card.text_encoder and on_every_node(card.text_encoder)
    return card.model_copy(update={"vae": on_every_node(card.vae), "text_encoder": text_encoder})


def _absolute(config: ServeConfig) -> ServeConfig:
    """With folders that replicas, which run elsewhere, find, too."""
    models = {
        name: source.model_copy(update={"lora": source.lora and source.lora.expanduser().absolute()})
        for name, source in config.models.items()
    }
    upsamplers = tuple(
        stage.model_copy(update={"checkpoint": stage.checkpoint.expanduser().absolute()})
        for stage in config.upsamplers
    )
    url = config.jobs.url if "://" in config.jobs.url else str(Path(config.jobs.url).expanduser().absolute())
    jobs = config.jobs.model_copy(update={"url": url})
    return config.model_copy(update={"models": models, "upsamplers": upsamplers, "jobs": jobs})
