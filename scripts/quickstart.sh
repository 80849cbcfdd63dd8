#!/usr/bin/env bash
# Takes a tiny base model through the whole pipeline on a CPU:
#   bash scripts/quickstart.sh [--output_dir DIR] [--seed N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec "$PYTHON" -m recipes.tiny_world.quickstart "$@"
