#!/usr/bin/env bash
# A real, throw-away Slurm cluster of several nodes on one machine, for tests.
#
#   cluster.sh install                        apt-get what is missing: slurm-wlm munge
#   cluster.sh start     STATE_DIR [options]  start (or do nothing if already up)
#   cluster.sh env       STATE_DIR            print "export ..." lines, for eval
#   cluster.sh status    STATE_DIR            exit 0 when the controller answers
#   cluster.sh exec      STATE_DIR -- CMD...  run CMD on the "login node"
#   cluster.sh kill-slurmd STATE_DIR NODE     kill -9 slurmd only: job processes live on
#   cluster.sh crash     STATE_DIR NODE       the whole node vanishes, jobs included
#   cluster.sh unplug    STATE_DIR NODE       cut the node's network   (mode netns only)
#   cluster.sh plug      STATE_DIR NODE       restore it               (mode netns only)
#   cluster.sh up        STATE_DIR NODE       (re)start a node and clear its DOWN state
#   cluster.sh restart-ctld STATE_DIR         stop and start slurmctld, keeping its state
#   cluster.sh stop      STATE_DIR [--purge]  stop by recorded pids; --purge deletes the folder
#
# Options of start, each also settable in the environment (name in brackets):
#   --nodes N          compute nodes, named n1..nN                             [SC_NODES=4]
#   --mode MODE        plain | hosts | netns                                   [SC_MODE=hosts]
#       plain  N slurmd on different ports of 127.0.0.1, no namespaces: unprivileged containers
#       hosts  the same, each in its own pid, uts, mount and ipc namespace: own host name, names
#              resolve, a node can be crashed as a whole; clients run unmodified; only loopback is used
#       netns  also a network namespace a node (own address, own ports, can be unplugged); clients are
#              reached through the wrappers in STATE_DIR/bin, which `env` puts on PATH
#   --cpus N           CPUs that each node claims to have (need not exist)     [SC_CPUS=8]
#   --mem MB           memory that each node claims to have                    [SC_MEM=16000]
#   --gpus N           fake GPUs a node (gres/gpu; sets CUDA_VISIBLE_DEVICES)  [SC_GPUS=0]
#   --slurmd-timeout S seconds before a silent node is DOWN                    [SC_SLURMD_TIMEOUT=10]
#
# hosts and netns need root. No systemd, no Docker. Nothing outside of STATE_DIR is written (but by apt-get); pids are
# recorded in STATE_DIR/pids with their start times, and only those are ever signalled.
set -euo pipefail

SELF=$(readlink -f "$0")
die()  { echo "cluster.sh: $*" >&2; exit 1; }
note() { [ -n "${SC_QUIET:-}" ] || echo "cluster.sh: $*" >&2; }
usage() { awk 'NR==1{next} /^#/{sub(/^# ?/,""); print; next} {exit}' "$SELF"; exit "${1:-2}"; }

# ---------------------------------------------------------------- pids
# A pid file holds "PID STARTTIME"; STARTTIME (field 22 of /proc/PID/stat) guards against pid reuse.
starttime() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; read -ra s <<<"$s"; echo "${s[19]}"; }
remember()  { mkdir -p "$S/pids"; echo "$2 $(starttime "$2" || echo 0)" >"$S/pids/$1"; }
pid_of()    { # print the pid recorded under NAME if that very process is still alive
  local p t; [ -f "$S/pids/$1" ] || return 1
  read -r p t <"$S/pids/$1" || return 1
  [ "$(starttime "$p" || true)" = "$t" ] || return 1
  case $(sed 's/.*) //' "/proc/$p/stat" 2>/dev/null) in Z*|'') return 1;; esac
  echo "$p"; }
end() { # end NAME [signal] [seconds to wait before KILL]
  local p i; p=$(pid_of "$1") || { rm -f "$S/pids/$1"; return 0; }
  kill "-${2:-TERM}" "$p" 2>/dev/null || true
  for ((i = 0; i < ${3:-5} * 20; i++)); do pid_of "$1" >/dev/null || break; sleep 0.05; done
  if p=$(pid_of "$1"); then kill -KILL "$p" 2>/dev/null || true; sleep 0.1; fi
  rm -f "$S/pids/$1"; }
wait_for() { # wait_for SECONDS CMD...
  local _i _n=$(( $1 * 20 )); shift
  for ((_i = 0; _i < _n; _i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.05; done; return 1; }

# ---------------------------------------------------------------- install
cmd_install() {
  local want=()
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || want+=(slurm-wlm)
  command -v munged >/dev/null || want+=(munge)
  command -v unshare >/dev/null && command -v nsenter >/dev/null || want+=(util-linux)
  command -v ip >/dev/null || want+=(iproute2)
  [ ${#want[@]} -gt 0 ] || { note "nothing to install"; return 0; }
  [ "$(id -u)" = 0 ] || die "missing ${want[*]}; run '$SELF install' as root"
  note "apt-get install ${want[*]}"
  # Where a package's scripts could start daemons with the distribution's configuration, forbid it.
  local prc=/usr/sbin/policy-rc.d made=0
  if [ ! -e $prc ]; then printf '#!/bin/sh\nexit 101\n' >$prc; chmod 755 $prc; made=1; fi
  local rc=0
  { DEBIAN_FRONTEND=noninteractive apt-get -qq update &&
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${want[@]}"; } >&2 || rc=$?
  [ $made = 1 ] && rm -f $prc
  return $rc; }

# ---------------------------------------------------------------- configuration
pick_ports() { # a block of free TCP ports below the ephemeral range
  local used base try p ok
  used=" $(awk 'FNR>1 && $4=="0A"{split($2,a,":"); print a[2]}' /proc/net/tcp /proc/net/tcp6 2>/dev/null |
           while read -r h; do echo $((16#$h)); done | tr '\n' ' ') "
  base=$(( 20000 + ( $(printf '%s' "$S" | cksum | cut -d' ' -f1) % 120 ) * 100 ))
  for try in $(seq 0 119); do
    p=$(( 20000 + (base - 20000 + try * 100) % 12000 )); ok=1
    for q in $(seq "$p" $((p + NODES + 9))); do case $used in *" $q "*) ok=0; break;; esac; done
    [ $ok = 1 ] && { echo "$p"; return; }
  done; die "no free ports"; }

addr() { # address of node number $1 (0 = controller/login)
  case $MODE in plain) echo 127.0.0.1;; hosts) echo "127.0.0.$(( $1 ? 10 + $1 : 1 ))";; netns) echo "10.213.0.$(( 10 + $1 ))";; esac; }

write_config() {
  local i port ctl_name; port=$(pick_ports); echo "$port" >"$S/port"
  if [ "$MODE" = netns ]; then ctl_name=login; else ctl_name=$(hostname -s); fi
  # names: the machine's own file, then ours
  { grep -v -E '[[:space:]]n[0-9]+$' /etc/hosts
    [ "$MODE" = netns ] && echo "$(addr 0) login"
    for i in $(seq 1 "$NODES"); do echo "$(addr "$i") n$i"; done; } >"$S/hosts"
  local gres_types='' gres_node=''
  if [ "$GPUS" -gt 0 ]; then # slurmd wants character devices, but only stats them: link to /dev/null
    mkdir -p "$S/dev"; for i in $(seq 0 $((GPUS - 1))); do ln -sfn /dev/null "$S/dev/nvidia$i"; done
    gres_types="GresTypes=gpu"; gres_node=" Gres=gpu:$GPUS"
    if [ "$GPUS" = 1 ]; then echo "Name=gpu File=$S/dev/nvidia0" >"$S/gres.conf"
    else echo "Name=gpu File=$S/dev/nvidia[0-$((GPUS - 1))]" >"$S/gres.conf"; fi
  fi
  {
    cat <<EOF
# written by cluster.sh; mode $MODE
ClusterName=throwaway
SlurmctldHost=$ctl_name($(addr 0))
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# cred_expire also sets how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$S/run/munge.sock,cred_expire=5
StateSaveLocation=$S/ctld
SlurmdSpoolDir=$S/spool/%n
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
PlugStackConfig=$S/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=$SLURMD_TIMEOUT
InactiveLimit=0
KillWait=60
MinJobAge=7200
# clusters side by side share one port space in modes plain and hosts: keep job ids apart, so that a
# MASTER_PORT computed from the job id does not collide
FirstJobId=$((port - 19999))
BatchStartTimeout=60
MessageTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0,nohold_on_prolog_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# deliver a job's own --signal at preemption, instead of only SIGTERM
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc=$S/log/jobcomp.txt
AccountingStorageType=accounting_storage/none
$gres_types
EOF
    for i in $(seq 1 "$NODES"); do
      local h=n$i p=$((port + 9 + i)); [ "$MODE" = plain ] && h=$(hostname -s); [ "$MODE" = netns ] && p=$((port + 10))
      echo "NodeName=n$i NodeHostname=$h NodeAddr=$(addr "$i") Port=$p CPUs=$CPUS RealMemory=$MEM$gres_node State=UNKNOWN"
    done
    cat <<EOF
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low   Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=60
EOF
  } >"$S/slurm.conf"
  : >"$S/plugstack.conf"
  printf 'NODES=%s MODE=%s CPUS=%s MEM=%s GPUS=%s SLURMD_TIMEOUT=%s\n' \
    "$NODES" "$MODE" "$CPUS" "$MEM" "$GPUS" "$SLURMD_TIMEOUT" >"$S/settings"
}

write_wrappers() { # netns mode: client commands that enter the login node's namespaces
  mkdir -p "$S/bin"; local c
  for c in sbatch srun salloc squeue scancel scontrol sinfo sacct sacctmgr sattach sbcast sdiag sprio sreport sstat strigger; do
    command -v "$c" >/dev/null || continue
    printf '#!/bin/sh\nexec %q exec %q -- %q "$@"\n' "$SELF" "$S" "$(PATH=$CLEAN_PATH command -v "$c")" >"$S/bin/$c"; chmod 755 "$S/bin/$c"
  done; }

# ---------------------------------------------------------------- processes
# The login node (netns mode): a namespace holder whose net namespace has the bridge.
holder() { # holder NAME HOSTNAME: background namespaces, record the pid of their init
  local name=$1 host=$2 flags=(--uts --mount --ipc --fork --kill-child=KILL)
  [ "$name" = login ] || flags+=(--pid --mount-proc)   # the login node keeps the machine's pids and /proc
  [ "$MODE" = netns ] && flags+=(--net)
  rm -f "$S/run/$name.ready"
  # shellcheck disable=SC2016
  setsid unshare "${flags[@]}" bash -c '
      hostname "$2"; mount --bind "$1/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm
      command -v ip >/dev/null && ip link set lo up 2>/dev/null
      : >"$1/run/$3.ready"
      [ "$3" != login ] || exec sleep infinity
      # pid 1 of the node: only reaps orphans (bash does that while it waits)
      while :; do sleep 1000000 & wait $!; done' node-init "$S" "$host" "$name" \
      </dev/null >"$S/log/$name.init.log" 2>&1 &
  local u=$! c
  remember "$name.unshare" "$u"   # at once, so that stop can end it whatever happens next
  wait_for 10 test -e "$S/run/$name.ready" || die "$name: namespaces did not start, see $S/log/$name.init.log"
  read -r c _ <"/proc/$u/task/$u/children" || [ -n "$c" ]   # the file has no newline
  remember "$name" "$c"; }
enter() { # enter NAME CMD...: run in that node's namespaces
  local p; p=$(pid_of "$1") || die "$1 is not up"; shift
  local f=(-t "$p" -m -u -i); [ "$MODE" = netns ] && f+=(-n)
  nsenter "${f[@]}" -- "$@"; }   # not -p: ip(8) must be able to name another node by its pid
on_login() { if [ "$MODE" = netns ]; then enter login "$@"; else "$@"; fi; }

daemon() { # daemon NAME NODE|- CMD...: start detached with a clean environment, record its pid
  local name=$1 node=$2 pre=() ; shift 2
  if [ "$node" != - ]; then
    local p; p=$(pid_of "$node") || die "$node is not up"
    # nsenter -p forks, so the pid is looked up through the daemon's own pid namespace below
    pre=(nsenter -t "$p" -m -u -i); [ "$node" = login ] || pre+=(-p); [ "$MODE" = netns ] && pre+=(-n); pre+=(--)
  fi
  setsid env -i PATH="$CLEAN_PATH" HOME="$S" LANG=C.UTF-8 SLURM_CONF="$S/slurm.conf" \
    "${pre[@]}" "$@" </dev/null >"$S/log/$name.out" 2>&1 &
  local pid=$!
  if [ "$node" != - ] && [ "$node" != login ]; then
    wait_for 5 sh -c "grep -q . /proc/$pid/task/$pid/children" || { cat "$S/log/$name.out" >&2; die "$name did not start"; }
    local c; read -r c _ <"/proc/$pid/task/$pid/children" || [ -n "$c" ]; pid=$c
  fi
  remember "$name" "$pid"; }

login_ns() { [ "$MODE" = netns ] && echo login || echo -; }

start_munge() {
  pid_of munged >/dev/null && return
  mkdir -p "$S/munge" "$S/run"; chmod 700 "$S/munge"; chmod 755 "$S/run"
  [ -f "$S/munge/key" ] || { ( umask 077; head -c 128 /dev/urandom >"$S/munge/key" ); chmod 400 "$S/munge/key"; }
  rm -f "$S/run/munge.sock" "$S/run/munge.sock.lock"
  # --force: the state directory may sit below a group-writable or sticky directory
  daemon munged - munged --foreground --force --key-file="$S/munge/key" --socket="$S/run/munge.sock" \
    --pid-file="$S/run/munged.pid" --log-file="$S/log/munged.log" --seed-file="$S/munge/seed" --num-threads=4
  wait_for 10 munge -n -S "$S/run/munge.sock" || { tail -n 5 "$S/log/munged.out" >&2; die "munged did not start"; }; }

start_ctld() {
  pid_of slurmctld >/dev/null || daemon slurmctld "$(login_ns)" slurmctld -D
  wait_for 30 on_login scontrol ping || { tail -n 20 "$S/log/slurmctld.log" >&2; die "slurmctld does not answer"; }; }

start_node() {
  local i=$1 n=n$1 v
  if [ "$MODE" != plain ] && ! pid_of "$n" >/dev/null; then
    holder "$n" "$n"
    if [ "$MODE" = netns ]; then
      v=v$i
      enter login ip link del "$v" 2>/dev/null || true
      enter login ip link add "$v" type veth peer name eth0 netns "$(pid_of "$n")"
      enter login ip link set "$v" master br0 up
      enter "$n" ip addr add "$(addr "$i")/24" dev eth0
      enter "$n" ip link set eth0 up
    fi
  fi
  mkdir -p "$S/spool/$n"
  pid_of "slurmd-$n" >/dev/null ||
    if [ "$MODE" = plain ]; then daemon "slurmd-$n" - slurmd -D -N "$n"; else daemon "slurmd-$n" "$n" slurmd -D -N "$n"; fi; }

# ---------------------------------------------------------------- commands
load() { # read the settings a running cluster was started with
  [ -f "$S/settings" ] || die "no cluster in $S"
  local kv all; read -ra all <"$S/settings"; for kv in "${all[@]}"; do declare -g "${kv%%=*}=${kv#*=}"; done
  export SLURM_CONF=$S/slurm.conf; }

nodes_ready() { [ "$(on_login sinfo -h -N -p debug -t idle,mixed,allocated -o %N 2>/dev/null | sort -u | wc -l)" -ge "$NODES" ]; }

cmd_start() {
  NODES=${SC_NODES:-4} MODE=${SC_MODE:-hosts} CPUS=${SC_CPUS:-8} MEM=${SC_MEM:-16000} GPUS=${SC_GPUS:-0}
  SLURMD_TIMEOUT=${SC_SLURMD_TIMEOUT:-10}
  while [ $# -gt 0 ]; do
    case $1 in
      --nodes) NODES=$2; shift;; --mode) MODE=$2; shift;; --cpus) CPUS=$2; shift;; --mem) MEM=$2; shift;;
      --gpus) GPUS=$2; shift;; --slurmd-timeout) SLURMD_TIMEOUT=$2; shift;;
      *) die "unknown option $1";;
    esac; shift
  done
  case $MODE in plain|hosts|netns) ;; *) die "mode is plain, hosts or netns";; esac
  case $NODES in ''|*[!0-9]*|0) die "--nodes wants a number";; esac; [ "$NODES" -le 200 ] || die "at most 200 nodes"
  [ "$MODE" = plain ] || [ "$(id -u)" = 0 ] || die "mode $MODE needs root (mode plain does not)"
  local c; for c in slurmctld slurmd sbatch munged; do command -v $c >/dev/null || die "$c is missing: run '$SELF install'"; done
  if pid_of slurmctld >/dev/null; then load; else
    mkdir -p "$S"/{run,log,ctld,spool,pids}; chmod 755 "$S" "$S"/{run,log,ctld,spool}
    [ -f "$S/settings" ] && [ -f "$S/slurm.conf" ] && [ "${SC_KEEP:-0}" = 1 ] || write_config
    load
  fi
  start_munge
  if [ "$MODE" = netns ]; then
    if ! pid_of login >/dev/null; then
      holder login login
      enter login ip link add br0 type bridge; enter login ip addr add "$(addr 0)/24" dev br0; enter login ip link set br0 up
    fi
    write_wrappers
  fi
  start_ctld
  local i; for i in $(seq 1 "$NODES"); do start_node "$i"; done
  wait_for 30 nodes_ready || { on_login sinfo -N -l >&2 || true; die "nodes did not come up; logs in $S/log"; }
  note "$NODES nodes up (mode $MODE) in $S"
  cmd_env; }

cmd_env() { load
  echo "export SLURM_CONF=$(printf %q "$S/slurm.conf")"
  [ "$MODE" = netns ] && echo "export PATH=$(printf %q "$S/bin"):\$PATH"; return 0; }
cmd_status() { load; on_login scontrol ping && on_login sinfo -N -p debug -o '%N %T %c %m %G %E'; }
cmd_exec() { load; [ "${1:-}" = -- ] && shift; [ $# -gt 0 ] || usage
  if [ "$MODE" = netns ]; then local p d=$PWD; p=$(pid_of login) || die "not running"
    exec nsenter -t "$p" -m -u -i -n --wd="$d" -- "$@"; else exec "$@"; fi; }

check_node() { case $1 in n[0-9]*) ;; *) die "no node ${1:-given}";; esac; [ "${1#n}" -le "$NODES" ] || die "no node $1"; }
cmd_kill_slurmd() { load; check_node "$1"; end "slurmd-$1" KILL; }
cmd_crash() { load; check_node "$1"
  if [ "$MODE" = plain ]; then end "slurmd-$1" KILL; note "plain mode: only slurmd was killed, job processes live on"
  else end "$1" KILL; end "$1.unshare" KILL; rm -f "$S/pids/slurmd-$1"; fi; }
cmd_unplug() { load; check_node "$1"; [ "$MODE" = netns ] || die "needs mode netns"; enter login ip link set "v${1#n}" "${2:-down}"; }
cmd_up() { load; check_node "$1"; start_node "${1#n}"
  # a slurmd that registers again brings a DOWN node back (ReturnToService=2); do not wait for it
  wait_for 20 node_usable "$1" || die "$1 did not come back"; }
node_usable() {
  case $(on_login sinfo -h -p debug -n "$1" -o %T) in
    idle|mixed|allocated|completing) return 0;;
    *) on_login scontrol update "nodename=$1" state=resume || true; sleep 0.2; return 1;;
  esac; }
cmd_restart_ctld() { load; end slurmctld TERM 10; start_ctld; }

cmd_stop() {
  local purge=0; [ "${1:-}" = --purge ] && purge=1
  if [ -d "$S/pids" ]; then
    [ -f "$S/settings" ] && load
    local f n
    if pid_of slurmctld >/dev/null; then # end jobs first: in plain mode nothing else would
      on_login timeout 5 scancel --user="$(id -un)" >/dev/null 2>&1 || true
      jobs_gone() { [ -z "$(on_login timeout 5 squeue -h -t R,CG,S 2>/dev/null)" ]; }
      wait_for 8 jobs_gone || true
    fi
    local p   # all slurmd at once, then wait for each; never signal pid 0 (our own process group)
    for f in "$S"/pids/slurmd-*; do if [ -e "$f" ] && p=$(pid_of "${f##*/}"); then kill -TERM "$p" 2>/dev/null || true; fi; done
    for f in "$S"/pids/slurmd-*; do [ -e "$f" ] && end "${f##*/}" TERM 3; done
    end slurmctld TERM 10
    for f in "$S"/pids/n[0-9]* "$S"/pids/login*; do
      [ -e "$f" ] || continue; case $f in *.unshare) continue;; esac; end "${f##*/}" KILL; done
    for f in "$S"/pids/*.unshare; do [ -e "$f" ] && end "${f##*/}" KILL; done
    end munged TERM 3
    rm -f "$S/run/munge.sock" "$S/run/munge.sock.lock"
    note "stopped $S"
  fi
  if [ $purge = 1 ] && [ -f "$S/slurm.conf" ]; then rm -rf "$S"; fi; return 0; }

# ---------------------------------------------------------------- main
[ $# -ge 1 ] || usage
cmd=$1; shift
case $cmd in -h|--help|help) usage 0;; install) cmd_install "$@"; exit;; esac
[ $# -ge 1 ] || usage
S=$(readlink -m "$1"); shift
case $S in *[[:space:]]*) die "the state directory's path may not hold spaces";; esac
[ ${#S} -le 70 ] || die "the state directory's path is too long (unix sockets lie below it): use at most 70 characters"
CLEAN_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; export PATH=$CLEAN_PATH:$PATH
case $cmd in
  start) cmd_start "$@";; env) cmd_env;; status) cmd_status;; exec) cmd_exec "$@";;
  kill-slurmd) cmd_kill_slurmd "$@";; crash) cmd_crash "$@";; up) cmd_up "$@";;
  unplug) cmd_unplug "${1:-}" down;; plug) cmd_unplug "${1:-}" up;;
  restart-ctld) cmd_restart_ctld;; stop) cmd_stop "$@";;
  *) usage;;
esac
