#!/usr/bin/env bash
# Start a training run or a sweep, or resume it if it has started, for schedulers that may start a job more than once.
#
#   resume.sh train FOLDER CONFIG [key=value ...]
#   resume.sh sweep FOLDER CONFIG --space SPACE [...]
#
# FOLDER is on storage that every node reaches, a mount or s3://. For a run it is OUTPUT_DIR/NAME-ARM-seedSEED with the
# values of its config.
set -euo pipefail

if [ "$#" -lt 3 ] || { [ "$1" != train ] && [ "$1" != sweep ]; }; then
  echo "usage: resume.sh train|sweep FOLDER CONFIG [...]" >&2
  exit 2
fi
stage=$1
folder=$2
shift 2

state=$(python - "$folder" <<'PYTHON'
import json
import sys
from craft_ray.errors import NOT_MET, CraftError
from craft_ray.storage.paths import storage_path

folder = storage_path(sys.argv[1])
try:
    if (folder / "config.yaml").exists() and (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        print(NOT_MET if result.get("multiplier") == "adaptive" and not result["feasible"] else 0)
    else:
        print("started" if any((folder / name).exists() for name in ("config.yaml", "sweep.yaml")) else "new")
except CraftError as error:
    sys.exit(f"resume.sh: {error.message}")
PYTHON
)
case $state in
  new) ;;
  started) exec craft-ray "$stage" --resume "$folder" ;;
  *) echo "resume.sh: the run $folder is finished"; exit "$state" ;;  # with the exit code that it had
esac
if [ "$stage" = sweep ]; then
  set -- "$@" --out "$folder"
fi
exec craft-ray "$stage" "$@"
