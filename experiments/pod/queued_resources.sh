#!/bin/sh
# Cloud TPU VMs through queued resources: ask for the slice, wait for it, install everywhere, train everywhere.
#
#     NAME=hope ZONE=us-west4-a TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite \
#     SOURCE=gs://BUCKET/hope_jax.tar.gz RUN=/mnt/shared/runs/1b \
#         experiments/pod/queued_resources.sh 1.3b data=/mnt/shared/text mesh.fsdp=128 mesh.tensor=2
#
# RUN and data are paths that every host sees: mount a Filestore, or a bucket with gcsfuse. Needs gcloud here and Python
# 3.12 on the hosts. Types and versions: https://cloud.google.com/tpu/docs/runtimes. When it is done:
#     gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force
set -eu
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${SOURCE:?}" "${RUN:?}"

state() { gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format='value(state.state)' 2>/dev/null; }
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }
quoted() { for word in "$@"; do printf "'%s' " "$(printf %s "$word" | sed "s/'/'\\\\''/g")"; done; }

if [ -z "$(state)" ]; then
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --accelerator-type "$TYPE" --runtime-version "$VERSION" ${SPOT:+--spot}
fi
while :; do
    case $(state) in
    ACTIVE) break ;;
    FAILED | SUSPENDED) echo "the request $NAME is $(state); delete it and ask again" >&2; exit 1 ;;
    esac
    sleep 30
done
everywhere "gcloud storage cp $(quoted "$SOURCE") hope_jax.tar.gz && mkdir -p hope_jax && tar xzf hope_jax.tar.gz -C hope_jax &&
    cd hope_jax && python3.12 -m venv .venv && .venv/bin/pip install -q -c constraints.txt '.[tpu]'"
# jax finds the other hosts through the metadata of the slice.
everywhere "cd hope_jax && { RUN=$(quoted "$RUN") HOPE=.venv/bin/hope nohup experiments/pod/host.sh $(quoted "$@") > host.log 2>&1 < /dev/null & }"
