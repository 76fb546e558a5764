#!/usr/bin/env bash
# Visual-OPSD: the student distils the teacher that sees the real visual thoughts.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<TEXT
Visual-OPSD: on-policy distillation from the same model with the real visual thoughts in view.

usage: run_visual_opsd.sh [MODEL_PATH] [TEACHER_MODE] [JSD_BETA] [JSD_TEMP] [JSD_WEIGHT]
                          [TOTAL_STEPS] [OUTPUT_NAME] [--flag value ...]

$(opsd_arguments)
  OUTPUT_NAME   results go to results/OUTPUT_NAME (visual-opsd-TEACHER_MODE-betaJSD_BETA),
                checkpoints to its checkpoints/

$(opsd_variables)

$(common_usage)
TEXT
}

launch_opsd visual-opsd :: "$@"
