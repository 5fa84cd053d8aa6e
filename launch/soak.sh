#!/usr/bin/env bash
# Train digits for an hour on this machine's CPU while the run is killed, its disk filled and its files damaged; at the end
# a table says what was lost. Not part of the tests: it takes as long as it is told to.
#
#   bash launch/soak.sh [--minutes=60] [--folder=runs/soak] [--seed=0] [--report=FILE.md]
#
# On a file system of less than 1 GiB (mount -t tmpfs -o size=200m tmpfs DIR, then --folder=DIR/soak) the disk is really
# filled; elsewhere the process may write no larger files.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

prepare cpu
exec "$PYTHON" tests/soak.py "$@"
