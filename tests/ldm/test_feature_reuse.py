from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm import unet as unets
from ldm.conditioning import Conditioning, EmbeddingConditioner
from ldm.errors import UserError
from ldm.feature_reuse import check_cut, predict_reusing

NUM_ROWS = 4
NUM_CLASSES = 3
WIDTH = 16
PLAIN = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
ATTENDING = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Where diffusers treats the input or the time embedding in another way.
LAYOUTS: dict[str, dict[str, object]] = {
    "plain, 1 layer": PLAIN | {"layers_per_block": 1, "num_class_embeds": NUM_CLASSES},
    "plain, 2 layers": PLAIN | {"layers_per_block": 2, "num_class_embeds": NUM_CLASSES},
    "attention at the cut": PLAIN
    | {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "cross-attention, 1 layer": ATTENDING | {"layers_per_block": 1, "upcast_attention": True},
    "cross-attention, 2 layers": ATTENDING | {"layers_per_block": 2, "use_linear_projection": True},
    "classes and embeddings": ATTENDING | {"num_class_embeds": NUM_CLASSES},
    "3 levels": PLAIN
    | {
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "1 level, no middle": PLAIN
    | {
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
    },
    "centred": PLAIN | {"center_input_sample": True},
    "classes beside the time": PLAIN | {"num_class_embeds": NUM_CLASSES, "class_embeddings_concat": True},
    "activated time": PLAIN | {"time_embedding_act_fn": "silu"},
    "embeddings in the time": ATTENDING
    | {"addition_embed_type": "text", "encoder_hid_dim": WIDTH, "addition_embed_type_num_heads": 4},
    "projected embeddings": ATTENDING | {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj"},
    "time as scale and shift": PLAIN | {"resnet_time_scale_shift": "scale_shift"},
}


def build(layout: dict[str, object]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=2, **layout).eval()
    return unet.requires_grad_(False)


def conditions(unet: UNet2DConditionModel) -> Conditioning:
    """Labels and embeddings of several lengths, as far as the U-Net takes them."""
    labels = torch.tensor([2, 0, 1, 2]) if unet.class_embedding is not None else None
    if not isinstance(unet.config["attention_head_dim"], tuple):
        return Conditioning(labels)
    embeddings = torch.randn(NUM_ROWS, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    lengths = (5, 2, 3, 1)
    conditioner = EmbeddingConditioner(torch.zeros(1, WIDTH))
    padded = conditioner.encode([row[:length] for row, length in zip(embeddings, lengths, strict=True)])
    return Conditioning(labels, padded.embeddings, padded.mask)


def inputs(seed: int, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    """Latents and timesteps, as they may be in one call: no two rows at one step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_ROWS, 3, *size, generator=generator)
    return x, torch.rand(NUM_ROWS, generator=generator) * 999


def alone(
    unet: UNet2DConditionModel, row: int, x: Tensor, t: Tensor, c: Conditioning, deep: Tensor | None
) -> tuple[Tensor, Tensor]:
    (prediction,), (feature,) = predict_reusing(
        unet, x[row : row + 1], t[row : row + 1], c.select(torch.tensor([row])), [deep]
    )
    return prediction, feature


@contextmanager
def rows_seen(unet: UNet2DConditionModel) -> Iterator[dict[str, Counter[int]]]:
    """Of every convolution: how many calls with how many rows."""
    seen = {
        name: Counter[int]() for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d)
    }
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda _module, args, _output, calls=calls: calls.update([len(args[0])])
        )
        for name, calls in seen.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_features_it_is_the_full_prediction(name: str) -> None:
    unet = build(LAYOUTS[name])
    (x, t), c = inputs(1), conditions(unet)
    prediction, features = predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
    assert torch.equal(prediction, unets.predict(unet, x, t, c))
    assert len(features) == NUM_ROWS


@pytest.mark.parametrize("name", LAYOUTS)
def test_with_its_own_feature_of_the_same_input_too(name: str) -> None:
    unet = build(LAYOUTS[name])
    (x, t), c = inputs(1), conditions(unet)
    full, fresh = predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
    reused, given = predict_reusing(unet, x, t, c, fresh)
    assert torch.equal(reused, full)
    assert all(now is before for now, before in zip(given, fresh, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_a_mixed_batch_are_as_if_alone(name: str) -> None:
    unet = build(LAYOUTS[name])
    (x, t), c = inputs(1), conditions(unet)
    _, old = predict_reusing(unet, *inputs(5), c, [None] * NUM_ROWS)
    deep = [None, old[1], None, old[3]]
    prediction, features = predict_reusing(unet, x, t, c, deep)
    for row in range(NUM_ROWS):
        expected, feature = alone(unet, row, x, t, c, deep[row])
        torch.testing.assert_close(prediction[row], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(features[row], feature, rtol=0, atol=1e-5)


def test_what_is_reused_matters() -> None:
    unet = build(LAYOUTS["plain, 1 layer"])
    (x, t), c = inputs(1), conditions(unet)
    full, _ = predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
    _, old = predict_reusing(unet, *inputs(5), c, [None] * NUM_ROWS)
    mixed, _ = predict_reusing(unet, x, t, c, [None, old[1], None, old[3]])
    distance = (mixed - full).abs().amax(dim=(1, 2, 3))
    assert distance[[0, 2]].max() < 1e-5
    assert distance[[1, 3]].min() > 1e-3


@pytest.mark.parametrize("size", [(7, 9), (5, 8), (6, 10)])
def test_sizes_that_doubling_does_not_fit(size: tuple[int, int]) -> None:
    # Three levels: 7 rows become 4, 2, and have to come back as 4 and 7.
    unet = build(
        ATTENDING
        | {
            "block_out_channels": (16, 16, 32),
            "attention_head_dim": (2, 2, 4),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        }
    )
    (x, t), c = inputs(1, size), conditions(unet)
    full, fresh = predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
    assert torch.equal(full, unets.predict(unet, x, t, c))
    mixed, _ = predict_reusing(unet, x, t, c, [fresh[0], None, fresh[2], None])
    torch.testing.assert_close(mixed, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", unets.PRESETS)
def test_every_preset_can_be_cut_and_is_cheap_above_the_cut(name: str) -> None:
    # On the meta device, which computes nothing.
    with torch.device("meta"), torch.no_grad():
        unet = unets.build(name, in_channels=4, num_classes=None, sample_size=8)
        width = unets.PRESETS[name].cross_attention_dim
        c = Conditioning(embeddings=None if width is None else torch.zeros(2, 3, width))
        x, t = torch.zeros(2, 4, 8, 8), torch.zeros(2)
        with FlopCounterMode(display=False) as full:
            assert unets.predict(unet, x, t, c).shape == x.shape
        with FlopCounterMode(display=False) as fresh:
            _, deep = predict_reusing(unet, x, t, c, [None, None])
        with FlopCounterMode(display=False) as reusing:
            assert predict_reusing(unet, x, t, c, deep)[0].shape == x.shape
    assert fresh.get_total_flops() == full.get_total_flops()
    assert reusing.get_total_flops() < full.get_total_flops() / 7


@pytest.mark.parametrize("name", ["plain, 2 layers", "cross-attention, 2 layers"])
def test_deep_blocks_see_the_fresh_rows_only(name: str) -> None:
    unet = build(LAYOUTS[name])
    (x, t), c = inputs(1), conditions(unet)
    _, deep = predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
    last = f"up_blocks.1.resnets.{len(unet.up_blocks[1].resnets) - 1}."
    for given in (deep, [None, deep[1], deep[2], deep[3]], [None, deep[1], None, deep[3]]):
        num_fresh = sum(feature is None for feature in given)
        with rows_seen(unet) as seen:
            predict_reusing(unet, x, t, c, given)
        for module, calls in seen.items():
            shallow = module in ("conv_in", "conv_out") or module.startswith(last)
            expected = {NUM_ROWS: 1} if shallow else {num_fresh: 1} if num_fresh else {}
            assert calls == Counter(expected), module


def test_a_kept_feature_does_not_keep_its_batch() -> None:
    unet = build(LAYOUTS["plain, 1 layer"])
    (x, t), c = inputs(1), conditions(unet)
    _, fresh = predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
    _, mixed = predict_reusing(unet, x, t, c, [None, fresh[1], None, fresh[3]])
    for feature in (*fresh, *mixed):
        assert feature.untyped_storage().nbytes() == feature.nbytes


def test_features_are_the_unets_and_predictions_the_inputs_dtype() -> None:
    unet = build(LAYOUTS["cross-attention, 1 layer"]).to(torch.bfloat16)
    (x, t), c = inputs(1), conditions(unet)
    prediction, features = predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
    again, _ = predict_reusing(unet, x, t, c, features)
    assert prediction.dtype == again.dtype == torch.float32
    assert {feature.dtype for feature in features} == {torch.bfloat16}
    assert torch.equal(prediction, unets.predict(unet, x, t, c))
    assert torch.equal(again, prediction)


def test_a_feature_for_each_row() -> None:
    unet = build(LAYOUTS["plain, 1 layer"])
    (x, t), c = inputs(1), conditions(unet)
    with pytest.raises(ValueError, match="3 deep features for 4 rows"):
        predict_reusing(unet, x, t, c, [None] * 3)


def test_a_last_block_of_another_kind_is_refused() -> None:
    unet = build(
        PLAIN
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        }
    )
    with pytest.raises(
        UserError, match="ends with ResnetUpsampleBlock2D cannot be reused; allowed: UpBlock2D"
    ):
        check_cut(unet)
    (x, t), c = inputs(1), conditions(unet)
    with pytest.raises(UserError, match="cannot be reused"):
        predict_reusing(unet, x, t, c, [None] * NUM_ROWS)
