# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""BAGEL: packed segments in, hidden states out. Parameter names are those of the releases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from modeling import fast
from modeling.bagel.attention import DecodeLayout
from modeling.bagel.batch import PackedBatch, PackedLatents, SharedFeatures
from modeling.bagel.config import BagelConfig
from modeling.bagel.decoder import DecoderLayer, LanguageModel, Routing
from modeling.bagel.embeddings import Connector, PositionTable, TimestepEmbedder, sincos_table
from modeling.bagel.kv_cache import KeyValues, KVCache
from modeling.bagel.layer import Layer
from modeling.bagel.vision import VisionLayer, VisionModel
from modeling.bagel.vit_graphs import run_vit

Head: TypeAlias = Callable[[Tensor, Tensor], Any]
FlowHead: TypeAlias = Callable[[Tensor], Any]


class Bagel(nn.Module):
    """Understanding branch of BAGEL (and the generation weights when `config.visual_gen`).

    There is one forward for training, scoring and cached inference; nothing depends on
    `self.training`, and there are no buffers.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.llm.hidden_size
        self.language_model = LanguageModel(config.llm, config.visual_gen)
        self.vit_model = VisionModel(config.vision, config.vit_max_patches_per_side)
        self.connector = Connector(config.vision.hidden_size, width)
        self.vit_pos_embed = PositionTable(width, config.vit_max_patches_per_side)
        if config.visual_gen:
            self.time_embedder = TimestepEmbedder(width)
            self.vae2llm = nn.Linear(config.latent_dim, width)
            self.llm2vae = nn.Linear(width, config.latent_dim)
            self.latent_pos_embed = PositionTable(width, config.max_latent_size)

    @staticmethod
    def fixed_tables(config: BagelConfig) -> dict[str, Tensor]:
        """The sin-cos tables (fp32) that a checkpoint file may lack, by key."""
        width = config.llm.hidden_size
        tables = {"vit_pos_embed.pos_embed": sincos_table(width, config.vit_max_patches_per_side)}
        if config.visual_gen:
            tables["latent_pos_embed.pos_embed"] = sincos_table(width, config.max_latent_size)
        return tables

    @staticmethod
    def block_classes() -> tuple[type[nn.Module], ...]:
        """Modules that are sharded, compiled and checkpointed one by one."""
        return (DecoderLayer, VisionLayer)

    def set_gradient_checkpointing(self, enabled: bool, layers: int | None = None) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them.

        layers: of the decoder's, only so many, the first ones, whose activations would be kept
            longest; None: all.
        """
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.checkpointing = enabled and (layers is None or module.layer < layers)
            elif isinstance(module, Layer):
                module.checkpointing = enabled

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the (gathered) embedding."""
        return self.language_model.model.embed_tokens.weight.dtype

    @property
    def layer_devices(self) -> tuple[torch.device, ...] | None:
        """Where each decoder layer computes; None: all where the prompt is."""
        return self.language_model.model.layer_devices

    def encode_images(self, batch: PackedBatch, images: Sequence[int]) -> Tensor:
        """ViT outputs of some images of a batch: (their patches, Hv)."""
        assert batch.vit_patches is not None
        patches, positions, lens = batch.vit_patches, batch.vit_position_ids, batch.vit_lens
        if len(images) < len(lens):
            rows = batch.patch_rows(images)
            patches, positions = patches[rows], positions[rows]
            lens = tuple(lens[i] for i in images)
        return self.vit_model(patches, positions, lens)

    def connect_images(self, features: Tensor, position_ids: Tensor) -> Tensor:
        """Connector and position table: (Nv, Hv) -> (Nv, H)."""
        features = self.connector(features)
        return features + self.vit_pos_embed(position_ids).to(features.dtype)

    def vit_features(self, batch: PackedBatch) -> Tensor:
        """ViT outputs of all images of a batch, (Nv, Hv); shared ones are taken as they are."""
        shared, every = batch.shared_features, range(len(batch.vit_lens))
        if shared is None:
            return self.encode_images(batch, every)
        assert shared.features is not None
        others = [i for i in every if i not in shared.images]
        if not others:
            return shared.features
        new = self.encode_images(batch, others)
        whole = new.new_empty(len(batch.vit_position_ids), new.shape[-1])
        whole = whole.index_copy_(0, batch.patch_rows(shared.images), shared.features)
        return whole.index_copy_(0, batch.patch_rows(others), new)

    def embed(self, batch: PackedBatch) -> Tensor:
        """Input rows (T, H) of a packed sequence."""
        text = self.language_model.model.embed_tokens(batch.text_ids)
        x = text.new_zeros((batch.total, text.shape[-1])).index_copy(0, batch.text_rows, text)
        if batch.vit_patches is not None:
            features = self.connect_images(self.vit_features(batch), batch.vit_position_ids)
            x = x.index_copy(0, batch.vit_rows, features.to(x.dtype))
        if batch.latents is not None:
            x = x.index_copy(0, batch.latents.rows, self.embed_latents(batch.latents).to(x.dtype))
        return x

    def embed_latents(self, latents: PackedLatents) -> Tensor:
        """Latent tokens with their flow time and fixed position: (Nl, H)."""
        if not self.config.visual_gen:
            raise ValueError(
                "the sequence holds latent tokens, but the model was built without its generation "
                "expert; load it with visual_gen=True"
            )
        x = self.vae2llm(latents.tokens.to(self.vae2llm.weight.dtype))
        times = self.time_embedder(latents.times)[latents.images]
        return x + times + self.latent_pos_embed(latents.position_ids).to(x.dtype)

    @fast.on_its_gpu
    def forward(
        self,
        batch: PackedBatch,
        *,
        head: Head | None = None,
        flow_head: FlowHead | None = None,
        cache: KeyValues | None = None,
        share: SharedFeatures | None = None,
    ) -> Any:
        """Run a packed sequence; with a cache its keys and values are stored there.

        Args:
            head: called with the hidden states of the scored rows (S, H) and the head weight
                (V, H) before this forward ends, because under FSDP2 the head is sharded again
                afterwards; its result is returned.
            flow_head: likewise called with the velocities (M, 64) of the noised images' rows,
                in the compute dtype.
            share: images whose ViT outputs another forward takes; they are left in it, with a
                gradient if the ViT trains, also where the rest of this forward has none.

        Returns:
            hidden states (T, H), or what `head` or `flow_head` returned, or both results.

        Raises:
            ValueError: latent tokens and a model without generation expert, or `flow_head` and
                no latent tokens.
        """
        latents = batch.latents
        if flow_head is not None and latents is None:
            raise ValueError("flow_head needs a sequence with a latent image; pack one")
        if share is not None:
            with torch.enable_grad():
                share.features = self.encode_images(batch, share.images)
            batch = batch.with_features(share.features.detach(), share.images)
        hidden = self._decode(batch, cache)
        velocities = None
        if flow_head is not None:
            assert latents is not None
            velocities = flow_head(self.llm2vae(hidden[latents.velocity_rows]))
            if head is None:
                return velocities
        if head is None:
            return hidden
        scored = head(hidden[batch.score_rows], self.language_model.lm_head.weight)
        return scored if flow_head is None else (scored, velocities)

    @fast.on_its_gpu
    def fill_cache(self, batch: PackedBatch, cache: KeyValues) -> None:
        """Keys and values of a packed sequence into `cache`; its hidden states are not wanted."""
        if batch.vit_patches is not None and batch.shared_features is None:
            images = batch.vit_patches, batch.vit_position_ids, batch.vit_lens
            batch = batch.with_features(run_vit(self.vit_model, *images))
        self._decode(batch, cache, keys_only=True)

    def _decode(
        self, batch: PackedBatch, cache: KeyValues | None, *, keys_only: bool = False
    ) -> Tensor:
        """Hidden states (T, H) of a packed sequence; keys_only: see `Decoder`."""
        latents = batch.latents
        # Without latent rows the understanding expert does everything.
        routing = Routing(latents.und_rows, latents.rows) if latents is not None else None
        hidden: Tensor = self.language_model.model(
            self.embed(batch), batch.position_ids, batch.layout, routing, cache, keys_only
        )
        return hidden

    def decode_step(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: KVCache
    ) -> Tensor:
        """One token of each sample against the static cache.

        Args:
            tokens, positions, slots: (B,) int64; input token, its rope position, and the cache
                row where its key and value are written.

        Returns:
            (B, V) logits in the compute dtype.
        """
        x = self.language_model.model.embed_tokens(tokens)
        hidden = self.language_model.model(x, positions, DecodeLayout(slots), cache=cache)
        return self.language_model.lm_head(hidden)
