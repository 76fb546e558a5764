#!/usr/bin/env bash
# Visual-OPSD offline: the student distils what a teacher said, which is not in memory any more.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<TEXT
Visual-OPSD offline: cross-entropy on cached completions, and distillation of what the teacher said
about their tokens. run_collect_traces.sh makes the cache.

usage: run_visual_opsd_offline.sh [MODEL_PATH] [TEACHER_CACHE] [KD_WEIGHT] [KD_TEMP] [TOTAL_STEPS]
                                  [OUTPUT_NAME] [--flag value ...]

  MODEL_PATH      release folder that the cache was collected with (models/ThinkMorph-7B)
  TEACHER_CACHE   the cache (results/teacher-cache)
  KD_WEIGHT       weight of the distillation beside the cross-entropy, --jsd_weight (0.5)
  KD_TEMP         temperature of the distillation, --jsd_temperature (2.0)
  TOTAL_STEPS     optimiser steps (8000)
  OUTPUT_NAME     results go to results/OUTPUT_NAME (visual-opsd-offline), checkpoints to its
                  checkpoints/

$(common_usage)
TEXT
}

parse_arguments 6 "$@"
add_positional model_path teacher_cache jsd_weight jsd_temperature total_steps -
add_output "${POSITIONAL[5]:-visual-opsd-offline}"
launch scripts.visual_opsd.train_visual_opsd_offline "${ARGUMENTS[@]}" ${FLAGS[@]+"${FLAGS[@]}"}
