#!/usr/bin/env bash
# Everything, into results/, which is yours: environment, data, missing runs, tables, figures, the reference beside them.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: bash run_all.sh [--preset P] [--tasks A,B] [--attentions A,B] [--seeds N] [--data-dir DIR] [SWEEP OPTIONS]

  --preset P      smoke: every cell runs, minutes (default on a CPU); small: real learning on a CPU;
                  paper: LRA's lengths (default on a GPU); paper-large: its encoders of 3 to 6 layers, too
  --attentions A,B  default: softmax,constant,performer,linformer,darkformer; all: every one of `list attentions`
  --tasks A,B     default: LRA's five; all: recall, too   --seeds N  seeds 0..N-1 of each cell (default: 1; small: 3)
  --results DIR   folder of records and tables (default: results, which git ignores)
  --data-dir DIR  raw data, a folder or archive, in place of what the packages embed; prepared under data/local
  anything else goes to `python -m lra sweep`, see its --help
TEXT
}

preset="" seeds="" data=data results=results gemma=yes extra=() status=0
tasks=listops,text,retrieval,image,pathfinder attentions=softmax,constant,performer,linformer,darkformer
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --preset | --seeds | --data-dir | --results | --tasks | --attentions)
      [[ $# -ge 2 ]] || { echo "error: $1 needs a value" >&2; exit 2; }
      case $1 in
        --preset) preset=$2 ;; --seeds) seeds=$2 ;;
        --results) results=$2 ;;
        --attentions) attentions=$2 gemma="" ;;
        --tasks) tasks=$2 gemma="" ;;
        --data-dir) data=data/local; extra+=(--data-dir "$2") ;;
      esac
      shift 2 ;;
    *) extra+=("$1"); shift ;;
  esac
done

source lra/environment.sh                                       # 1-3 minutes the first time
[[ -n $preset ]] || preset=$("$PY" -m lra.machine)              # smoke on a CPU, paper on a GPU
[[ -n $seeds ]] || seeds=$([[ $preset == small ]] && echo 3 || echo 1)

# The sweep predicts its time and memory before it starts; `python -m lra cost` with its options says the same alone.
"$PY" -m lra sweep --preset "$preset" --tasks "$tasks" --attentions "$attentions" --seeds "$seeds" --data "$data" \
  --results "$results" ${extra[@]+"${extra[@]}"} || status=$?
case $status in 0 | 1 | 75) ;; *) exit $status ;; esac           # 1: the table shows what failed; 75: another runs the rest
"$PY" -m lra table --results "$results" --format long --write "$results/TABLE.md" || status=$?  # 1: it names a file it left out
"$PY" -m lra leaderboard build --results "$results" || status=$?
if [[ -n $gemma ]]; then  # left out where --tasks or --attentions ask for a part; a tiny model in smoke, else 270M (253 MB)
  base=(--model gemma-3-270m --precision bf16)
  [[ $preset != smoke ]] || base=(--model tiny)
  base+=(--results "$results" --attention softmax --attention constant --attention local,window=64,sinks=1 --attention performer
         --attention performer,align=balance --attention darkformer,align=balance,init=aligned,target_norm=4)
  for action in swap finetune; do "$PY" -m lra gemma $action "${base[@]}" || status=$?; done
  "$PY" -m lra gemma table --results "$results" && "$PY" -m lra gemma plot --results "$results" || status=$?
fi
echo "all tables: $results/TABLE.md; figures: $results/index.html; learning curves: $PY -m lra tensorboard --start"
"$PY" -m lra table --results "$results" --preset "$preset" || status=$?
"$PY" -m lra compare --results "$results" --preset "$preset" || status=$?
exit $status
