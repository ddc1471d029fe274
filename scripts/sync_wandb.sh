#!/bin/sh
# Sends the offline W&B runs under a folder of results to the server: scripts/sync_wandb.sh [outputs]
# Needs a key (wandb login, or WANDB_API_KEY). A run that was sent before is skipped.
exec find "${1:-outputs}" -type d -name 'offline-run-*' -exec wandb sync --no-include-synced {} +
