# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Settings of the recipe itself: what the teacher sees, what rows are completed with, which tokens
count. Defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shown  # of bounded length

from data.visual_thoughts import VT_KINDS, VT_MEANINGS
from scripts.visual_opsd.cli import SHARES, TOGETHER, Settings, option
from scripts.visual_opsd.opsd_loss import early_tokens

TEACHER_MODES = ("ema", "fixed", "self")
TEACHER_VTS = ("vit", "vae+vit")
CONTRASTS = ("noise", "other", "none")


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
        "noise", "with `--contrast`: a control, as in `--vt`", choices=CONTRASTS
    )
    teacher_cpu_offload: bool = option(False, "keep the teacher's shards in host memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast and self.contrast_with == self.shown:
            raise ValueError(
                f"--contrast_with {self.contrast_with} is what the teacher sees (--vt), so there "
                "is nothing to contrast: choose another, or leave --contrast out"
            )
        if self.contrast and self.contrast_with == "none" and self.teacher_vt == "vae+vit":
            raise ValueError(
                "--contrast_with none shows no picture whose latents --teacher_vt vae+vit could "
                "read: choose another"
            )
        if self.noise_vt and self.vt not in ("real", "noise"):
            raise ValueError(
                f"--noise_vt True means --vt noise, which contradicts --vt {self.vt}: leave one out"
            )
        if self.vt == "none" and self.teacher_vt == "vae+vit":
            raise ValueError(
                "--vt none shows no picture whose latents --teacher_vt vae+vit could read: leave "
                "one out"
            )

    @property
    def shown(self) -> str:
        """The kind of `data.visual_thoughts` that the teacher sees."""
        return "noise" if self.noise_vt else self.vt


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

    def check(self, samples: bool) -> None:
        """Raises ValueError: several completions, all alike; samples: whether they are drawn."""
        if self.completions_per_row > 1 and not samples:
            raise ValueError(
                f"--completions_per_row {self.completions_per_row}: greedy completions "
                "(--sample_do_sample False) of a row are all alike; leave one of the two out"
            )


def check_token_weights(token_weight: str, skip_first_tokens: int, teacher: bool) -> None:
    """Raises ValueError: an unknown weight, or one that leaves no token or lacks its teacher."""
    try:
        first = early_tokens(token_weight)
    except ValueError:
        raise ValueError(
            "--token_weight must be none, early:N (N a whole number of at least 1, as in "
            f"early:32), entropy or teacher_ahead, got {shown(token_weight)}"
        ) from None
    if first is not None and first <= skip_first_tokens:
        raise ValueError(
            f"--token_weight {token_weight} counts the first {first} tokens, of which "
            f"--skip_first_tokens {skip_first_tokens} leaves none: lower the latter"
        )
    if token_weight == "teacher_ahead" and not teacher:
        raise ValueError(
            "--token_weight teacher_ahead needs a teacher, and with --jsd_weight 0 there is none: "
            "use none, early:N or entropy"
        )
