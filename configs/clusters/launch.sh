#!/usr/bin/env bash
# configs/clusters/launch.sh RUN_FOLDER COMMAND [ARGUMENT ...]
#
# Runs a launcher on one node so that a scheduler knows how it ended:
#   0   the run is complete: RUN_FOLDER has its bundle
#   75  it was interrupted: start it again, with --resume
#   any other code is an error's
# SIGTERM goes to the ranks and not to the launcher, which would kill them after 30 seconds, and whose
# peers on other nodes would wait for it for five minutes more. SIGUSR1 goes to neither: a scheduler
# sends it to the ranks itself, and the launcher must outlive it.
set -uo pipefail
run_folder=$1
shift
trap '' USR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # where a launcher gets one

"$@" &
launcher=$!
interrupted=
# The ranks are the launcher's children; before there are any, there is nothing to save.
trap 'interrupted=yes; pkill -TERM -P "$launcher" || kill -TERM "$launcher"' TERM
wait "$launcher"
code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` before the launcher has ended
    wait "$launcher"
    code=$?
done
if [ ! -e "$run_folder/bundle/vlm.json" ] && { [ "$code" -eq 0 ] || [ -n "$interrupted" ]; }; then
    exit 75
fi
exit "$code"
