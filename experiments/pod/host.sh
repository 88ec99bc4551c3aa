#!/bin/sh
# What every host of a pod runs, the same everywhere:
#
#     RUN=DIR experiments/pod/host.sh PRESET [key=value ...]
#
# Trains into DIR, which all hosts must see (a bucket or a shared file system), and begins again from the newest
# checkpoint after a preemption (status 42) or a failure, with a growing pause. It gives up after three failures in
# a row that did not gain a step. HOPE is the command (default: hope).
set -u
: "${RUN:?RUN=DIR says where the run lies}"
: "${HOPE:=hope}"

newest() { ls "$RUN/ckpt" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -n 1; }

child=
trap 'test -n "$child" && kill -TERM "$child"' TERM
failures=0
while :; do
    before=$(newest)
    $HOPE train "$@" --run "$RUN" --auto-resume &
    child=$!
    wait "$child"; status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done # a signal ends wait, not the training
    child=
    case $status in
    0 | 2 | 130) exit "$status" ;; # done; a mistake in the command; Ctrl-C
    42) test -n "${PREEMPTED_STAYS_DOWN:-}" && exit 42 ;; # the machine is about to go: whoever started us starts us again
    esac
    if [ "$(newest)" = "$before" ]; then failures=$((failures + 1)); else failures=0; fi
    if [ "$failures" -ge 3 ]; then
        echo "host.sh: three starts in a row gained no checkpoint after step ${before:-0}; last status $status" >&2
        exit "$status"
    fi
    echo "host.sh: status $status at checkpoint ${before:-none}; starting again" >&2
    sleep $((failures * 10))
done
