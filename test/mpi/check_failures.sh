#!/bin/sh
# check_failures.sh PROGRAM REPETITIONS MPIRUN_FLAGS: runs test/mpi/failing_rank under mpirun in every
# way to fail and at every exchange, and checks that each surviving rank exits with code 3 and one
# sentence that names itself, the failed rank and the step, within the deadline. HOWS and PLACES
# narrow what is tried.
set -u
program=$1
repetitions=$2
flags=$3
ranks=4
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Each rank's exit code and words go to files, because mpirun reports only one code.
cat > "$scratch/rank.sh" <<'RANK'
#!/bin/sh
trap : TERM
"$1" "$2" "$3" 2> "$4/words.$OMPI_COMM_WORLD_RANK"
echo $? > "$4/code.$OMPI_COMM_WORLD_RANK"
RANK
chmod +x "$scratch/rank.sh"

failures=0
complain() {
  echo "FAILED: $how in $where, repetition $repetition: $1"
  failures=$((failures + 1))
}

check() {
  how=$1 where=$2 step=$3
  rm -f "$scratch"/code.* "$scratch"/words.*
  ZIGZAG_TIMEOUT_S=2 timeout 60 mpirun --allow-run-as-root --oversubscribe $flags -n $ranks \
    "$scratch/rank.sh" "$program" "$how" "$where" "$scratch" > "$scratch/mpirun" 2>&1
  [ $? -ne 124 ] || complain "still running after 60 s"
  for rank in 0 1 2; do
    code=$(cat "$scratch/code.$rank" 2> /dev/null)
    # Open MPI's own lines about the dead peer begin with the host in brackets.
    words=$(grep -v '^\[' "$scratch/words.$rank" 2> /dev/null)
    [ "$code" = 3 ] || complain "rank $rank exited with '$code': $words"
    case $words in
      "rank $rank "*"$step"*"rank 3"* | "rank $rank "*"rank 3"*"$step"*) ;;
      *) complain "rank $rank said '$words'" ;;
    esac
  done
}

check_place() {
  case $2 in
    gather) check "$1" gather "gather of K and V, stage" ;;
    reduce) check "$1" reduce "reduction of dK and dV, stage" ;;
    barrier) check "$1" barrier "barrier" ;;
    all_gather) check "$1" all_gather "the exchange of a few bytes" ;;
    forward | backward) check "$1" "$2" "gather of K and V, stage" ;;
    reduction) check "$1" reduction "reduction of dK and dV, stage" ;;
  esac
  jobs=$((jobs + 1))
}

jobs=0
for repetition in $(seq "$repetitions"); do
  for place in ${PLACES:-gather reduce barrier all_gather forward backward reduction}; do
    for how in ${HOWS:-kill throw silent}; do
      check_place "$how" "$place"
    done
  done
done
echo "$jobs jobs, $failures failures; the last words: $(cat "$scratch/words.0")"
[ $failures -eq 0 ]
