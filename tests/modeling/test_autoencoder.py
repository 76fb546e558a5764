# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The autoencoder against the recorded reference, its file, and latents as tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.transforms import patchify
from modeling import load_bagel
from modeling.autoencoder import (
    AutoEncoder,
    decode_tokens,
    encode_tokens,
    latent_grid,
    latent_tokens,
    load_autoencoder,
    to_uint8,
)
from tests.conftest import TINY_BAGEL, assert_golden, load_golden


@pytest.fixture(scope="module")
def vae() -> AutoEncoder:
    return load_autoencoder(TINY_BAGEL)


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(TINY_BAGEL / "ae.safetensors")


@torch.no_grad()
def test_golden(vae: AutoEncoder) -> None:
    meta, t = load_golden("08_ae")
    image, noise = t["image_chw"][None], t["sample_noise"]
    mean, logvar = vae.moments(image)
    latent = vae.encode(image, noise=noise)
    assert_golden(meta, "mean", mean, t["mean"])
    assert_golden(meta, "logvar", logvar, t["logvar"])
    assert_golden(meta, "encoded_latent", latent, t["encoded_latent"])
    assert_golden(meta, "decoded_image", vae.decode(t["decode_latent"]), t["decoded_image"])
    assert_golden(meta, "reconstruction", vae.decode(latent), t["reconstruction"])


@torch.no_grad()
def test_images_of_one_pack_are_padded_together(vae: AutoEncoder) -> None:
    """Golden 06 stores the padded pictures, the noise and the latents of the padded size."""
    _, t = load_golden("06_train_visual_gen_shift1")
    meta, _ = load_golden("06_train_visual_gen_shift1")
    shapes = meta["batch"]["patchified_vae_latent_shapes"]
    images = [
        picture[:, : 16 * h, : 16 * w]
        for picture, (h, w) in zip(t["padded_images"], shapes, strict=True)
    ]
    tokens = encode_tokens(vae, images, noise=t["vae_encode_noise"])
    for mine, latent, (h, w) in zip(tokens, t["padded_latent"], shapes, strict=True):
        expected = latent_tokens(latent[:, : 2 * h, : 2 * w])
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-4)
    # One image a call knows nothing of its neighbours.
    alone = encode_tokens(vae, images[1:2], noise=t["vae_encode_noise"][1:2, :, :10, :8])
    assert (alone[0] - tokens[1]).abs().max() > 0.1
    assert encode_tokens(vae, []) == []


def test_latents_as_tokens() -> None:
    meta, t = load_golden("02_patchify_positions")
    tokens = latent_tokens(t["latent"])
    assert_golden(meta, "latent_tokens", tokens, t["latent_tokens"])
    assert torch.equal(tokens, patchify(t["latent"], 2))
    assert torch.equal(latent_grid(tokens, 4, 3), t["latent"])


@torch.no_grad()
def test_noise_of_the_encoder(vae: AutoEncoder) -> None:
    image = torch.rand(2, 3, 16, 32) * 2 - 1
    mean, logvar = vae.moments(image)
    drawn = torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(5))
    expected = 0.3611 * (mean + torch.exp(0.5 * logvar) * drawn - 0.1159)
    assert torch.equal(vae.encode(image, generator=torch.Generator().manual_seed(5)), expected)
    torch.manual_seed(5)  # without a generator: torch's own, as the reference does
    assert torch.equal(vae.encode(image), expected)
    tokens = encode_tokens(vae, list(image), generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.stack(tokens), torch.stack([latent_tokens(x) for x in expected]))
    with pytest.raises(AssertionError, match=r"2, 16, 2, 4"):
        vae.encode(image, noise=drawn[:1])
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 20, 16))


@torch.no_grad()
def test_pictures(vae: AutoEncoder) -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 2.0]).expand(3, 1, 6)
    assert to_uint8(values)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    tokens = torch.randn(6, 64)
    picture = decode_tokens(vae, tokens, 2, 3)
    assert picture.shape == (32, 48, 3) and picture.dtype == torch.uint8
    assert torch.equal(picture, to_uint8(vae.decode(latent_grid(tokens, 2, 3)[None])[0]))


def test_release_sizes() -> None:
    """The release: 83,819,683 parameters at width 128, 244 tensors under the same names."""
    with torch.device("meta"):
        full = AutoEncoder()
    assert sum(p.numel() for p in full.parameters()) == 83_819_683
    assert full.state_dict().keys() == load_file(TINY_BAGEL / "ae.safetensors").keys()
    assert len(full.state_dict()) == 244


def test_loading(vae: AutoEncoder, stored: dict[str, Tensor], tmp_path: Path) -> None:
    assert vae.config.width == 32
    for key, value in vae.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, stored[key].float())
    assert not any(p.requires_grad for p in vae.parameters())
    with pytest.raises(ValueError, match="is missing: drawing"):
        load_autoencoder(tmp_path)

    def fails(tensors: dict[str, Tensor], cause: str) -> None:
        save_file(tensors, tmp_path / "ae.safetensors")
        with pytest.raises(ValueError, match=cause):
            load_autoencoder(tmp_path)

    key = "decoder.up.1.block.0.nin_shortcut.weight"
    fails({k: v for k, v in stored.items() if k != key}, f"1 missing: {key}")
    fails({**stored, "quant_conv.weight": torch.ones(1)}, "1 unexpected: quant_conv.weight")
    fails({**stored, key: torch.ones(3)}, r"found \[3\], expected \[64, 128, 1, 1\]")
    fails({**stored, key: stored[key].to(torch.int8)}, f"{key}: I8")
    fails({"encoder.conv_in.bias": torch.ones(3)}, "not the autoencoder of a BAGEL release")
    thin = {**stored, "encoder.conv_in.weight": torch.ones(48, 3, 3, 3)}
    fails(thin, "width 48 must be a multiple of 32")


def test_load_bagel_brings_the_autoencoder(
    stored: dict[str, Tensor], tiny_bagel_path: Path, tmp_path: Path
) -> None:
    bundle = load_bagel(tiny_bagel_path, visual_gen=True, dtype=torch.bfloat16)
    assert bundle.vae is not None and bundle.vae.dtype == torch.float32
    for key, value in bundle.vae.state_dict().items():
        assert torch.equal(value, stored[key].float())
    assert load_bagel(tiny_bagel_path).vae is None
    bare = tmp_path / "bare"
    shutil.copytree(tiny_bagel_path, bare)
    (bare / "ae.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"lacks ae\.safetensors"):
        assert load_bagel(bare, visual_gen=True).vae is None
