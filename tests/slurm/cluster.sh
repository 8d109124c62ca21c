#!/usr/bin/env bash
# A Slurm cluster of a few nodes on this machine, for the tests. Needs root and slurmctld, slurmd, slurm-client,
# munge and iproute2 (Debian's names).
#
#   cluster.sh check              say in one line why a cluster cannot run here; nothing and status 0 if it can
#   cluster.sh start              bring it up, wait until every node is idle; prints the path of slurm.conf
#   cluster.sh stop               take it down; the logs stay in $CLUSTER_STATE/log
#   cluster.sh stop-after FILE    the same, in the background, as soon as no process holds a lock on FILE
#   cluster.sh status             sinfo; status 0 only if every node is up
#   cluster.sh node-off NODE      cut a node's power: slurmd and every task of its die at once
#   cluster.sh node-on NODE       switch it on again
#   cluster.sh controller-off     kill slurmctld; jobs that run go on
#   cluster.sh controller-on      start it again, with the jobs it knew
#   cluster.sh in-node NODE COMMAND...   run a command inside a node that is on
#
# A node (node1, node2, ...) is a set of namespaces with its own hostname, network address, loopback, processes and
# /dev/shm; the file system is shared. Names of nodes resolve inside them only. Nothing outside CLUSTER_STATE and
# /run/plt-slurm-* is written. What a crashed run left behind is found again by the name of CLUSTER_STATE.
#
# Settings, from the environment: CLUSTER_STATE (a folder), CLUSTER_NODES=3; of each node CLUSTER_CPUS=8,
# CLUSTER_MEMORY_MB=65536 and CLUSTER_GPUS=2, as Slurm is told them, whatever the machine has. The GPUs are device files
# behind which nothing is: they can be asked for and allocated, not used.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

state=$(realpath -m "${CLUSTER_STATE:-${TMPDIR:-/tmp}/plt-slurm-cluster}")
node_count=${CLUSTER_NODES:-3} cpus=${CLUSTER_CPUS:-8} memory=${CLUSTER_MEMORY_MB:-65536} gpus=${CLUSTER_GPUS:-2}
conf=$state/slurm.conf
number=$(printf %s "$state" | cksum | cut -d' ' -f1)
id=$(printf %06x $((number % 0x1000000)))
subnet=10.$((number % 120 + 100)).$((number / 1000 % 250))
controller=$subnet.254
bridge=plt$id
run=/run/plt-slurm-$id

netns() { echo "plt-slurm-$id-$1"; }

# Processes. A pid file holds the process id and its start time, so that a later process with the same id is safe.

started_at() { # PID: fails if there is no such process, or only its zombie
    local fields
    fields=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -r -a fields <<<"${fields##*) }"
    [[ ${fields[0]} != Z ]] && echo "${fields[19]}"
}

pid_of() { # NAME: the process id, if it is alive
    local pid start
    read -r pid start 2>/dev/null <"$run/$1.pid" || return 1
    [[ $start && $(started_at "$pid") == "$start" ]] && echo "$pid"
}

spawn() { # NAME COMMAND...: in the background, with none of our files open
    local name=$1
    shift
    setsid "$@" <&- >>"$state/log/$name.out" 2>&1 9>&- &
    echo "$! $(started_at $! || true)" >"$run/$name.pid"
}

quit() { # NAME SIGNAL: end a process, with SIGKILL if the signal is not enough
    local pid signal tries
    for signal in "$2" KILL; do
        pid=$(pid_of "$1") || break
        kill "-$signal" "$pid" 2>/dev/null || true
        for ((tries = 0; tries < 100; tries++)); do
            pid_of "$1" >/dev/null || break
            sleep 0.05
        done
    done
    rm -f "$run/$1.pid"
}

until_true() { # SECONDS WHAT COMMAND...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= deadline)); then
            tail -n 5 "$state"/log/* >&2 || true
            fail "$what did not come up in time; the ends of the logs are above"
        fi
        sleep 0.1
    done
}

# Configuration.

write_configuration() {
    local node gpu
    echo 'CgroupPlugin=disabled' >"$state/cgroup.conf"
    for ((gpu = 0; gpu < gpus; gpu++)); do mknod "$state/dev/gpu$gpu" c 1 3; done
    printf 'AutoDetect=off\nName=gpu Type=h100 File=%s/dev/gpu[0-%d]\n' "$state" $((gpus - 1)) >"$state/gres.conf"
    : >"$state/plugstack.conf"
    # A slurmctld calls a client back by the name of its host: the last name is this machine's.
    printf '127.0.0.1 localhost\n%s ctl %s\n' "$controller" "$(uname -n)" >"$state/hosts"
    cat >"$conf" <<CONF
ClusterName=tests
SlurmctldHost=ctl($controller)
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long a requeued job waits for its old credentials to expire: 120 s by default, 5 s at least.
AuthInfo=socket=$run/munge/socket,cred_expire=5
StateSaveLocation=$state/controller
SlurmctldPidFile=$state/controller/pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdSpoolDir=$state/spool/%n
SlurmdPidFile=$state/spool/%n.pid
SlurmdLogFile=$state/log/%n.log
PlugStackConfig=$state/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1024
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
# The partition "urgent" preempts "main": its jobs are warned, have GraceTime to save, and are requeued.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
# A node that does not answer is DOWN after about 10 s.
SlurmdTimeout=8
MessageTimeout=2
TCPTimeout=2
KillWait=30
InactiveLimit=0
MinJobAge=3600
# Each start counts from another number, so that no job writes to an older one's files.
FirstJobId=$(($(date +%s) % 10000000 + 1))
# Believe this file, not the hardware.
SlurmdParameters=config_overrides
GresTypes=gpu
CONF
    for ((node = 1; node <= node_count; node++)); do
        echo "NodeName=node$node NodeAddr=$subnet.$node CPUs=$cpus RealMemory=$memory Gres=gpu:h100:$gpus State=UNKNOWN" >>"$conf"
        echo "$subnet.$node node$node" >>"$state/hosts"
    done
    cat >>"$conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

make_network() { # nodes reach each other and this machine's end of the bridge, and nothing else
    local node name
    ip link add "$bridge" type bridge
    ip address add "$controller/24" dev "$bridge"
    ip link set "$bridge" up
    for ((node = 1; node <= node_count; node++)); do
        name=$(netns node$node)
        ip netns add "$name"
        ip link add "$bridge.$node" type veth peer name eth0 netns "$name"
        ip link set "$bridge.$node" master "$bridge" up
        ip -n "$name" address add "$subnet.$node/24" dev eth0
        ip -n "$name" link set lo up
        ip -n "$name" link set eth0 up
    done
}

# Daemons.

start_node() { # when the process dies, so does the first process of its process-id namespace, and with it all of it
    # shellcheck disable=SC2016 # the inner shell expands it
    spawn "$1" nsenter "--net=/run/netns/$(netns "$1")" \
        unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc bash -euc '
            hostname "$1"
            mount --bind "$2/hosts" /etc/hosts
            mount -t tmpfs -o mode=1777,size=256m shm /dev/shm
            # Not exec: bash, as process 1, also reaps what slurmd leaves behind.
            SLURM_CONF=$2/slurm.conf slurmd -D -N "$1" &
            wait $!' bash "$1" "$state"
}

start_controller() { # on a host called ctl, whose address it takes
    # shellcheck disable=SC2016
    spawn slurmctld unshare --uts --mount bash -euc '
        hostname ctl
        mount --bind "$1/hosts" /etc/hosts
        SLURM_CONF=$1/slurm.conf exec slurmctld -D -i' bash "$state"
}

all_up() {
    local states
    states=$(SLURM_CONF=$conf timeout 5 sinfo --noheader --Node --partition=main --format='%N %T') || return 1
    [[ $(grep -cE ' (idle|mixed|allocated)$' <<<"$states") == $(grep -c ^NodeName= "$conf") ]]
}

check() {
    local program missing=''
    [[ $(id -u) == 0 ]] || {
        echo "a Slurm test cluster needs root"
        return 1
    }
    for program in munged slurmctld slurmd sbatch ip unshare nsenter; do
        command -v "$program" >/dev/null || missing+=" $program"
    done
    [[ ! $missing ]] || {
        echo "not installed:$missing (apt-get install slurmctld slurmd slurm-client munge iproute2)"
        return 1
    }
    unshare --net --uts --ipc --mount --pid --fork --mount-proc true 2>/dev/null || {
        echo "no namespaces may be made here (a container without CAP_SYS_ADMIN?)"
        return 1
    }
    unshare --net --mount bash -ec '
        ip link add bridge type bridge && ip link add one type veth peer name two
        mount -t tmpfs -o mode=755 dev /mnt && mknod /mnt/gpu c 1 3' 2>/dev/null || {
        echo "no network bridge or no device file may be made here (a container without CAP_NET_ADMIN or CAP_MKNOD?)"
        return 1
    }
}

stop() {
    local file name
    [[ ! -e $conf ]] || echo '# stopped' >"$conf" # a client now fails at once instead of calling for a minute
    for file in "$run"/node*.pid; do
        name=${file##*/}
        [[ ! -e $file ]] || quit "${name%.pid}" KILL
    done
    for name in slurmctld munged; do quit $name TERM; done
    ip netns list 2>/dev/null | while read -r name _; do
        [[ $name != plt-slurm-$id-* ]] || ip netns delete "$name"
    done
    for file in "/sys/class/net/$bridge".* "/sys/class/net/$bridge"; do
        [[ ! -e $file ]] || ip link delete "${file##*/}" 2>/dev/null || true
    done
    rm -rf "${state:?}"/{controller,spool,dev} "$run/munge"
}

start() {
    local node reason
    reason=$(check) || fail "$reason"
    stop
    rm -rf "${state:?}/log"
    mkdir -p "$state"/{controller,spool,dev,log} "$run/munge"
    chmod 755 "$state" "$state"/{controller,spool,dev,log} "$run" "$run/munge"
    write_configuration
    make_network
    (umask 077 && head -c 1024 /dev/urandom >"$run/munge/key")
    spawn munged munged -F --socket="$run/munge/socket" --key-file="$run/munge/key" \
        --log-file="$state/log/munged.log" --pid-file="$run/munge/pid" --seed-file="$run/munge/seed"
    until_true 10 munged munge -n --socket="$run/munge/socket"
    start_controller
    until_true 20 slurmctld env SLURM_CONF="$conf" timeout 5 scontrol ping
    for ((node = 1; node <= node_count; node++)); do start_node node$node; done
    until_true 40 "a node" all_up
    echo "$conf"
}

first_process() { # NODE: the process 1 of its namespace, seen from here
    local pid
    pid=$(pid_of "$1") || fail "$1 is not on"
    # nsenter became unshare, whose only child is the namespace's first process.
    cat "/proc/$pid/task/$pid/children"
}

verb=${1:-}
node=${2:-}
case $verb in
    check) check && exit 0 || exit 1 ;;
    start | stop | status | controller-off | controller-on) ;;
    stop-after) [[ -e ${2:-} ]] || fail "there is no file '${2:-}'" ;;
    node-off | node-on | in-node) [[ -e /run/netns/$(netns "$node") ]] || fail "there is no node '$node'" ;;
    *)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
[[ $state =~ ^/[A-Za-z0-9._/+@-]+$ ]] || fail "CLUSTER_STATE may hold letters, digits and ._/+@- only: '$state'"
mkdir -p "$state" "$run"
if [[ $verb == in-node ]]; then
    shift 2
    pid=$(first_process "$node")
    exec nsenter --target "${pid%% *}" --net --uts --ipc --mount --pid env SLURM_CONF="$conf" "$@"
fi
if [[ $verb == stop-after ]]; then
    # In a session of its own: what ends its caller does not end it.
    CLUSTER_STATE=$state setsid flock "$2" "${BASH_SOURCE[0]}" stop </dev/null >/dev/null 2>&1 &
    exit
fi
exec 9>"$run/lock"
flock -w 120 9 || fail "another run of this script holds $run/lock"
case $verb in
    start)
        trap 'code=$?; ((code == 0)) || stop || true' EXIT
        start
        ;;
    stop) stop ;;
    status) SLURM_CONF=$conf sinfo --Node --long && all_up ;;
    controller-off) quit slurmctld KILL ;;
    controller-on)
        pid_of slurmctld >/dev/null || start_controller
        until_true 20 slurmctld env SLURM_CONF="$conf" timeout 5 scontrol ping
        ;;
    node-off) quit "$node" KILL ;;
    node-on) pid_of "$node" >/dev/null || start_node "$node" ;;
esac
