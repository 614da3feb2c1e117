#!/usr/bin/env bash
# configs/clusters/launch.sh RUN_FOLDER COMMAND [ARGUMENT ...]
#
# Runs a launcher on one node so that a scheduler knows how it ended:
#   0   the run is complete: RUN_FOLDER has its bundle
#   75  it was interrupted and has saved a checkpoint: start it again, with --resume
#   any other code is an error's
# SIGTERM is passed on to the launcher, which passes it on to the ranks; they have ten minutes to save.
# SIGUSR1 is not: a scheduler sends it to the ranks themselves, and the launcher must outlive it.
set -uo pipefail
run_folder=$1
shift
trap '' USR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

"$@" &
launcher=$!
interrupted=
trap 'interrupted=yes; kill -TERM "$launcher"' TERM
wait "$launcher"
code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` before the launcher has ended
    wait "$launcher"
    code=$?
done
# A launcher that gets a signal ends with a code of its own, whatever its ranks have.
if [ ! -e "$run_folder/bundle/vlm.json" ] && { [ "$code" -eq 0 ] || [ -n "$interrupted" ]; }; then
    exit 75
fi
exit "$code"
