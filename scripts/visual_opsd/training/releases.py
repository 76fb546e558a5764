# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run leaves for others beside its states: release folders, or adapters.

<checkpoint_dir>/0000500/            complete release folder, which evaluators load
<checkpoint_dir>/adapter_0000500/    with --lora_rank: the adapters in PEFT's format; the release
                                     folder, the adapters merged, is written at the end alone
<checkpoint_dir>/best/               with --keep_best: one of the two, of the best validation's step
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modeling.bagel.adapters import AdapterConfig, adapter_shapes
from modeling.bagel.bagel import Bagel
from modeling.release.adapters import merge_adapter, save_adapter
from modeling.release.checkpoint import save_bagel
from modeling.release.weight_files import FLOAT_DTYPES, open_weights
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.processes import DistEnv, attempt, on_main
from scripts.visual_opsd.training.checkpoint_folders import (
    BEST_FILE,
    adapter_folder,
    best_folder,
    release_folder,
)
from scripts.visual_opsd.training.sharding import iter_full_state


class ReleaseWriter:
    """Writes them, unless --save_release is False. Every method but `is_owed` is a collective.

    `last` is whether no step follows.

    Args:
        adapters: of a student that has them.
    """

    def __init__(
        self, config: TrainConfig, student: Bagel, adapters: AdapterConfig | None, env: DistEnv
    ) -> None:
        self.config, self.student, self.adapters, self.env = config, student, adapters, env
        self._folder = config.run.checkpoints

    def is_owed(self, step: int, *, last: bool) -> bool:
        """Whether a step at which they are due has none, or not all."""
        due = [release_folder(self._folder, step)] if last or self.adapters is None else []
        if self.adapters is not None:
            due.append(adapter_folder(self._folder, step))
        return self.config.run.save_release and not all(folder.exists() for folder in due)

    def save(self, step: int, *, last: bool) -> None:
        """Write those of the last completed step.

        Raises:
            ValueError: as `save_bagel`.
        """
        if not self.config.run.save_release:
            return
        if self.adapters is None:
            attempt(lambda: self._save_release(step, release_folder(self._folder, step)))
            return
        attempt(lambda: self._save_adapter(step, adapter_folder(self._folder, step)))
        if last:
            on_main(self.env, lambda: self._merge(step))

    def save_best(self, step: int, facts: Mapping[str, Any]) -> None:
        """Write the best one's folder in place of an earlier one, whatever --save_release says.

        Args:
            facts: for its best.json, "step" among them.

        Raises:
            ValueError: as `save_bagel`.
        """
        notes = {BEST_FILE: json.dumps(dict(facts), indent=2) + "\n"}
        save = self._save_release if self.adapters is None else self._save_adapter
        attempt(lambda: save(step, best_folder(self._folder), notes))

    def _save_release(
        self, step: int, folder: Path, notes: Mapping[str, str] | None = None
    ) -> None:
        base = self.config.model.model_path
        trained = {name for name, p in self.student.named_parameters() if p.requires_grad}
        dtypes = {key: FLOAT_DTYPES[tensor.dtype] for key, tensor in open_weights(base).items()}
        save_bagel(
            iter_full_state(self.student, trained, dtypes.get),
            folder if self.env.is_main else None,
            base=base,
            step=step,
            run_config=flat(self.config),
            notes=notes,
            overwrite=True,
        )

    def _save_adapter(
        self, step: int, folder: Path, notes: Mapping[str, str] | None = None
    ) -> None:
        assert self.adapters is not None
        save_adapter(
            iter_full_state(self.student, set(adapter_shapes(self.student))),
            folder if self.env.is_main else None,
            base=self.config.model.model_path,
            config=self.adapters,
            step=step,
            run_config=flat(self.config),
            notes=notes,
            overwrite=True,
        )

    def _merge(self, step: int) -> None:
        merge_adapter(
            adapter_folder(self._folder, step),
            self.config.model.model_path,
            release_folder(self._folder, step),
            overwrite=True,
        )
