"""A folder in Stable Diffusion's layout: the same images as diffusers' own pipeline makes of it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from ldm import autoencoder
from ldm.errors import UserError
from ldm.image_tensors import from_model
from ldm.model_card import ModelCard, read_card
from ldm.text import load_text_encoder
from pipelines.serve.conditioner import embed
from pipelines.serve.loaded_model import LoadedModel
from pipelines.serve.messages import Condition, SampleRequest
from tests.tiny_text import WIDTH, clip_tokenizer, save_clip

PROMPT, NEGATIVE = "the cat on the mat", "blurred"


@pytest.fixture(scope="module")
def folder(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a VAE of f = 4 and 3 channels, and a U-Net that attends to a CLIP of three layers."""
    folder = tmp_path_factory.mktemp("stable-diffusion")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
        )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False),
        text_encoder=CLIPTextModel.from_pretrained(save_clip(tmp_path_factory.mktemp("clip"))),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _served(card: ModelCard, num_steps: int, guidance: float, seed: int) -> np.ndarray:
    assert card.text_encoder is not None
    texts = embed(load_text_encoder(card.text_encoder), [PROMPT, NEGATIVE], card)
    condition, null = (Condition(embedding_LD=text_LD) for text_LD in texts)
    request = SampleRequest(
        model="sd",
        shape=card.latent_shape,
        scheduler="ddim",
        num_steps=num_steps,
        guidance=guidance,
        seed=seed,
        condition=condition,
        null=null,
    )

    async def run() -> np.ndarray:
        with ThreadPoolExecutor(1) as thread:
            model = await LoadedModel.open(
                card, None, torch.device("cpu"), thread, max_rows=4, max_requests=10
            )
            ticket = await model.engine.submit(model.work(request, None))
            latent_Chw = model.latent_of_vae(await ticket.done)
            await model.close()
        return latent_Chw

    latent = torch.from_numpy(asyncio.run(run()))
    return from_model(autoencoder.load(card.vae).decode(latent[None]))[0]


def test_the_image_is_that_of_diffusers_pipeline(folder: Path) -> None:
    card = read_card(folder)
    assert card.condition == "text" and card.size_px == (32, 32)
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=6,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    difference = np.abs(np.round(expected * 255).astype(int) - _served(card, 6, 4.0, 3).astype(int))
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999


def test_a_folder_without_a_vae_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").symlink_to(folder / "unet")
    with pytest.raises(UserError, match="vae"):
        read_card(tmp_path)
    with pytest.raises(UserError, match=r"ldm\.json"):
        read_card(tmp_path / "elsewhere")
