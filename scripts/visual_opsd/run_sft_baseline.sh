#!/usr/bin/env bash
# The text-only SFT baseline: cross-entropy on the data set's own text traces.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<TEXT
The text-only SFT baseline: cross-entropy on the data set's text traces and answers.

usage: run_sft_baseline.sh [MODEL_PATH] [TOTAL_STEPS] [OUTPUT_NAME] [--flag value ...]

  MODEL_PATH    release folder to start from (models/BAGEL-7B-MoT, as in the paper: ThinkMorph
                was already trained on these data sets)
  TOTAL_STEPS   optimiser steps (2000, as the paper trains; the authors' script says 8000)
  OUTPUT_NAME   results go to results/OUTPUT_NAME (sft-baseline), checkpoints to its checkpoints/

$(common_usage)
TEXT
}

parse_arguments 3 "$@"
add_positional model_path total_steps -
add_output "${POSITIONAL[2]:-sft-baseline}"
launch scripts.visual_opsd.train_sft "${ARGUMENTS[@]}" ${FLAGS[@]+"${FLAGS[@]}"}
