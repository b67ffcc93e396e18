"""A VAE's encoder or decoder as a chain of steps, each of which needs little more than it computes.

Three things in a VAE look further than a tile: GroupNorm, whose statistics are of the whole map; attention,
whose keys are; and every convolution, which looks over the tile's edge. Cut at the first two, and what is
left of the network are convolutions with something pointwise around them: a `ConvStep`.

Maps are tensors (1, C, rows, columns); a step is told which rectangle of the map it has and which it is to
compute.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.chunked_attention import chunked_attention
from ldm.errors import UserError
from ldm.tiling.spans import Rect, Span

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock, UNetMidBlock2D

    from ldm.vae_files import DiffusersVae

__all__ = ["Affine", "AttentionStep", "ConvStep", "Step", "decoder_chain", "encoder_chain", "sizes"]

Pointwise: TypeAlias = Callable[[Tensor], Tensor]


class Cut(NamedTuple):
    """Rows to convolve, ``zeros`` to put around them, what the convolution pads, and rows to keep of it."""

    taken: slice
    zeros: tuple[int, int] = (0, 0)
    padding: int = 0
    kept: slice = slice(None)


@dataclass(frozen=True, eq=False)
class ConvStep:
    """``after((conv(up(act(norm(before(x))))) + kept) / divisor)``, each part but the convolution optional.

    ``padding``: rows of zeros before and after the map, columns alike. ``doubles``: whether ``up`` is there,
    which repeats every row and column; ``conv`` is 3×3 then, and pads by one. ``keeps``: what of this
    step's input (behind ``keeps``: an identity or a 1×1 convolution) is kept for the next step that
    ``adds`` it: the two ends of a residual connection.
    """

    conv: nn.Conv2d
    padding: tuple[int, int]
    before: Pointwise | None = None
    norm: nn.GroupNorm | None = None
    act: nn.Module | None = None
    doubles: bool = False
    keeps: nn.Module | None = None
    adds: bool = False
    divisor: float = 1.0
    after: Pointwise | None = None

    @property
    def in_channels(self) -> int:
        return self.conv.in_channels

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    @property
    def values_per_position(self) -> int:
        """Values of its output, or of its input where that has more, behind one position of the output."""
        return max(self.out_channels, self.in_channels * self.conv.stride[0] ** 2)

    @property
    def kept_channels(self) -> int:
        """0 where nothing is kept."""
        if isinstance(self.keeps, nn.Conv2d):
            return self.keeps.out_channels
        return self.in_channels if self.keeps is not None else 0

    def out_size(self, size: int) -> int:
        """Rows of the output of ``size`` rows; columns alike."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        return (size * self._scale + sum(self.padding) - kernel) // stride + 1

    def needs(self, out: Span, size: int) -> Span:
        """Rows of the input, which has ``size``, that the rows ``out`` of the output are computed from."""
        inside = self._taps(out).clip(size * self._scale)
        return Span(inside.start // self._scale, -(-inside.stop // self._scale))

    def run(
        self, x: Tensor, have: Rect, want: Rect, in_size: tuple[int, int], affine: "Affine | None"
    ) -> Tensor:
        """The rectangle ``want`` of the output, without what is added and what comes after that.

        x: the rectangle ``have`` of the input, which must hold what `needs` says. in_size: rows and columns
        of the whole input. affine: of ``norm``, for the statistics of the whole map.
        """
        if self.before is not None:
            x = self.before(x)
        if affine is not None:
            x = affine(x)
        if self.act is not None:
            x = self.act(x)
        if self.doubles:
            return self._doubled(x, have, want)
        rows, columns = (
            self._cut(out, had, size) for out, had, size in zip(want, have, in_size, strict=True)
        )
        x = x[..., rows.taken, columns.taken]
        if any(columns.zeros + rows.zeros):
            x = F.pad(x, columns.zeros + rows.zeros)
        padding = (rows.padding, columns.padding)
        y = F.conv2d(x, self.conv.weight, self.conv.bias, self.conv.stride, padding)
        return y[..., rows.kept, columns.kept]

    def _doubled(self, x: Tensor, have: Rect, want: Rect) -> Tensor:
        """Upsampling and convolution in one.

        Of the three rows under the kernel two are the same one, so that four convolutions of 2×2, one for
        each parity of row and column, do with 16 multiplications what takes 36 afterwards. Everything is
        padded by one: what padding reaches is cut off, but for the map's own edges.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        shape = (x.shape[0], self.out_channels, want.rows.size, want.columns.size)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for (odd_row, odd_column), weight in self._kernels_by_parity.items():
            found = F.conv2d(x, weight, self.conv.bias, padding=1)
            (rows, to_rows), (columns, to_columns) = (
                _of_parity(odd, out, had)
                for odd, out, had in zip((odd_row, odd_column), want, have, strict=True)
            )
            y[..., to_rows, to_columns] = found[..., rows, columns]
        return y

    @cached_property
    def _kernels_by_parity(self) -> dict[tuple[int, int], Tensor]:
        """2×2 kernels for the output's even (0) and odd (1) rows and columns."""
        weight = self.conv.weight
        folds = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).to(
            weight.device, torch.float64
        )
        return {
            (row, column): (folds[row] @ weight.double() @ folds[column].T)
            .to(weight.dtype)
            .contiguous(memory_format=torch.channels_last)
            for row in (0, 1)
            for column in (0, 1)
        }

    @property
    def _scale(self) -> int:
        return 2 if self.doubles else 1

    def finish(self, y: Tensor, kept: Tensor | None) -> Tensor:
        """Add what was kept, and apply what comes after; may change ``y`` in place."""
        if kept is not None:
            y = y.add_(kept)
        if self.divisor != 1.0:
            y = y.div_(self.divisor)
        return y if self.after is None else self.after(y)

    def _taps(self, out: Span) -> Span:
        """Rows of the upsampled input that the kernel touches, zeros beyond the map's edges included."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        return Span(out.start * stride - self.padding[0], (out.stop - 1) * stride - self.padding[0] + kernel)

    def _cut(self, out: Span, have: Span, size: int) -> "Cut":
        """How the rows ``have`` of an input of ``size`` become the rows ``out``.

        Where the kernel looks over an edge of the map, the convolution pads by itself, on both sides: that
        costs a row too many at the other side, and saves a copy of the tile.
        """
        taps = self._taps(out)
        inside = taps.clip(size)
        before, after = inside.start - taps.start, taps.stop - inside.stop
        taken, width = inside.within(have), self.padding[0]
        if (before, after) == (0, 0):
            return Cut(taken)
        if self.conv.stride[0] > 1 or before not in (0, width) or after not in (0, width):
            return Cut(taken, zeros=(before, after))
        return Cut(taken, padding=width, kept=slice(0 if before else width, None if after else -width))


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """Self-attention over the whole map, with its residual connection: queries of a tile against all keys."""

    attention: "Attention"

    @property
    def norm(self) -> nn.GroupNorm:
        norm = self.attention.group_norm
        assert isinstance(norm, nn.GroupNorm)
        return norm

    @property
    def in_channels(self) -> int:
        return self.norm.num_channels

    out_channels = values_per_position = in_channels

    def out_size(self, size: int) -> int:
        return size

    def needs(self, out: Span, size: int) -> Span:
        """Of the map itself; of keys and values all."""
        return out

    def keys_and_values(self, x: Tensor, affine: "Affine") -> tuple[Tensor, Tensor]:
        """(1, C, rows, columns) each, for a part of the map."""
        normed = _positions(affine(x))
        return tuple(_as_map(project(normed), x) for project in (self.attention.to_k, self.attention.to_v))  # type: ignore[return-value]

    def run(self, x: Tensor, affine: "Affine", keys_1NC: Tensor, values_1NC: Tensor) -> Tensor:
        """The attention's output for the positions of ``x``, which may be a part of the map."""
        attention = self.attention
        query = self._heads(attention.to_q(_positions(affine(x))))
        keys, values = self._heads(keys_1NC), self._heads(values_1NC)
        max_queries = max(1, MAX_SCORES // keys.shape[2])
        attended = chunked_attention(query, keys, values, max_queries=max_queries)
        joined = attended.transpose(1, 2).flatten(2).to(x.dtype)
        y = _as_map(attention.to_out[0](joined), x)
        if attention.residual_connection:
            y = y + x
        return y / float(attention.rescale_output_factor)

    def _heads(self, x_1NC: Tensor) -> Tensor:
        heads = int(self.attention.heads)
        return x_1NC.view(1, -1, heads, x_1NC.shape[2] // heads).transpose(1, 2)


# Queries × keys at a time: where torch has no memory-efficient kernel, it makes a matrix of them.
MAX_SCORES = 2**26

Step: TypeAlias = ConvStep | AttentionStep


class Affine:
    """GroupNorm with given statistics: a scale and a shift for each channel."""

    def __init__(self, norm: nn.GroupNorm, mean_G: Tensor, variance_G: Tensor) -> None:
        self.norm = norm
        per_group = norm.num_channels // norm.num_groups
        precision = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
        self.mean_C, self.variance_C = (
            statistic.to(norm.weight.device, precision).repeat_interleave(per_group)
            for statistic in (mean_G, variance_G)
        )

    def __call__(self, x: Tensor) -> Tensor:
        # A batch norm with fixed statistics is this very scale and shift, and has a kernel everywhere.
        norm = self.norm
        return F.batch_norm(x, self.mean_C, self.variance_C, norm.weight, norm.bias, False, 0.0, norm.eps)


def sizes(chain: Sequence[Step], in_size: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of the input of every step, and of the last one's output."""
    found = [in_size]
    for step in chain:
        found.append((step.out_size(found[-1][0]), step.out_size(found[-1][1])))
    return found


def decoder_chain(vae: "DiffusersVae") -> list[Step]:
    """Latent → image, as ``vae.decode`` computes it. UserError for a VAE that cannot be tiled."""
    if type(vae).__name__ == "AutoencoderTiny":
        return list(_tiny_decoder(vae))
    _check_blocks(vae, vae.decoder.up_blocks, "UpDecoderBlock2D")
    return list(_kl_decoder(vae))


def encoder_chain(vae: "DiffusersVae") -> list[Step]:
    """Image → the posterior's mean and log variance (latent of a Tiny), as ``vae.encode`` computes it."""
    if type(vae).__name__ == "AutoencoderTiny":
        return list(_tiny_encoder(vae))
    _check_blocks(vae, vae.encoder.down_blocks, "DownEncoderBlock2D")
    return list(_kl_encoder(vae))


def _check_blocks(vae: "DiffusersVae", blocks: Sequence[nn.Module], allowed: str) -> None:
    found = {type(block).__name__ for block in blocks} - {allowed}
    if type(vae).__name__ != "AutoencoderKL" or found:
        what = ", ".join(sorted(found)) or type(vae).__name__
        raise UserError(
            f"a VAE with {what} cannot be tiled",
            allowed=f"AutoencoderTiny, or AutoencoderKL of {allowed}",
            do="use --tiling.mode whole",
        )


def _kl_decoder(vae: "DiffusersVae") -> Iterator[Step]:
    decoder = vae.decoder
    if vae.post_quant_conv is not None:
        yield _conv(vae.post_quant_conv)
    yield _conv(decoder.conv_in)
    yield from _middle(decoder.mid_block)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            yield from _resnet(resnet)
        for upsampler in block.upsamplers or ():
            yield replace(_conv(upsampler.conv), doubles=True)
    yield replace(_conv(decoder.conv_out), norm=decoder.conv_norm_out, act=decoder.conv_act)


def _kl_encoder(vae: "DiffusersVae") -> Iterator[Step]:
    encoder = vae.encoder
    yield _conv(encoder.conv_in)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            yield from _resnet(resnet)
        for downsampler in block.downsamplers or ():
            # diffusers pads below and to the right before it convolves (`Downsample2D`).
            yield ConvStep(downsampler.conv, (0, 1) if downsampler.padding == 0 else (1, 1))
    yield from _middle(encoder.mid_block)
    yield replace(_conv(encoder.conv_out), norm=encoder.conv_norm_out, act=encoder.conv_act)
    if vae.quant_conv is not None:
        yield _conv(vae.quant_conv)


def _middle(block: "UNetMidBlock2D") -> Iterator[Step]:
    yield from _resnet(block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            yield AttentionStep(attention)
        yield from _resnet(resnet)


def _resnet(block: "ResnetBlock2D") -> Iterator[Step]:
    shortcut = nn.Identity() if block.conv_shortcut is None else block.conv_shortcut
    act = block.nonlinearity
    yield replace(_conv(block.conv1), norm=block.norm1, act=act, keeps=shortcut)
    divisor = float(block.output_scale_factor)
    yield replace(_conv(block.conv2), norm=block.norm2, act=act, adds=True, divisor=divisor)


def _tiny_decoder(vae: "DiffusersVae") -> list[ConvStep]:
    steps = _tiny_layers(vae.decoder.layers)
    steps[0] = replace(steps[0], before=_bounded)
    steps[-1] = replace(steps[-1], after=_from_unit_interval)
    return steps


def _tiny_encoder(vae: "DiffusersVae") -> list[ConvStep]:
    steps = _tiny_layers(vae.encoder.layers)
    steps[0] = replace(steps[0], before=_to_unit_interval)
    return steps


def _tiny_layers(layers: Sequence[nn.Module]) -> list[ConvStep]:
    """Steps of an EncoderTiny or DecoderTiny: convolutions, activations, upsamplings and residual blocks."""
    steps: list[ConvStep] = []
    doubles = False
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            steps.append(replace(_conv(layer), doubles=doubles))
            doubles = False
        elif isinstance(layer, nn.Upsample) and (layer.mode, layer.scale_factor) == ("nearest", 2):
            doubles = True
        elif type(layer).__name__ == "AutoencoderTinyBlock":
            steps.extend(_tiny_block(layer))
        elif isinstance(layer, nn.ReLU | nn.SiLU | nn.GELU | nn.Mish):
            steps[-1] = replace(steps[-1], after=layer)
        else:
            raise UserError(f"an AutoencoderTiny with {layer} cannot be tiled", do="use --tiling.mode whole")
    return steps


def _tiny_block(block: "AutoencoderTinyBlock") -> Iterator[ConvStep]:
    first, act, second, _, third = block.conv
    yield replace(_conv(first), keeps=block.skip)
    yield replace(_conv(second), act=act)
    yield replace(_conv(third), act=act, adds=True, after=block.fuse)


def _conv(conv: nn.Conv2d) -> ConvStep:
    width = int(conv.padding[0])
    return ConvStep(conv, (width, width))


def _positions(x: Tensor) -> Tensor:
    """(1, C, rows, columns) → (1, rows · columns, C)."""
    return x.flatten(2).transpose(1, 2)


def _as_map(x_1NC: Tensor, like: Tensor) -> Tensor:
    return x_1NC.transpose(1, 2).reshape(1, -1, *like.shape[2:])


def _of_parity(odd: int, out: Span, have: Span) -> tuple[slice, slice]:
    """Rows ``out`` of one parity: where these are in a 2-high convolution of ``have``, and in ``out``."""
    first, last = -(-(out.start - odd) // 2), -(-(out.stop - odd) // 2)
    start = first + odd - have.start
    return slice(start, start + last - first), slice(2 * first + odd - out.start, None, 2)


# What diffusers' EncoderTiny and DecoderTiny do outside their layers.
def _bounded(x: Tensor) -> Tensor:
    return torch.tanh(x / 3) * 3


def _to_unit_interval(x: Tensor) -> Tensor:
    return x.add(1).div(2)


def _from_unit_interval(x: Tensor) -> Tensor:
    return x.mul(2).sub(1)
