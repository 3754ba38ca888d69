#!/usr/bin/env bash
# A Slurm cluster of virtual nodes on this machine's loopback, for tests: no systemd, no cgroups, no accounting.
# As root on Debian or Ubuntu. Started anew each time; cluster_down.sh ends it.
#   TEST_SLURM_NODES=4  TEST_SLURM_CPUS=16  TEST_SLURM_MEM=20000 (MB)  TEST_SLURM_GPUS=8      what a node claims to have
#   TEST_SLURM_ACCOUNTING=1                                  slurmdbd and MariaDB too, so that sacct answers
# Partitions: `batch`, the default, and `low`, whose jobs are requeued for those of `batch` after GraceTime.
set -euo pipefail
nodes=${TEST_SLURM_NODES:-4} cpus=${TEST_SLURM_CPUS:-16} mem=${TEST_SLURM_MEM:-20000} gpus=${TEST_SLURM_GPUS:-8}
accounting=${TEST_SLURM_ACCOUNTING:-0}
here=$(dirname "$(readlink -f "$0")")
state=/var/lib/slurm-test
host=$(hostname -s)
[ "$(id -u)" = 0 ] || { echo "cluster_up.sh must run as root" >&2; exit 1; }

packages=(slurmctld slurmd slurm-client munge)
[ "$accounting" = 0 ] || packages+=(slurmdbd mariadb-server)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  policy=/usr/sbin/policy-rc.d  # keeps the packages from starting their services
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy
    trap 'rm -f $policy' EXIT
  fi
  fetch() { apt-get install -y -q --no-install-recommends "${missing[@]}"; }
  { fetch || { apt-get update -q && fetch; }; } > "$log" 2>&1 || { tail "$log" >&2; exit 1; }
fi

"$here/cluster_down.sh"
rm -rf "$state"
mkdir -p "$state"/{ctld,log,run,gpu} /etc/slurm

# A node is an address of its own in 127.0.1.0/24, and a slurmd. Its GPUs are device files like /dev/null's.
hosts=$(grep -v '# slurm-test$' /etc/hosts)
{ echo "$hosts"; for i in $(seq "$nodes"); do echo "127.0.1.$i node$i # slurm-test"; done; } > "$state/hosts"
cat "$state/hosts" > /etc/hosts  # in place: it may be a mount
for i in $(seq "$nodes"); do mkdir -p "$state/node$i"; done
for ((g = 0; g < gpus; g++)); do mknod "$state/gpu/gpu$g" c 1 3; done

all="node[1-$nodes]"
{
  cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 120 s, were it not for this.
AuthInfo=cred_expire=5
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/%n
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmdPidFile=$state/run/slurmd.%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd.%n.log
# Without cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=600
InactiveLimit=0
GresTypes=gpu
DefMemPerCPU=100
CONF
  if [ "$accounting" = 0 ]; then
    echo "AccountingStorageType=accounting_storage/none"
  else
    echo "AccountingStorageType=accounting_storage/slurmdbd"
    echo "AccountingStorageHost=127.0.0.1"
    echo "AccountingStoragePort=16819"
    echo "AccountingStorageTRES=gres/gpu"
  fi
  for i in $(seq "$nodes"); do
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.1.$i Port=$((17000 + i))" \
      "CPUs=$cpus RealMemory=$mem Gres=gpu:$gpus State=UNKNOWN"
  done
  echo "PartitionName=batch Nodes=$all Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
  echo "PartitionName=low Nodes=$all MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"
} > /etc/slurm/slurm.conf
echo "NodeName=$all Name=gpu File=$state/gpu/gpu[0-$((gpus - 1))] Flags=nvidia_gpu_env" > /etc/slurm/gres.conf

until_it_works() {  # seconds, command
  local tries=$(($1 * 10)); shift
  for _ in $(seq "$tries"); do "$@" > /dev/null 2>&1 && return; sleep 0.1; done
  echo "cluster_up.sh: still failing: $*" >&2; exit 1
}

install -d -m 755 -o munge -g munge /run/munge
[ -s /etc/munge/munge.key ] || head -c 128 /dev/urandom > /etc/munge/munge.key
chown munge:munge /etc/munge/munge.key
chmod 400 /etc/munge/munge.key
setpriv --reuid=munge --regid=munge --clear-groups munged --pid-file=/run/munge/munged.pid

if [ "$accounting" != 0 ]; then
  db=$state/db socket=/run/mysqld/mysqld.sock
  install -d -o mysql -g mysql /run/mysqld "$db"
  mariadb-install-db --no-defaults --user=mysql --datadir="$db" --skip-test-db \
    --auth-root-authentication-method=socket --auth-root-socket-user=root > "$state/log/mariadb-install.log" 2>&1
  setsid mariadbd --no-defaults --user=mysql --datadir="$db" --socket=$socket --skip-networking \
    --pid-file="$db/mariadbd.pid" < /dev/null > "$state/log/mariadbd.log" 2>&1 &
  until_it_works 20 mariadb-admin --no-defaults -uroot -S $socket ping
  mariadb --no-defaults -uroot -S $socket -e 'create database if not exists slurm_acct_db'
  cat > /etc/slurm/slurmdbd.conf <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
PidFile=$state/run/slurmdbd.pid
LogFile=$state/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CONF
  chmod 600 /etc/slurm/slurmdbd.conf
  slurmdbd
  until_it_works 60 sacctmgr -n list cluster
  sacctmgr -n -i add cluster test > /dev/null
fi

slurmctld -c
for i in $(seq "$nodes"); do slurmd -N "node$i"; done
all_idle() { [ "$(sinfo -h -N -p batch -t idle -o %N | wc -l)" = "$nodes" ]; }
until_it_works 30 all_idle
echo "slurm is up: $nodes nodes"
