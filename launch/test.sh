#!/usr/bin/env bash
# Lint, check the format, and run the tests, in the same environment as launch/local.sh plus the test tools.
#
#   bash launch/test.sh [--slow] [pytest arguments]
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

marker="not slow"
if [ "${1:-}" = --slow ]; then
  marker=""
  shift
fi
prepare cpu test
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "$marker" "$@"
