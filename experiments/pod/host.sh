#!/bin/sh
# What every host of a pod runs, the same everywhere:
#
#     RUN=DIR experiments/pod/host.sh PRESET [key=value ...]
#
# Trains into DIR, a path that all hosts see (a shared file system, or a bucket that is mounted), and begins again from
# the newest checkpoint after a preemption (status 42) or a failure, with a growing pause. It gives up after three
# starts in a row that did not gain a checkpoint. SIGTERM and Ctrl-C save and end it. HOPE is the command (default:
# hope); with PREEMPTED_STAYS_DOWN=1 a preemption ends it too, for launchers that start it again themselves.
set -u
: "${RUN:?RUN=DIR says where the run lies}"
: "${HOPE:=hope}"

newest() { ls "$RUN/ckpt" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -n 1; }

child= stopping=
stop() {
    stopping=1
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT

finish() { # waits for the child, however many signals come meanwhile
    wait "$child"; status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
    child=
}

failures=0 status=42
while [ -z "$stopping" ]; do
    before=$(newest)
    $HOPE train "$@" --run "$RUN" --auto-resume &
    child=$!
    if [ -n "$stopping" ]; then stop; fi
    finish
    case $status in
    0 | 2 | 130) exit "$status" ;; # done; a mistake in the command; interrupted
    42) if [ -n "${PREEMPTED_STAYS_DOWN:-}" ]; then exit 42; fi ;;
    esac
    if [ "$(newest)" = "$before" ]; then failures=$((failures + 1)); else failures=0; fi
    if [ "$failures" -ge 3 ]; then
        echo "host.sh: three starts in a row gained no checkpoint after step ${before:-0}; last status $status" >&2
        exit "$status"
    fi
    if [ -n "$stopping" ]; then break; fi
    echo "host.sh: status $status at checkpoint ${before:-none}; starting again" >&2
    result=$status
    sleep $((failures * 10)) &
    child=$!
    finish
    status=$result
done
exit "$status"
