#!/usr/bin/env bash
# A teacher's word on completions, kept for offline training.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<TEXT
For every row a completion and what the teacher (real visual thoughts in view) says about its
tokens, kept in a folder that run_visual_opsd_offline.sh trains on. The same command goes on where
it was stopped.

usage: run_collect_traces.sh [MODEL_PATH] [OUTPUT_DIR] [--flag value ...]

  MODEL_PATH   release folder of the teacher, from which the student will start
               (models/ThinkMorph-7B)
  OUTPUT_DIR   where the cache goes (results/teacher-cache); about 1.5 KB a token

The completions are the data set's text traces; --completions base samples them from MODEL_PATH.

Environment:
  VISUAL_OPSD_DATA_ROOT   folder that holds the data sets

$(common_usage)
TEXT
}

parse_arguments 2 "$@"
add_positional model_path output_dir
launch scripts.visual_opsd.collect_traces ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} \
    ${FLAGS[@]+"${FLAGS[@]}"}
