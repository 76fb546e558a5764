#!/usr/bin/env bash
# The noise control: Visual-OPSD with noise in place of the visual thoughts, all else equal.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<TEXT
The noise control of Visual-OPSD: the teacher's visual thoughts are replaced by Gaussian noise of
the same size, everything else is as in run_visual_opsd.sh. It should gain nothing.

usage: run_visual_opsd_noise.sh [MODEL_PATH] [TEACHER_MODE] [JSD_BETA] [JSD_TEMP] [JSD_WEIGHT]
                                [TOTAL_STEPS] [OUTPUT_NAME] [--flag value ...]

$(opsd_arguments)
  OUTPUT_NAME   results go to results/OUTPUT_NAME
                (visual-opsd-noise-TEACHER_MODE-betaJSD_BETA), checkpoints to its checkpoints/

$(opsd_variables)

$(common_usage)
TEXT
}

launch_opsd visual-opsd-noise --noise_vt True :: "$@"
