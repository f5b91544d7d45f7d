#!/usr/bin/env bash
# A training run or a sweep that a scheduler may start more than once: begins it, or goes on where it was cut off.
#
#   go_on.sh train FOLDER CONFIG [key=value ...]
#   go_on.sh sweep FOLDER CONFIG --space SPACE [...]
#
# FOLDER is on storage that every node reaches, a mount or s3://. Of a run it is OUTPUT_DIR/NAME-ARM-seedSEED, as its
# config has it.
set -euo pipefail

if [ "$#" -lt 3 ] || { [ "$1" != train ] && [ "$1" != sweep ]; }; then
  echo "usage: go_on.sh train|sweep FOLDER CONFIG [...]" >&2
  exit 2
fi
stage=$1
folder=$2
shift 2

begun=$(python - "$folder" <<'PYTHON'
import sys
from craft_ray.errors import CraftError
from craft_ray.storage.paths import storage_path

folder = storage_path(sys.argv[1])
try:
    print(any((folder / name).exists() for name in ("config.yaml", "sweep.yaml")))
except CraftError as error:
    sys.exit(f"go_on.sh: {error.message}")
PYTHON
)
if [ "$begun" = True ]; then
  exec craft-ray "$stage" --resume "$folder"
fi
if [ "$stage" = sweep ]; then
  set -- "$@" --out "$folder"
fi
exec craft-ray "$stage" "$@"
