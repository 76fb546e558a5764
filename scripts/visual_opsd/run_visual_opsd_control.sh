#!/usr/bin/env bash
# A control of Visual-OPSD: something else in the place of the visual thoughts, all else equal.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<TEXT
A control of Visual-OPSD: the teacher sees something else in the place of the visual thoughts,
everything else is as in run_visual_opsd.sh. What it gains is not owed to their content.

usage: run_visual_opsd_control.sh KIND [MODEL_PATH] [TEACHER_MODE] [JSD_BETA] [JSD_TEMP]
                                  [JSD_WEIGHT] [TOTAL_STEPS] [OUTPUT_NAME] [--flag value ...]

  KIND          what the teacher sees, a value of --vt: noise, other, blank, shuffled, problem, none
$(opsd_arguments)
  OUTPUT_NAME   results go to results/OUTPUT_NAME
                (visual-opsd-KIND-TEACHER_MODE-betaJSD_BETA), checkpoints to its checkpoints/

$(opsd_variables)

$(common_usage)
TEXT
}

case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    '' | -*) fail "the first argument must be the KIND of control; -h shows the usage." ;;
esac
launch_opsd "visual-opsd-$1" --vt "$1" :: "${@:2}"
