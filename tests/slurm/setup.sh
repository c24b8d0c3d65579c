#!/usr/bin/env bash
# A Slurm on this machine for tests: controller and one node, without munge, accounting or root's configuration.
#
#   tests/slurm/setup.sh FOLDER         starts it with its state in FOLDER, and prints what to export
#   tests/slurm/setup.sh FOLDER stop    stops it
#
# Needs root and: apt-get install --no-install-recommends slurm-wlm
set -euo pipefail

dir=$(realpath -m "${1:?usage: setup.sh FOLDER [stop]}")
export SLURM_CONF=$dir/slurm.conf

stop() {
    for name in slurmd slurmctld; do
        [ ! -s "$dir/$name.pid" ] || kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
    done
}

if [ "${2:-start}" = stop ]; then
    stop
    exit
fi
for program in slurmctld slurmd sbatch squeue scancel; do
    command -v $program > /dev/null || {
        echo "there is no $program: apt-get install --no-install-recommends slurm-wlm" >&2
        exit 3
    }
done
if scontrol ping > /dev/null 2>&1 && [ -s "$dir/slurmctld.pid" ]; then
    echo "export SLURM_CONF=$SLURM_CONF TEMPER_SLURM=1"
    exit
fi
mkdir -p "$dir"/{state,spool,log}
plugins=$(find /usr/lib /usr/lib64 -name 'auth_none.so' -printf '%h\n' -quit 2> /dev/null)
stepd=$(find /usr/sbin /usr/lib -name 'slurmstepd-wlm' -o -name 'slurmstepd' 2> /dev/null | head -1)
cores=$(nproc)
memory=$(awk '/^MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
cat > "$SLURM_CONF" <<CONF
ClusterName=temper
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
PluginDir=$plugins
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd
SlurmctldPort=26817
SlurmdPort=26818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
MailProg=/bin/true
ReturnToService=2
MinJobAge=60
KillWait=5
OverTimeLimit=0
SwitchType=switch/none
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Sockets=1 CoresPerSocket=$cores ThreadsPerCore=1 RealMemory=$memory State=UNKNOWN
PartitionName=p Nodes=n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
slurmctld
slurmd -N n1 ${stepd:+-d "$stepd"}
for _ in $(seq 100); do
    if [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ]; then
        echo "export SLURM_CONF=$SLURM_CONF TEMPER_SLURM=1"
        exit
    fi
    sleep 0.2
done
echo "the node does not come up; see $dir/log" >&2
sinfo >&2 || true
exit 3
