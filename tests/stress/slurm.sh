#!/usr/bin/env bash
# Starts and stops a SLURM on this machine, for the tests: `slurm.sh start FOLDER`, `slurm.sh stop FOLDER`. It has two
# nodes of one CPU each, both of them this machine.
# Configuration, key, state and logs are in FOLDER. The tests set SLURM_CONF=FOLDER/slurm.conf and put FOLDER/bin on PATH.
# Needs Debian's slurm-wlm and munge, and root, as which the jobs' processes are started.
set -euo pipefail
folder=$2
export SLURM_CONF=$folder/slurm.conf

stop() {
    scancel --user="$(id -u)" 2> /dev/null || true
    for _ in $(seq 200); do # until no process of a job is left
        [ -n "$(squeue --noheader --states=running,completing 2> /dev/null)" ] || break
        sleep 0.1
    done
    for daemon in node1 node2 slurmctld munged; do
        pid=$(cat "$folder/$daemon.pid" 2> /dev/null) || continue
        kill "$pid" 2> /dev/null || continue
        for _ in $(seq 50); do
            kill -0 "$pid" 2> /dev/null || continue 2
            sleep 0.1
        done
        kill -9 "$pid" # a node may wait for what has ended before it
    done
}

start() {
    mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
    chmod 700 "$folder/munge"
    dd if=/dev/urandom of="$folder/munge/key" bs=1 count=1024 status=none
    chmod 400 "$folder/munge/key"
    munged --key-file="$folder/munge/key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --force
    read -r control node1 node2 < <(python3 -c "
import socket
free = [socket.socket() for _ in range(3)]
for one in free:
    one.bind(('127.0.0.1', 0))
print(*(one.getsockname()[1] for one in free))")
    cat > "$SLURM_CONF" << END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$control
SlurmUser=root
# A requeued job may begin when the credentials of its last start have expired, usually after two minutes.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
KillWait=10
ReturnToService=2
MailProg=/bin/true
# One CPU each, whatever there is.
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$node1 CPUs=1
NodeName=node2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$node2 CPUs=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
# What is submitted here ends what runs there.
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
END
    # submitit asks sacct, which needs a database; squeue knows the same for five minutes.
    mkdir -p "$folder/bin"
    printf '%s\n' '#!/bin/sh' 'echo "JobID|State|NodeList"' \
        'squeue --noheader --array --states=all --format="%i|%T|%N"' > "$folder/bin/sacct"
    chmod +x "$folder/bin/sacct"
    slurmctld -c
    slurmd -N node1
    slurmd -N node2
    for _ in $(seq 100); do
        [ "$(sinfo --noheader --partition=main --Node --format=%T 2> /dev/null | grep -c idle)" != 2 ] || exit 0
        sleep 0.1
    done
    for log in "$folder"/*.log; do tail -n 5 "$log" >&2; done
    stop
    exit 1
}

"$1"
