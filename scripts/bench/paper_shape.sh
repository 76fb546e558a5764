#!/usr/bin/env bash
# The paper's training step on the GPUs of one host; scripts/bench/paper_shape.py says what is done.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    cat <<TEXT
usage: paper_shape.sh GPUS [--only PART,...] [--out FOLDER] [--space FOLDER] [--limit_s SECONDS] ...

  SHM_SIZE   grow /dev/shm to this size first (root), e.g. 200g, for --space /dev/shm/NAME
  PYTHON     interpreter (default: .venv/bin/python of the repository, else python3)

TEXT
    set -- --help
fi
if [[ -n ${SHM_SIZE:-} ]]; then
    mount -o remount,size="$SHM_SIZE" /dev/shm
fi
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
    python=$PWD/.venv/bin/python
fi
exec "$python" -m scripts.bench.paper_shape "$@"
