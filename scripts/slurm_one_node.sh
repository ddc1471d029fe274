#!/bin/bash
# A SLURM cluster of this one machine, to try hydra/launcher=slurm: controller, node and munge on ports of their own, with
# FOLDER for their files; "stop" ends them. Needs root, and Debian's packages slurm-wlm and munge.
#
#   scripts/slurm_one_node.sh start FOLDER    # then: export SLURM_CONF=FOLDER/slurm.conf
#   scripts/slurm_one_node.sh stop FOLDER
set -euo pipefail

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -eq 2 ] || usage
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)

stop() {
    if [ -s "$folder/slurmctld.pid" ]; then  # the daemons' ends would leave jobs behind
        export SLURM_CONF="$folder/slurm.conf"
        scancel --user=root --quiet || true
        for _ in $(seq 150); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep 0.2; done
    fi
    for name in slurmd slurmctld munged; do
        [ -s "$folder/$name.pid" ] || continue
        kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
        rm -f "$folder/$name.pid"
    done
    [ ! -s "$folder/munge_folder" ] || rm -rf "$(cat "$folder/munge_folder")"
    rm -f "$folder/munge_folder"
}

start() {
    for program in slurmctld slurmd munged sinfo; do
        command -v "$program" >/dev/null || { echo "$0: $program is not installed: apt-get install slurm-wlm munge" >&2; exit 1; }
    done
    [ "$(id -u)" -eq 0 ] || { echo "$0: must run as root" >&2; exit 1; }
    # munged refuses folders that others may write to, and its socket's folder must be open to all
    local munge
    munge=$(mktemp -d /run/cushion-munge-XXXXXX)
    echo "$munge" > "$folder/munge_folder"
    dd if=/dev/urandom of="$munge/key" bs=1024 count=1 status=none
    chmod 0400 "$munge/key"
    chmod 0755 "$munge"
    chown -R munge: "$munge"
    runuser -u munge -- munged --key-file="$munge/key" --socket="$munge/socket" --log-file="$munge/log" \
        --seed-file="$munge/seed" --pid-file="$munge/pid" --num-threads=2
    for _ in $(seq 100); do [ -s "$munge/pid" ] && break; sleep 0.1; done
    cp "$munge/pid" "$folder/munged.pid"
    mkdir -p "$folder/state" "$folder/spool"
    local host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat > "$folder/slurm.conf" <<CONF
ClusterName=cushion
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
SlurmctldPort=${SLURMCTLD_PORT:-17817}
SlurmdPort=${SLURMD_PORT:-17818}
AuthType=auth/munge
AuthInfo=socket=$munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName=$host CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    slurmd
    for _ in $(seq 300); do
        sinfo --noheader --format=%t 2>/dev/null | grep -q idle && { echo "export SLURM_CONF=$SLURM_CONF"; return; }
        sleep 0.2
    done
    echo "$0: the node did not come up; see $folder/slurmctld.log and $folder/slurmd.log" >&2
    exit 1
}

case $action in
    start) trap 'stop' ERR; start ;;
    stop) stop ;;
    *) usage ;;
esac
