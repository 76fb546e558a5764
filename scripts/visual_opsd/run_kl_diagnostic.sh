#!/usr/bin/env bash
# The KL diagnostic: is there anything in the visual thoughts for the student to learn?
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<TEXT
The KL diagnostic: how far the teacher (real visual thoughts in view) is from the student on the
same completion tokens, against a teacher that sees noise. Run it before training: GO or NO-GO.

usage: run_kl_diagnostic.sh [MODEL_PATH] [NUM_SAMPLES] [OUTPUT_DIR] [--flag value ...]

  MODEL_PATH   release folder (models/ThinkMorph-7B)
  NUM_SAMPLES  rows to measure (1000)
  OUTPUT_DIR   where tables and figures go (results/visual_opsd_kl_diagnostic)

Environment:
  VISUAL_OPSD_DATA_ROOT   folder that holds the data sets

$(common_usage)
TEXT
}

parse_arguments 3 "$@"
add_positional model_path num_samples output_dir
launch scripts.visual_opsd.kl_diagnostic ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} \
    ${FLAGS[@]+"${FLAGS[@]}"}
