#!/usr/bin/env bash
# Stands in for the programs that a launch script calls; linked under each of their names. Every call is a line of
# $STATE/calls, "NODE: PROGRAM ARGUMENTS". A file $STATE/lose-NODE ends that node's Ray, $STATE/kill-server the server.
program=$(basename "$0")
echo "${NODE:-local}: $program $*" >> "$STATE/calls"
pause() { command -p sleep 0.05; }
case $program in
    scontrol) printf '%s\n' node1 node2 ;;
    hostname) echo "10.0.0.1 192.168.0.1" ;;
    sleep) pause ;;
    curl) [ -e "$STATE/healthy" ] ;;
    srun)
        for argument; do [[ $argument = --nodelist=* ]] && export NODE=${argument#--nodelist=}; done
        exec bash -c "${@: -1}"
        ;;
    ssh)
        export NODE=${*: -2:1}
        exec bash -c "${@: -1}"
        ;;
    ray)
        case "$1" in
            start)
                [ ! -e "$STATE/down-$NODE" ] || exit 1
                trap 'rm -f "$STATE/ray-$NODE"; echo "$NODE: ray ended" >> "$STATE/calls"; exit 1' TERM
                touch "$STATE/ray-$NODE"
                until [ -e "$STATE/lose-$NODE" ]; do pause; done
                rm -f "$STATE/lose-$NODE" "$STATE/ray-$NODE"
                exit 1
                ;;
            status)
                joined=("$STATE"/ray-*)
                [ -e "${joined[0]}" ] || joined=()
                echo " 0.0/$((8 * ${#joined[@]})).0 GPU"
                ;;
        esac
        ;;
    vllm)
        trap 'rm -f "$STATE/healthy"; echo "$NODE: vllm ended" >> "$STATE/calls"; exit 0' TERM
        [ ! -e "$STATE/no-server" ] || exit 1
        touch "$STATE/healthy"
        until [ -e "$STATE/kill-server" ]; do pause; done
        rm -f "$STATE/kill-server" "$STATE/healthy"
        exit 1
        ;;
esac
