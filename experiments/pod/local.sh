#!/bin/sh
# A pod on one machine: N processes play the hosts, over loopback. SIGTERM and Ctrl-C save and end all of them.
#
#     RUN=runs/pod experiments/pod/local.sh 4 smoke mesh.data=4 batch_size=4
set -u
hosts=$1; shift
here=$(dirname "$0")
export JAX_COORDINATOR_ADDRESS="localhost:${PORT:-47011}" JAX_NUM_PROCESSES="$hosts" JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
pids=
trap 'kill -TERM $pids 2>/dev/null' TERM INT
i=0
while [ "$i" -lt "$hosts" ]; do
    JAX_PROCESS_ID=$i "$here/host.sh" "$@" &
    pids="$pids $!"
    i=$((i + 1))
done
status=0
for pid in $pids; do
    wait "$pid"; one=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done # a signal ends wait, not the host
    if [ "$one" -ne 0 ]; then status=$one; fi
done
exit "$status"
