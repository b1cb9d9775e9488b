#!/usr/bin/env bash
# Stops exactly what up.sh started (recorded processes and namespaces): down.sh FOLDER
set -u
LAB=$(realpath -m "$1"); [ -e "$LAB/prefix" ] || exit 0
P=$(cat "$LAB/prefix")
PATH=$PATH:/usr/sbin:/sbin
for file in "$LAB"/pids/ns.*; do
  [ -s "$file" ] || continue
  outer=$(cat "$file"); inner=$(cat /proc/$outer/task/$outer/children 2>/dev/null)
  kill -9 ${inner%% *} 2>/dev/null # the end of a namespace's process 1 ends all others in it
  kill -9 $outer 2>/dev/null
  ip netns del $P-${file##*ns.} 2>/dev/null
done
ip netns del $P-sw 2>/dev/null
if [ -s "$LAB/pids/munged" ]; then
  munged=$(cat "$LAB/pids/munged"); kill "$munged" 2>/dev/null
  for _ in $(seq 50); do [ -d "/proc/$munged" ] || break; sleep .1; done # it writes its seed last
fi
exit 0
