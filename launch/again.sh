#!/bin/bash
# Runs a command again for as long as it asks for it:  bash launch/again.sh COMMAND [ARGUMENT ...]
#
# 42 (interrupted and saved), 43 (hung, or another process is gone) and death by a signal start it
# again, at most RESTARTS times (default 100), PAUSE seconds later (default 5); any other code ends
# it with that code. SIGTERM and SIGINT go on to the command, which is then not started again.

set -u
told=0
child=0
early=0 # Told while the command had no number yet: it must hear of it once, and only once.
hear() {
  told=1
  heard=1
  if [ "$child" -eq 0 ]; then early=1; else kill -TERM "$child" 2>/dev/null; fi
}
trap hear TERM INT

left=${RESTARTS:-100}
while true; do
  "$@" &
  child=$!
  [ "$early" -eq 0 ] || kill -TERM "$child" 2>/dev/null
  heard=1
  while [ "$heard" -eq 1 ]; do # A signal ends `wait` early, while the command still saves.
    heard=0
    wait "$child"
    code=$?
  done
  child=0
  case $code in
    42 | 43) ;;
    *) [ "$code" -gt 128 ] || exit "$code" ;;
  esac
  if [ "$told" -eq 1 ] || [ "$left" -le 0 ]; then
    exit "$code"
  fi
  left=$((left - 1))
  echo "again.sh: left with $code; starting again, $left restarts left" >&2
  sleep "${PAUSE:-5}" &
  child=$!
  wait "$child"
  child=0
  [ "$told" -eq 0 ] || exit "$code"
done
