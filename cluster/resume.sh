#!/usr/bin/env bash
# Start a training run or a sweep, or resume it if it has started, for schedulers that may start a job more than once.
#
#   resume.sh train CONFIG [key=value ...]
#   resume.sh sweep FOLDER CONFIG --space SPACE [...]
#
# What has started is on storage that every node reaches, a mount or s3://. A run is in the folder that `craft-ray train`
# gives it: in output_dir, named by the config.
set -euo pipefail

if [ "$#" -lt 2 ] || { [ "$1" != train ] && { [ "$1" != sweep ] || [ "$#" -lt 3 ]; }; }; then
  echo "usage: resume.sh train CONFIG [...], or resume.sh sweep FOLDER CONFIG [...]" >&2
  exit 2
fi
stage=$1
shift

found=$(python - "$stage" "$@" <<'PYTHON'
import json
import sys
from craft_ray.errors import NOT_MET, CraftError
from craft_ray.storage.paths import storage_path

stage, first, *rest = sys.argv[1:]
try:
    if stage == "train":
        from craft_ray.config import load_config
        config = load_config(first, rest)
        folder = storage_path(config.output_dir) / config.run_name
    else:
        folder = storage_path(first)
    if (folder / "config.yaml").exists() and (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        state = NOT_MET if result.get("multiplier") == "adaptive" and not result["feasible"] else 0
    else:
        state = "started" if any((folder / name).exists() for name in ("config.yaml", "sweep.yaml")) else "new"
    print(state, folder)
except CraftError as error:
    print(f"resume.sh: {error.message}", file=sys.stderr)
    sys.exit(error.exit_code)
PYTHON
)
state=${found%% *}
folder=${found#* }
case $state in
  new) ;;
  started) exec craft-ray "$stage" --resume "$folder" ;;
  *) echo "resume.sh: the run $folder is finished"; exit "$state" ;;  # with the exit code that it had
esac
if [ "$stage" = sweep ]; then
  shift
  set -- "$@" --out "$folder"
fi
exec craft-ray "$stage" "$@"
