# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The trainer's settings, by concern. Defaults are the paper's; names are the reference's flags."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from data.sequence import Prompts
from data.visual_thoughts import VT_KINDS, VT_MEANINGS
from modeling.bagel.adapters import PARTS, PROJECTIONS
from scripts.visual_opsd.cli import (
    PACKED,
    ROUNDS,
    ROWS,
    SEEDS,
    SHARES,
    SHIFTS,
    SIDES,
    TEMPERATURES,
    TIMEOUTS,
    TOGETHER,
    TOKENS,
    WEIGHTS,
    Settings,
    option,
)
from scripts.visual_opsd.on_policy_sampler import SamplerSettings
from scripts.visual_opsd.opsd_loss import CLIP_SCOPES, LOSS_KINDS, LossConfig, early_tokens
from scripts.visual_opsd.run_config import PlanSettings, RunSettings
from scripts.visual_opsd.validation_config import ValidationSettings

TEACHER_MODES = ("ema", "fixed", "self")
TEACHER_VTS = ("vit", "vae+vit")
CONTRASTS = ("noise", "other", "none")
OPTIMIZER_STATES = ("gpu", "host", "8bit")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of the forward passes.

    Raises:
        ValueError: bf16 asked for on a CPU, where everything is fp32.
    """
    if precision == "bf16" and device.type == "cpu":
        raise ValueError("precision bf16 needs a GPU; on a CPU use --precision fp32 (or auto)")
    if precision == "fp32" or device.type == "cpu":
        return torch.float32
    return torch.bfloat16


@dataclass(frozen=True)
class ModelSettings(Settings):
    model_path: str = option("models/ThinkMorph-7B", "release folder to start from", path=True)
    visual_gen: bool = option(
        False, "only `False` is accepted: a run loads what it needs of the drawing branch by "
        "itself, and only interleaved SFT trains it; otherwise a saved folder holds the base's "
        "generation weights",
    )  # fmt: skip
    freeze_llm: bool = option(False, "do not train decoder, embeddings and head")
    freeze_vit: bool = option(False, "do not train the ViT")
    freeze_und: bool = option(False, "do not train the connector between ViT and decoder")
    precision: str = option(
        "auto", "compute dtype: `auto` is `bf16` on CUDA and `fp32` on the CPU; masters, EMA and "
        "gradient reduction are fp32 always", choices=("auto", "bf16", "fp32"),
    )  # fmt: skip
    activation_checkpointing: bool = option(True, "recompute activations in the backward pass")
    checkpointed_layers: int | None = option(
        None, "with checkpointing: how many decoder layers recompute, the first ones; `none`: "
        "all. Where memory is left, fewer layers cost less time", at_least=0, at_most=10_000,
    )  # fmt: skip
    compile_blocks: bool = option(False, "`torch.compile` every block, instead of our kernels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visual_gen:
            raise ValueError(
                "--visual_gen True: only interleaved SFT trains the drawing branch (train_sft "
                "--mode interleaved); otherwise the saved folder holds the base's"
            )


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Low-rank adapters (arXiv 2106.09685) on a frozen base, instead of training the weights."""

    lora_rank: int | None = option(
        None, "train adapters of this rank beside the frozen base; `none`: train the weights",
        at_least=1, at_most=8192,
    )  # fmt: skip
    lora_alpha: float | None = option(
        None, "adapters count `lora_alpha / lora_rank` times; `none`: twice", above=0, at_most=1e6
    )
    lora_targets: str = option(
        "llm", "layers that have adapters, by commas: all linear ones of `llm` (the decoder's "
        "understanding branch), `vit` or `connector`, or the decoder's of one name (`q_proj`, ...)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank is not None:
            return
        for spec in fields(self):  # without adapters all weights train, which is not what was meant
            if getattr(self, spec.name) != spec.default:
                raise ValueError(
                    f"--{spec.name} is of adapters, and there are none: add --lora_rank R, or "
                    "leave it out"
                )

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.lora_targets.split(",") if part.strip())


@dataclass(frozen=True)
class PromptSettings(Settings):
    """What the contexts are made of; shared by training, evaluation and the diagnostic."""

    prompt_style: str = option(
        "packer", "`packer`: the prompt the paper trained with; `inferencer`: the one of the "
        "VLMEvalKit wrapper", choices=("packer", "inferencer"),
    )  # fmt: skip
    image_path: str = option(
        "direct", "`direct`: ViT resize only; `inferencer`: first the VAE's resize, as the "
        "released inferencer does", choices=("direct", "inferencer"),
    )  # fmt: skip
    prompts: str | None = option(
        None, "YAML file that replaces `system`, `intro`, `transition`, `instruction_suffix`, "
        "`question_prefix`", path=True,
    )  # fmt: skip
    use_system_prompt: bool = option(True, "begin with the system prompt")
    use_reference_intro: bool = option(True, "teacher: text before the VTs")
    use_transition_prompt: bool = option(True, "teacher: text after the VTs")
    instruction_suffix: str = option("", "appended to every question")
    vit_max_size: int = option(980, "longest side of a ViT image, in pixels", **SIDES)
    vit_min_size: int = option(378, "shortest side of a ViT image", **SIDES)
    vit_stride: int = option(14, "sides are multiples of this, the ViT's patch", **SIDES)
    vit_max_pixels: int = option(
        2007040, "area of a ViT image at most", at_least=1, at_most=SIDES["at_most"] ** 2
    )
    vae_max_size: int = option(
        1024, "longest side of a picture that the autoencoder encodes, where one does", **SIDES
    )
    vae_min_size: int = option(
        512, "shortest side of such a picture; sides are multiples of 16", **SIDES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in ("vit", "vae"):
            least, most = getattr(self, f"{kind}_min_size"), getattr(self, f"{kind}_max_size")
            if least > most:
                raise ValueError(
                    f"--{kind}_min_size must be at most --{kind}_max_size ({most}), got {least}"
                )

    def build(self) -> Prompts:
        """The strings, after every switch."""
        prompts = Prompts.for_style(self.prompt_style)
        if self.prompts:
            prompts = Prompts.from_yaml(self.prompts, prompts)
        return replace(
            prompts,
            system=prompts.system if self.use_system_prompt else None,
            intro=prompts.intro if self.use_reference_intro else None,
            transition=prompts.transition if self.use_transition_prompt else None,
            instruction_suffix=self.instruction_suffix or prompts.instruction_suffix,
        )

    def vit_config(self) -> dict[str, int]:
        """Arguments of `data.transforms.ImageTransform`."""
        return {
            "max_size": self.vit_max_size,
            "min_size": self.vit_min_size,
            "stride": self.vit_stride,
            "max_pixels": self.vit_max_pixels,
        }

    def vae_config(self) -> dict[str, int]:
        """The same for the autoencoder; a latent token covers 16 x 16 pixels."""
        return {"max_size": self.vae_max_size, "min_size": self.vae_min_size, "stride": 16}


@dataclass(frozen=True)
class DataSettings(Settings):
    dataset_config_file: str = option(
        "data/configs/opsd.yaml", "data sets, weights, row budgets", path=True
    )
    data_root: str | None = option(
        None, "folder of the data sets, else `VISUAL_OPSD_DATA_ROOT`, else `datasets`", path=True
    )
    num_workers: int = option(
        2, "decoding processes of each rank; 0 decodes in the trainer", at_least=0, at_most=512
    )
    prefetch_factor: int = option(2, "steps each worker prepares ahead", at_least=1, at_most=1024)
    data_seed: int = option(42, "order of the rows", **SEEDS)
    global_batch_size: int = option(
        16, "rows of an optimiser step, over all ranks", at_least=1, at_most=2**20
    )
    max_bad_rate: float = option(
        0.01, "share of rejected rows beyond which training stops", **SHARES
    )
    sft_format: str = option(
        "single", "SFT target: `single` completion, or `reference`: the authors' two text splits",
        choices=("single", "reference"),
    )  # fmt: skip


@dataclass(frozen=True)
class TeacherSettings(Settings):
    teacher_mode: str = option(
        "ema", "ema (follows the student), fixed (the base) or self (the live weights)",
        choices=TEACHER_MODES,
    )  # fmt: skip
    ema_decay: float = option(0.995, "share the EMA keeps at each step", at_least=0, below=1)
    teacher_vt: str = option(
        "vit", "what the teacher reads of a VT: `vit`, its ViT image; `vae+vit`, its latents "
        "before that, as a released model reads what it drew (loads the drawing branch for the "
        "teacher, and the autoencoder)", choices=TEACHER_VTS,
    )  # fmt: skip
    vt: str = option(
        "real", f"what the teacher sees in the place of a row's VTs: `real`, or a control. "
        f"{VT_MEANINGS}. Rows, texts and lengths stay the same (but for `none`'s length)",
        choices=VT_KINDS,
    )  # fmt: skip
    noise_vt: bool = option(False, "`True`: the same as `--vt noise`")
    contrast: float = option(
        0.0, "A: the target becomes log p + A (log p - log p'), renormalised; p' is the teacher's "
        "distribution with `--contrast_with` in the place of the VTs, one more forward of it. The "
        "teacher's figures are then of this target; 0: p itself", at_least=0, at_most=100,
    )  # fmt: skip
    contrast_with: str = option(
        "noise", "what p' is shown: `noise`, `other` or `none`, as in `--vt`", choices=CONTRASTS
    )
    teacher_cpu_offload: bool = option(False, "keep the teacher's shards in host memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast and self.contrast_with == self.shown:
            raise ValueError(
                f"--contrast_with {self.contrast_with} is what the teacher sees (--vt), so there "
                "is nothing to contrast: choose another, or leave --contrast out"
            )
        if self.noise_vt and self.vt not in ("real", "noise"):
            raise ValueError(
                f"--noise_vt True means --vt noise, which contradicts --vt {self.vt}: leave one out"
            )
        contrast_with = self.contrast_with if self.contrast else None
        for flag, kind in (("vt", self.vt), ("contrast_with", contrast_with)):
            if kind == "none" and self.teacher_vt == "vae+vit":
                raise ValueError(
                    f"--{flag} none shows no picture whose latents --teacher_vt vae+vit could "
                    "read: choose another"
                )

    @property
    def shown(self) -> str:
        """The kind of `data.visual_thoughts` that the teacher sees."""
        return "noise" if self.noise_vt else self.vt


@dataclass(frozen=True)
class SampleSettings(Settings):
    sample_max_new_tokens: int = option(
        1024, "budget of a completion over all its rounds", **TOKENS
    )
    sample_temperature: float = option(
        1.0, "temperature of the policy",
        **TEMPERATURES, hint="for greedy completions use --sample_do_sample False",
    )  # fmt: skip
    sample_do_sample: bool = option(True, "`False`: greedy")
    sample_max_image_skips: int = option(1, "rounds that may follow an `<image_start>`", **ROUNDS)
    sample_batch_size: int = option(
        64, "rows decoded together; no effect on the result", **TOGETHER
    )
    max_forward_tokens: int = option(
        10240, "longest sequence of one row; a completion is cut to fit the longer of its two "
        "contexts", **PACKED,
    )  # fmt: skip
    pack_tokens: int = option(16384, "tokens of a pack of several rows", **PACKED)

    @property
    def memory_advice(self) -> str:
        """What to lower where rows that are decoded or packed together do not fit."""
        return (
            f"lower --sample_batch_size ({self.sample_batch_size}), --pack_tokens "
            f"({self.pack_tokens}) or --sample_max_new_tokens ({self.sample_max_new_tokens})"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What a sampled completion depends on, by flag."""
        names = ("max_new_tokens", "temperature", "do_sample", "max_image_skips")
        return {f"sample_{name}": getattr(self, f"sample_{name}") for name in names}

    def sampler(self) -> SamplerSettings:
        return SamplerSettings(
            max_new_tokens=self.sample_max_new_tokens,
            temperature=self.sample_temperature,
            do_sample=self.sample_do_sample,
            max_image_skips=self.sample_max_image_skips,
            max_rows=self.sample_batch_size,
        )


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """What Visual-OPSD's rows are completed with."""

    completions_per_row: int = option(
        1, "completions of each row in a step, each with random numbers of its own; scored as so "
        "many rows", **TOGETHER,
    )  # fmt: skip
    off_policy_share: float = option(
        0.0, "share of the rows that take the data set's text trace, with its answer, in the place "
        "of their completions", **SHARES,
    )  # fmt: skip
    vt_rehearsal: float = option(
        0.0, "share of the rows in which the student, too, sees what the teacher sees, and "
        "completes them so", **SHARES,
    )  # fmt: skip


@dataclass(frozen=True)
class LossSettings(Settings):
    jsd_weight: float = option(1.0, "weight of the divergence", **WEIGHTS)
    jsd_beta: float = option(
        0.5, "0: KL(teacher, student); 1: KL(student, teacher); between: generalised JSD", **SHARES
    )
    jsd_temperature: float = option(1.0, "softens both distributions", **TEMPERATURES)
    jsd_top_k: int | None = option(
        256, "entries compared, the teacher's most probable; `none` or 0: the whole vocabulary; "
        "1 is refused, it teaches nothing", at_least=0, at_most=2**24,
    )  # fmt: skip
    jsd_token_clip: float | None = option(
        0.05, "upper bound of a term; `none`: no bound",
        at_least=1e-12, at_most=1e6, hint="for no bound use --jsd_token_clip none",
    )  # fmt: skip
    jsd_clip_scope: str = option(
        "entry", "what the bound holds for: each vocabulary `entry` (the paper) or the sum of a "
        "`token`", choices=CLIP_SCOPES,
    )  # fmt: skip
    jsd_tail_bucket: bool = option(
        False, "one more entry for the mass outside the top-k, instead of renormalising"
    )
    jsd_loss_kind: str = option(
        "jsd", "`jsd`, or `tinker`: reverse KL on the sampled tokens", choices=LOSS_KINDS
    )
    ce_weight: float = option(0.0, "weight of the cross-entropy on the completion", **WEIGHTS)
    token_weight: str = option(
        "none", "which scored tokens count more, with mean 1 over each completion: `none`, all "
        "alike; `early:N`, its first N tokens alone; `entropy`, by the student's; `teacher_ahead`, "
        "by how much more probable the teacher finds the token, where it does",
    )  # fmt: skip
    skip_first_tokens: int = option(
        0, "the first scored tokens of each completion have weight 0", at_least=0, at_most=2**17
    )
    loss_chunk_size: int = option(
        512, "scored tokens whose logits exist at once, both models' counted: a divergence over "
        "the whole vocabulary works on half as many at a time", at_least=1, at_most=2**20,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jsd_top_k == 1 and self.jsd_loss_kind == "jsd" and not self.jsd_tail_bucket:
            raise ValueError(
                "--jsd_top_k must be 0 or at least 2, got 1: one entry, renormalised, is 1 for "
                "teacher and student alike, so loss and gradient are 0; --jsd_tail_bucket True "
                "compares it with the rest"
            )
        try:
            first = early_tokens(self.token_weight)
        except ValueError:
            raise ValueError(
                "--token_weight must be none, early:N (N a whole number of at least 1, as in "
                f"early:32), entropy or teacher_ahead, got {self.token_weight!r}"
            ) from None
        if first is not None and first <= self.skip_first_tokens:
            raise ValueError(
                f"--token_weight {self.token_weight} counts the first {first} tokens, of which "
                f"--skip_first_tokens {self.skip_first_tokens} leaves none: lower the latter"
            )
        if self.token_weight == "teacher_ahead" and self.jsd_weight == 0:
            raise ValueError(
                "--token_weight teacher_ahead needs a teacher, and with --jsd_weight 0 there is "
                "none: use none, early:N or entropy"
            )

    def build(self) -> LossConfig:
        return LossConfig(
            loss_kind=self.jsd_loss_kind,
            beta=self.jsd_beta,
            temperature=self.jsd_temperature,
            top_k=self.jsd_top_k or None,
            token_clip=self.jsd_token_clip,
            clip_scope=self.jsd_clip_scope,
            tail_bucket=self.jsd_tail_bucket,
            jsd_weight=self.jsd_weight,
            ce_weight=self.ce_weight,
            token_weight=self.token_weight,
            skip_first_tokens=self.skip_first_tokens,
        )


@dataclass(frozen=True)
class OptimSettings(Settings):
    lr: float = option(1e-5, "peak learning rate", above=0, at_most=1e9)
    min_lr: float = option(1e-7, "floor of the cosine", at_least=0, at_most=1e9)
    warmup_steps: int = option(
        200, "linear warm-up; must be less than `--total_steps`", at_least=0, at_most=10**9
    )
    lr_scheduler: str = option(
        "cosine", "after the warm-up: `cosine` or `constant`", choices=("cosine", "constant")
    )
    beta1: float = option(0.9, "AdamW", at_least=0, below=1)
    beta2: float = option(0.95, "AdamW", at_least=0, below=1)
    eps: float = option(1e-15, "AdamW", at_least=1e-30, at_most=1)
    weight_decay: float = option(0.0, "AdamW", at_least=0, at_most=1000)
    optimizer_state: str = option(
        "gpu", "AdamW's two moments: `gpu`, fp32 beside the weights, 8 bytes a parameter; `host`, "
        "fp32 in pinned host memory, through which every update passes them; `8bit`, beside the "
        "weights in about 2 bytes a parameter, which changes the updates (package torchao)",
        choices=OPTIMIZER_STATES,
    )  # fmt: skip
    max_grad_norm: float = option(
        1.0, "global norm the gradient is clipped to", at_least=1e-8, at_most=1e9
    )
    total_steps: int = option(1000, "optimiser steps", **ROWS)
    gradient_accumulation_steps: int = option(
        2, "forwards a rank's share is split into, at least", at_least=1, at_most=2**20
    )
    max_nonfinite_steps: int = option(
        5, "skipped steps in a row after which training stops", **ROWS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"--warmup_steps must be less than --total_steps ({self.total_steps}), got "
                f"{self.warmup_steps}: lower it for a short run"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"--min_lr must be at most --lr ({self.lr}), got {self.min_lr}")
        if self.optimizer_state == "8bit" and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                "--optimizer_state 8bit needs the package torchao: "
                "python -m pip install 'torchao>=0.18'"
            )


def check_adapters(lora: LoraSettings, model: ModelSettings) -> None:
    """Raises ValueError: adapters of no or unknown layers, or on what is to stay as it is."""
    known = (*PARTS, *PROJECTIONS)
    unknown = [target for target in lora.targets if target not in known]
    if unknown or not lora.targets:
        raise ValueError(
            f"--lora_targets {lora.lora_targets!r}: name some of {', '.join(known)}, by commas"
        )
    frozen = {"vit": model.freeze_vit, "connector": model.freeze_und}
    for target in lora.targets:
        part = target if target in frozen else "llm"
        if frozen.get(part, model.freeze_llm):
            raise ValueError(
                f"--lora_targets {target} contradicts the flag that freezes this part: with "
                "--lora_rank the weights are frozen anyway, so leave the --freeze flags out"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run is told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    data: DataSettings = field(default_factory=DataSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    memory: PlanSettings = field(default_factory=PlanSettings)

    def __post_init__(self) -> None:
        if self.lora.lora_rank is not None:
            check_adapters(self.lora, self.model)
        if self.rollout.completions_per_row > 1 and not self.sample.sample_do_sample:
            raise ValueError(
                f"--completions_per_row {self.rollout.completions_per_row}: greedy completions "
                "(--sample_do_sample False) of a row are all alike; leave one of the two out"
            )
        if self.rollout.vt_rehearsal and self.teacher.teacher_vt == "vae+vit":
            raise ValueError(
                f"--vt_rehearsal {self.rollout.vt_rehearsal} shows the student what the teacher "
                "sees, and no student reads latents (--teacher_vt vae+vit): leave one of the two "
                "out"
            )
        kind = self.optim.optimizer_state
        if self.run.cpu_offload and kind != "gpu":
            raise ValueError(
                f"--cpu_offload True keeps weights, gradients and moments in host memory and "
                f"updates them there: it does not go with --optimizer_state {kind}; leave one out"
            )


@dataclass(frozen=True)
class FlowSettings(Settings):
    """What SFT learns besides text."""

    mode: str = option("text", "`text` or `interleaved`", choices=("text", "interleaved"))
    mse_weight: float = option(
        1.0, "weight of the flow-matching loss, beside `--ce_weight`", **WEIGHTS
    )
    timestep_shift: float = option(1.0, "moves flow times towards the noise", **SHIFTS)


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """The settings of SFT: those of every training run, and its mode."""

    flow: FlowSettings = field(default_factory=FlowSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora.lora_rank is not None and self.flow.mode == "interleaved":
            raise ValueError(
                "--lora_rank: adapters are of the understanding branch, and --mode interleaved "
                "trains the drawing branch; leave --lora_rank out"
            )


# What the text-only SFT baseline sets differently (the paper's 2,000 steps; the loss is CE alone).
SFT_DEFAULTS: dict[str, Any] = {
    "model_path": "models/BAGEL-7B-MoT",  # ThinkMorph was already trained on these data sets
    "dataset_config_file": "data/configs/sft.yaml",
    "results_dir": "results/sft-baseline",
    "total_steps": 2000,
    "jsd_weight": 0.0,
    "ce_weight": 1.0,
}

# What interleaved SFT sets besides: the released base's own training images and no system prompt.
# A row holds its drawing three times (noised, clean, ViT) and cannot be cut, hence the room.
INTERLEAVED_DEFAULTS: dict[str, Any] = {
    **SFT_DEFAULTS,
    "dataset_config_file": "data/configs/opsd.yaml",
    "results_dir": "results/sft-interleaved",
    "use_system_prompt": False,
    "vit_max_size": 518,
    "vit_min_size": 224,
    "vit_max_pixels": 14 * 14 * 9 * 1024,
    "max_forward_tokens": 16384,
}


@dataclass(frozen=True)
class ComputeSettings(Settings):
    """Where a run computes; shared by evaluation and the diagnostic."""

    device: str = option("auto", "`auto`, `cpu` or `cuda`", choices=("auto", "cpu", "cuda"))
    precision: str = option(
        "auto", "weights and compute: `auto` is `bf16` on CUDA and `fp32` on the CPU",
        choices=("auto", "bf16", "fp32"),
    )  # fmt: skip
    timeout_s: float = option(7200.0, "seconds a rank waits for the slowest", **TIMEOUTS)
    progress: bool = option(True, "draw a progress bar")

    def dtype(self, device: torch.device) -> torch.dtype:
        """The compute dtype on a device. Raises ValueError for bf16 on the CPU."""
        return compute_dtype(self.precision, device)
