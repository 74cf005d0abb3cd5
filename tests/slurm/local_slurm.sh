#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests: local_slurm.sh start DIR | stop DIR. Needs root and Debian's slurm-wlm.
# After start, with SLURM_CONF=DIR/slurm.conf, sbatch and srun talk to it. Eight character devices stand for eight A100s.
set -Eeuo pipefail
command="$1" dir="$(mkdir -p "$2" && cd "$2" && pwd)"
export SLURM_CONF="$dir/slurm.conf"

stop() {
    timeout 5 scontrol shutdown > /dev/null 2>&1 || true
    for name in slurmd slurmctld munged; do
        # a daemon that the shutdown has reached removes its file, perhaps between a look at it and reading it
        pid="$(cat "$dir/$name.pid" 2> /dev/null)" || continue
        for _ in $(seq 50); do kill "$pid" 2> /dev/null || break; sleep 0.1; done
    done
}

failed() {
    stop
    echo "Slurm did not come up. What its daemons last said:" >&2
    tail -n 8 "$dir"/*.log >&2
}

start() {
    trap failed EXIT
    host="$(hostname -s)" cpus="$(nproc)"
    # ports that are free now, so that several such Slurms can live on one machine
    read -r controller_port node_port < <(python3 -c 'import socket
sockets = [socket.create_server(("", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets))')
    mkdir -p "$dir/state" "$dir/spool" "$dir/munge"
    for i in 0 1 2 3 4 5 6 7; do [[ -e "$dir/gpu$i" ]] || mknod "$dir/gpu$i" c 1 3; done
    head -c 128 /dev/urandom > "$dir/munge.key"
    chmod 0700 "$dir" "$dir/munge"; chmod 0400 "$dir/munge.key"
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    cat > "$SLURM_CONF" << EOF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$controller_port
SlurmdPort=$node_port
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SchedulerType=sched/builtin
GresTypes=gpu
MailProg=/bin/true
ReturnToService=2
KillWait=5
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=4000 Gres=gpu:a100:8 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
EOF
    for i in 0 1 2 3 4 5 6 7; do echo "NodeName=$host Name=gpu Type=a100 File=$dir/gpu$i"; done > "$dir/gres.conf"
    if [[ -d /sys/fs/cgroup/memory ]]; then
        printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$dir/cgroup.conf"
    fi
    slurmctld -f "$SLURM_CONF" -c
    slurmd -f "$SLURM_CONF" -N "$host"
    until (( SECONDS > 30 )); do
        timeout 3 sinfo -h -o %T 2> /dev/null | grep -q -e idle -e mixed && { trap - EXIT; return; }
        sleep 0.2
    done
    exit 1
}

case "$command" in
    start) start ;;
    stop) stop ;;
    *) echo "usage: $0 start|stop DIR" >&2; exit 2 ;;
esac
