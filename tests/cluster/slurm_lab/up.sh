#!/usr/bin/env bash
# Brings up a throw-away Slurm on one machine, as root and without systemd: a controller and N nodes,
# each in network, process, host name and mount namespaces of its own, with an address of its own.
#   up.sh FOLDER [NODES]
# FOLDER then holds all state, and `FOLDER/on NODE COMMAND...` runs a command on a node (ctl: login).
# LAB_INSTALL=1 installs Debian's packages if they are missing.
# LAB_CPUS, LAB_MEM_MB, LAB_GPUS: per node; GPUs are null devices, for scheduling only.
set -euo pipefail
LAB=$(realpath -m "$1"); N=${2:-2}
CPUS=${LAB_CPUS:-2}; MEM=${LAB_MEM_MB:-6000}; GPUS=${LAB_GPUS:-0}
NET=10.77.0; P=lab$$ # addresses are never routed; the bridge lives in a namespace of its own
PATH=$PATH:/usr/sbin:/sbin
fail() { echo "$1" >&2; exit 3; } # 3: not possible here
[ "$(id -u)" = 0 ] || fail "needs root"
missing() { for c in slurmctld slurmd sbatch munged ip; do command -v $c >/dev/null || echo $c; done; }
if [ -n "$(missing)" ]; then
  [ "${LAB_INSTALL:-0}" = 1 ] || fail "needs $(missing | tr '\n' ' ')(make test-cluster installs them)"
  command -v apt-get >/dev/null || fail "needs apt-get to install Slurm"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null || true
  apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 >/dev/null 2>&1 || fail "apt-get cannot install Slurm"
fi
ip netns add $P-sw 2>/dev/null || fail "needs the right to make network namespaces"

mkdir -p "$LAB"/{state,spool,log,pids,nodes}; cd "$LAB"; echo $P > prefix
# munge: one daemon with a key of its own; its socket is a path that all namespaces see.
dd if=/dev/urandom bs=1 count=1024 of=munge.key status=none; chmod 400 munge.key
munged --force --key-file="$LAB/munge.key" --socket="$LAB/munge.socket" --seed-file="$LAB/munge.seed" \
  --pid-file="$LAB/pids/munged" --log-file="$LAB/log/munged.log"
cat > slurm.conf <<C
ClusterName=$P
SlurmctldHost=ctl($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired.
AuthInfo=socket=$LAB/munge.socket,cred_expire=5
# Nothing here needs cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((MEM/CPUS))
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=5
CompleteWait=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2,preempt_youngest_first
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt
MailProg=/bin/true
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/pids/slurmctld.pid
SlurmdPidFile=$LAB/pids/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
C
{ echo "127.0.0.1 localhost"; echo "$NET.1 ctl"; } > hosts; : > gres.conf
if [ "$GPUS" -gt 0 ]; then
  echo "GresTypes=gpu" >> slurm.conf
  for g in $(seq 0 $((GPUS-1))); do mknod "$LAB/gpu$g" c 1 3; done
fi
for i in $(seq "$N"); do
  gres=""
  if [ "$GPUS" -gt 0 ]; then
    gres="Gres=gpu:$GPUS"; echo "NodeName=n$i Name=gpu File=$LAB/gpu[0-$((GPUS-1))]" >> gres.conf
  fi
  echo "NodeName=n$i NodeAddr=$NET.$((10+i)) CPUs=$CPUS RealMemory=$MEM $gres" >> slurm.conf
  echo "$NET.$((10+i)) n$i" >> hosts
done
cat >> slurm.conf <<C
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
C
cat > node_init.sh <<'I'
#!/bin/bash
# Process 1 of a node: $1 is its name, the rest its daemon. Outlives the daemon, takes in orphans.
name=$1; shift; hostname "$name"; mount --make-rprivate /
mkdir -p "$LAB/spool/$name"
mount --bind "$LAB/hosts" /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
"$@" & daemon=$!
trap 'kill $daemon 2>/dev/null' TERM INT
while :; do wait -n 2>/dev/null; [ -d /proc/$daemon ] || exec sleep infinity; done
I
chmod +x node_init.sh; export LAB SLURM_CONF=$LAB/slurm.conf
ip -n $P-sw link add br0 type bridge; ip -n $P-sw link set br0 up; ip -n $P-sw link set lo up
node() { # name address daemon...
  local name=$1 address=$2; shift 2
  ip netns add $P-$name
  ip -n $P-sw link add v-$name type veth peer name eth0 netns $P-$name
  ip -n $P-sw link set v-$name master br0 up; ip -n $P-$name link set lo up
  ip -n $P-$name addr add $address/24 dev eth0; ip -n $P-$name link set eth0 up
  # Not `ip netns exec`, which mounts /sys anew, without the cgroups that slurmd looks for.
  setsid nsenter --net=/run/netns/$P-$name \
    unshare --mount --uts --pid --fork --kill-child --mount-proc ./node_init.sh "$name" "$@" \
    </dev/null >"$LAB/log/init.$name.log" 2>&1 &
  echo $! > "$LAB/pids/ns.$name"
}
node ctl $NET.1 slurmctld -D -f "$SLURM_CONF"
for i in $(seq "$N"); do node n$i $NET.$((10+i)) slurmd -D -f "$SLURM_CONF"; done
cat > on <<X
#!/bin/bash
# on NODE COMMAND...
unshared=\$(cat $LAB/pids/ns.\$1); shift; inner=\$(cat /proc/\$unshared/task/\$unshared/children)
export SLURM_CONF=$SLURM_CONF
exec nsenter -t \${inner%% *} -m -u -n -p --wdns="\$PWD" "\$@"
X
chmod +x on
# `PATH=FOLDER/bin:$PATH` makes the caller's sbatch that of the login node.
mkdir bin; printf '#!/bin/bash\nexec %q/on ctl %q "$@"\n' "$LAB" "$(command -v sbatch)" > bin/sbatch
chmod +x bin/sbatch
for _ in $(seq 150); do
  [ "$(./on ctl sinfo -h -N -p main -t idle 2>/dev/null | wc -l)" = "$N" ] && exit 0
  sleep .2
done
echo "Slurm did not come up" >&2; tail -n 5 log/*.log >&2; exit 1
