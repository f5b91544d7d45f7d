#!/usr/bin/env bash
# A training run or a sweep that a scheduler may start more than once: begins it, or goes on where it was cut off.
#
#   go_on.sh train FOLDER CONFIG [key=value ...]
#   go_on.sh sweep FOLDER CONFIG --space SPACE [...]
#
# FOLDER lies on storage that every node mounts. Of a run it is OUTPUT_DIR/NAME-ARM-seedSEED, as its config has it.
set -euo pipefail

if [ "$#" -lt 3 ] || { [ "$1" != train ] && [ "$1" != sweep ]; }; then
  echo "usage: go_on.sh train|sweep FOLDER CONFIG [...]" >&2
  exit 2
fi
stage=$1
folder=$2
shift 2

if [ -e "$folder/config.yaml" ] || [ -e "$folder/sweep.yaml" ]; then
  exec craft-ray "$stage" --resume "$folder"
fi
if [ "$stage" = sweep ]; then
  set -- "$@" --out "$folder"
fi
exec craft-ray "$stage" "$@"
