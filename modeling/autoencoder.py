# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The FLUX-type autoencoder: pixels to latents and back. Parameter names are the release's.

A 3-channel image (H, W multiples of 16) becomes a 16-channel latent (H / 8, W / 8); 2 x 2 of its
positions make one token of 64 values, ordered (row, column, channel) like ViT patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.release.finite import check_finite
from modeling.release.weight_files import StoredTensor, describe_mismatch, read_file

AE_FILE = "ae.safetensors"
_GROUPS = 32


@dataclass(frozen=True)
class AutoEncoderConfig:
    """Sizes; the releases use the defaults, `width` is read from the weights."""

    width: int = 128
    width_factors: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks of an encoder level; the decoder has one more
    in_channels: int = 3
    latent_channels: int = 16
    scale: float = 0.3611
    shift: float = 0.1159

    @property
    def factor(self) -> int:
        """Pixels per latent position and side."""
        return int(2 ** (len(self.width_factors) - 1))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, swish, conv, twice, plus the input (through a 1 x 1 convolution if widths differ)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1 = _norm(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = _norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """One head over all positions, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        def rows(y: Tensor) -> Tensor:
            return y.flatten(2).transpose(1, 2)[:, None]  # (B, 1, H * W, C)

        normed = self.norm(x)
        y = F.scaled_dot_product_attention(
            rows(self.q(normed)), rows(self.k(normed)), rows(self.v(normed))
        )
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one zero column right, one zero row below


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the change to the next one."""

    def __init__(self, widths: Sequence[int], resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.resample = resample[0] if resample is not None else None
        if resample is not None:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.resample is None else getattr(self, self.resample)(x)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> moments (B, 32, H / 8, W / 8)."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.width * factor for factor in config.width_factors]
        self.conv_in = nn.Conv2d(config.in_channels, config.width, 3, padding=1)
        levels = []
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else config.width
            down = ("downsample", Downsample(width)) if i + 1 < len(widths) else None
            levels.append(Level([before] + [width] * config.blocks, down))
        self.down = nn.ModuleList(levels)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, 16, h, w) -> pixels (B, 3, 8 h, 8 w)."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.width * factor for factor in config.width_factors]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        levels = []  # numbered by resolution like the encoder's, so the last one runs first
        for i, width in enumerate(widths):
            before = widths[i + 1] if i + 1 < len(widths) else width
            up = ("upsample", Upsample(width)) if i else None
            levels.append(Level([before] + [width] * (config.blocks + 1), up))
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Encoder and decoder with the latents' scale and shift (keys `encoder.`, `decoder.`)."""

    def __init__(self, config: AutoEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or AutoEncoderConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.weight.device

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, 16, H / 8, W / 8), of pixels (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: a side that is no multiple of 8.
        """
        factor = self.config.factor
        if pixels.shape[-2] % factor or pixels.shape[-1] % factor:
            raise ValueError(
                f"an image of {pixels.shape[-2]} x {pixels.shape[-1]} pixels cannot be encoded: "
                f"both sides must be multiples of {factor}; use the VAE transform (stride 16)"
            )
        mean, logvar = self.encoder(pixels.to(self.device, self.dtype)).chunk(2, dim=1)
        return mean, logvar

    def encode(
        self,
        pixels: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scaled and shifted latents (B, 16, H / 8, W / 8); sampled, for conditioning too.

        Args:
            noise: standard normal values of the result's shape. Without it they are drawn from
                `generator` on its device, or from the global one of the weights' device, as the
                reference does.
        """
        mean, logvar = self.moments(pixels)
        if noise is None:
            device = generator.device if generator is not None else mean.device
            noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        assert noise.shape == mean.shape, (noise.shape, mean.shape)
        return self.sample(mean, logvar, noise)

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Scaled and shifted latents of `moments` and standard normal values of their shape."""
        z = mean + torch.exp(0.5 * logvar) * noise.to(mean.device, mean.dtype)
        return self.config.scale * (z - self.config.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, 8 h, 8 w), about [-1, 1], of latents (B, 16, h, w)."""
        z = latents.to(self.device, self.dtype) / self.config.scale + self.config.shift
        return self.decoder(z)


# -- latents as tokens ------------------------------------------------------------------------


def latent_tokens(latent: Tensor, patch: int = 2) -> Tensor:
    """(C, patch * h, patch * w) -> (h * w, patch * patch * C), in patch order."""
    channels, height, width = latent.shape
    assert height % patch == 0 and width % patch == 0, latent.shape
    grid = latent.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def latent_grid(tokens: Tensor, h: int, w: int, patch: int = 2) -> Tensor:
    """(h * w, patch * patch * C) -> (C, patch * h, patch * w): the inverse of `latent_tokens`."""
    assert tokens.shape[0] == h * w, (tokens.shape, h, w)
    grid = tokens.reshape(h, w, patch, patch, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, h * patch, w * patch)


def encode_tokens(
    vae: AutoEncoder,
    images: Sequence[Tensor],
    *,
    patch: int = 2,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Latent tokens, fp32 (h * w, 64), of the images (3, 16 h, 16 w) of one pack.

    Images are padded with mid grey at the right and below to the largest height and width, encoded
    in one call, and each latent is cropped to its own size. The padding changes the latents a
    little (group norms and the attention see it), so who wants a result that does not depend on
    its neighbours encodes one image a call.

    Args:
        noise: (images, 16, H / 8, W / 8) of the padded size; generator: see `AutoEncoder.encode`.
    """
    if not images:
        return []
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    padded = torch.stack(
        [F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images]
    )
    latents = vae.encode(padded, noise=noise, generator=generator).float()
    step = vae.config.factor
    return [
        latent_tokens(latent[:, : image.shape[-2] // step, : image.shape[-1] // step], patch)
        for latent, image in zip(latents, images, strict=True)
    ]


def decode_tokens(vae: AutoEncoder, tokens: Tensor, h: int, w: int, patch: int = 2) -> Tensor:
    """The picture behind (h * w, 64) tokens: uint8 (16 h, 16 w, 3) on the CPU."""
    return to_uint8(vae.decode(latent_grid(tokens, h, w, patch)[None])[0])


def to_uint8(pixels: Tensor) -> Tensor:
    """(3, H, W) about [-1, 1] -> uint8 (H, W, 3) on the CPU, truncated like the reference."""
    unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).to(torch.uint8).permute(1, 2, 0).cpu()


# -- loading ----------------------------------------------------------------------------------


def _read_config(stored: Mapping[str, StoredTensor], file: Path) -> AutoEncoderConfig:
    first, last = stored.get("encoder.conv_in.weight"), stored.get("decoder.conv_in.weight")
    if first is None or last is None or len(first.shape) != 4 or len(last.shape) != 4:
        raise ValueError(
            f"{file} is not the autoencoder of a BAGEL release: it must hold encoder.conv_in and "
            "decoder.conv_in as FLUX's ae.safetensors does (the diffusers layout differs)"
        )
    width = first.shape[0]
    if width % _GROUPS:
        raise ValueError(f"{file}: its width {width} must be a multiple of {_GROUPS}")
    return AutoEncoderConfig(width=width, in_channels=first.shape[1], latent_channels=last.shape[1])


def load_autoencoder(path: str | Path, *, device: torch.device | str = "cpu") -> AutoEncoder:
    """Read `ae.safetensors` of a checkpoint folder as fp32; sizes from its shapes.

    Raises:
        ValueError: file missing or damaged; tensors missing, unexpected, of another shape, or
            with values that are NaN or infinite.
    """
    file = Path(path) / AE_FILE
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: drawing and reading latents needs the release's autoencoder "
            "(python download_model.py fetches a complete folder)"
        )
    stored = read_file(file)
    config = _read_config(stored, file)
    with torch.device("meta"):
        vae = AutoEncoder(config)
    expected = {key: value.shape for key, value in vae.state_dict().items()}
    problems = describe_mismatch(expected, stored)
    if problems:
        raise ValueError(
            f"{file} does not hold the autoencoder of a BAGEL release: {problems}. Use the "
            "ae.safetensors of the same release"
        )
    state = {key: stored[key].get(device, torch.float32) for key in expected}
    check_finite(state, stored)
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.requires_grad_(False)
