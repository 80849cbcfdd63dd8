#!/usr/bin/env bash
# Runs the tests in the pinned environment: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
# The ranking page is tested in a real browser; where none can be installed, those tests are skipped and say so.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "Installing chromium for the tests of the ranking page"
    (apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 || echo "chromium could not be installed"
fi
# Two workers, one core each; tests of a file stay together, because they share models and runs.
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
