#!/usr/bin/env bash
# Print a manifest of this folder for storage on S3: without the shared volume, with the lines marked s3.
#
#   bash cluster/kuberay/s3.sh cluster/kuberay/train.yaml | kubectl apply -f -
set -euo pipefail
sed -e '/  # volume$/d' -e 's/# s3: //' "${1:?give a manifest}"
