#!/usr/bin/env bash
# End what cluster_up.sh started: the daemons by their pid files, jobs' processes by their step daemons.
state=/var/lib/slurm-test
running() { [ -r "/proc/$1/stat" ] && [ "$(awk '{print $3}' "/proc/$1/stat" 2>/dev/null)" != Z ]; }

if [ -e $state/run/slurmctld.pid ]; then
  timeout 5 scancel --user=root > /dev/null 2>&1
fi
for file in $state/run/slurmctld.pid $state/run/slurmd.*.pid $state/run/slurmdbd.pid $state/db/mariadbd.pid \
  /run/munge/munged.pid; do
  pid=$(cat "$file" 2>/dev/null) && running "$pid" || continue
  kill "$pid"
  for _ in $(seq 100); do running "$pid" || break; sleep 0.1; done
  running "$pid" && kill -9 "$pid"
done
for pid in $(pgrep -x slurmstepd); do  # they outlive slurmd
  case $(readlink "/proc/$pid/cwd") in $state/*) kill -9 "$pid" ;; esac
done
exit 0
