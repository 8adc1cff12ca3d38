#!/usr/bin/env bash
# Runs a real Slurm on this machine, for tests: munged, slurmctld, and one slurmd that pretends to be a GPU node.
#
#   tests/slurm/slurm.sh install            Debian's packages (root)
#   tests/slurm/slurm.sh up DIR             start; all state under DIR, all ports on the loopback address
#   eval "$(tests/slurm/slurm.sh env DIR)"  for sbatch and friends in this shell
#   tests/slurm/slurm.sh down DIR           end jobs and daemons
#
# GPUs are links to /dev/null: Slurm counts, names and assigns them, and nothing computes on them. Memory and cores are not enforced.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
GPUS="h100:4 h100_3g.40gb:1 h100_2g.20gb:1 h100_1g.10gb:1 a100:4 a100_3g.20gb:1 a100_2g.10gb:1 a100_1g.5gb:1"
CORES=64 MEMORY_MB=510000
: "${SLURM_TEST_PORT:=26817}" # slurmctld; slurmd takes the next one

install_packages() {
    # daemons are started here and not by the packages
    local policy=/usr/sbin/policy-rc.d ours=
    [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod 755 "$policy"; ours=1; }
    export DEBIAN_FRONTEND=noninteractive
    local packages=(slurmctld slurmd slurm-client munge)
    apt-get install -y -qq --no-install-recommends "${packages[@]}" ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; }
    [[ -z $ours ]] || rm -f "$policy"
}

configure() {
    mkdir -p "$DIR"/{etc,log,run,state,spool,munge,gpu}
    chmod 755 "$DIR" "$DIR"/*
    local host number=0 resources="" kind count i
    host=$(hostname -s)
    : >"$DIR/etc/gres.conf"
    for entry in $GPUS; do
        kind=${entry%%:*} count=${entry##*:}
        resources+="${resources:+,}gpu:$entry"
        local files=()
        for ((i = 0; i < count; i++)); do
            ln -sf /dev/null "$DIR/gpu/$number"
            files+=("$DIR/gpu/$number")
            number=$((number + 1))
        done
        echo "Name=gpu Type=$kind File=$(IFS=,; echo "${files[*]}")" >>"$DIR/etc/gres.conf"
    done
    # From 23.11 on slurmd wants a cgroup plugin unless told otherwise.
    local version
    version=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
    if [[ $(printf '%s\n' 23.11 "$version" | sort -V | head -n 1) == 23.11 ]]; then
        echo CgroupPlugin=disabled >"$DIR/etc/cgroup.conf"
    else
        echo IgnoreSystemd=yes >"$DIR/etc/cgroup.conf"
    fi
    : >"$DIR/etc/plugstack.conf"
    # A requeued job waits for cred_expire (values below 5 mean the default of 120). The Alliance sets kill_invalid_depend.
    # Job ids start from the clock, so that no id is used twice, even with a fresh DIR.
    cat >"$DIR/etc/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$SLURM_TEST_PORT
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
FirstJobId=$(($(date +%s) % 60000000 + 1))
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
DependencyParameters=kill_invalid_depend
ReturnToService=2
InactiveLimit=0
KillWait=5
MinJobAge=86400
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 Port=$((SLURM_TEST_PORT + 1)) CPUs=$CORES RealMemory=$MEMORY_MB State=UNKNOWN Gres=$resources
PartitionName=main Nodes=ALL Default=YES MaxTime=7-00:00:00 DefMemPerCPU=256 State=UP
CONF
}

alive() { # a process that is there and no zombie
    [[ -s $1 ]] && [[ $(ps -o stat= -p "$(cat "$1")" 2>/dev/null) =~ ^[^Z] ]]
}

await() { # await SECONDS WHAT COMMAND…
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= end)); then
            echo "slurm.sh: no $what after a while" >&2
            tail -n 20 "$DIR"/log/*.log >&2 || true
            return 1
        fi
        sleep 0.2
    done
}

start() {
    for daemon in munged slurmctld slurmd; do
        command -v $daemon >/dev/null || { echo "slurm.sh: $daemon is missing; run '$0 install' as root" >&2; exit 1; }
    done
    if ! getent hosts "$(hostname -s)" >/dev/null; then
        echo "127.0.0.1 $(hostname -s) # slurm.sh" >>/etc/hosts
    fi
    stop
    configure
    [[ -s $DIR/munge/key ]] || head -c 1024 /dev/urandom >"$DIR/munge/key"
    chmod 400 "$DIR/munge/key"
    munged --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" --log-file="$DIR/log/munged.log" \
        --pid-file="$DIR/run/munged.pid" --seed-file="$DIR/munge/seed" --num-threads=2
    await 10 munged munge -n -S "$DIR/munge/socket"
    slurmctld -f "$SLURM_CONF"
    await 30 slurmctld sh -c "scontrol ping | grep -q 'is UP'"
    slurmd -f "$SLURM_CONF"
    await 60 "idle node" sh -c "sinfo -h -o %t | grep -qx idle"
}

stop() {
    if alive "$DIR/run/slurmctld.pid"; then # jobs first, or their step managers outlive the daemons
        squeue -h -o %A | sort -u | xargs -r scancel --quiet || true
        scancel --quiet --signal=KILL --full --state=RUNNING 2>/dev/null || true
        for _ in $(seq 60); do
            [[ -n $(squeue -h -t R,CG) ]] || break
            sleep 0.2
        done
    fi
    local file
    for file in "$DIR"/run/{slurmd,slurmctld,munged}.pid; do
        alive "$file" || continue
        kill "$(cat "$file")" || true
        for _ in $(seq 50); do
            alive "$file" || break
            sleep 0.1
        done
        alive "$file" && kill -9 "$(cat "$file")"
    done
    rm -f "$DIR"/run/*.pid "$DIR"/munge/socket*
}

command=${1:-} DIR=${2:-}
[[ $command == install || $DIR == /* ]] || { sed -n '2,9p' "$0"; exit 2; }
export SLURM_CONF=$DIR/etc/slurm.conf
case $command in
install) install_packages ;;
up) start ;;
env) echo "export SLURM_CONF=$SLURM_CONF" ;;
down) stop ;;
*) sed -n '2,9p' "$0"; exit 2 ;;
esac
