#!/bin/sh
# Sends the offline W&B runs under a folder of results to the server: scripts/sync_wandb.sh [outputs]
# Needs a key (wandb login, or WANDB_API_KEY). A run that was sent before is skipped, and one that is under way or was
# killed is left for later: sent as far as it is, it would count as sent.
folder=${1:-outputs}
[ -d "$folder" ] || { echo "$0: there is no folder $folder" >&2; exit 1; }
exec find "$folder" -type d -name 'offline-run-*' \
    \( -exec grep -qs '"ended": false' {}/../../tracking.json \; -exec echo "left for later:" {} \; \
    -o -exec wandb sync --no-include-synced {} + \)
