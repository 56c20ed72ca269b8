#!/usr/bin/env bash
# Measure anew, on this machine's GPUs, most of what this folder holds. A report of each part goes
# to OUT:
#
#   docs/results/measure.sh OUT PART...
#
# Parts: verify (SMOLLM2=FOLDER adds that model; each has to find what another run found; alone
# verify_8b, verify_8b_parts, verify_0.6b and verify_smollm2), engine, groups, tables, speculative
# (SMOLLM2 too), kernels, trainer, memory, sync (on two GPUs also between them), step (of colocated
# GRPO), kills (a short demo on SmolLM2, killed 20 times), controller (what its own work costs, and
# what moving requests saves, without a GPU), draft_trainer (of drafts of the 8B shape), verify_rows
# (what a step takes that verifies guesses); of SMOLLM2 alone algorithms, long_tail (rollouts of
# very different lengths, with guesses and without), and drafts: draft_7 and draft_1 (trained by so
# many passes), draft_boards, online_draft, and behind draft_7 block_draft, speculative_draft and
# adaptive_draft (DRAFT=draft_boards: of that one; where the training of a draft was cut, its part
# goes on with it); on two GPUs tensor_parallel, trainer_tp, elastic, transfers, async (GRPO whose
# engine draws while its trainer trains; SMOLLM2 too); on four transfers4, layouts (short runs under
# all that fit), tp1_tp4; on eight eight_tp, eight_steps, eight_elastic, eight_transfers, eight_sums
# (which take any number of GPUs from two on: EIGHT=2).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=$root/.venv/bin
shapes=$root/recipes/bench/shapes
unset PYTHONSAFEPATH # programs import one another
parts=" verify verify_8b verify_8b_parts verify_0.6b verify_smollm2 engine groups tables"
parts+=" speculative kernels trainer memory sync step kills algorithms draft_7 draft_1"
parts+=" draft_boards speculative_draft adaptive_draft block_draft online_draft draft_trainer"
parts+=" verify_rows long_tail tensor_parallel trainer_tp elastic transfers async controller"
parts+=" transfers4 layouts tp1_tp4 eight_tp eight_steps eight_elastic eight_transfers"
parts+=" eight_sums "
for part in "${@:2}"; do
    if [[ $parts != *" $part "* ]]; then
        echo "'$part' is no part; there are:$parts" >&2
        exit 2
    fi
done
(($# >= 2)) || { echo "usage: docs/results/measure.sh OUT PART...; parts:$parts" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift

samebit() { # NAME COMMAND... -> OUT/NAME
    local name=$1
    shift
    "$bin/samebit" "$@" output_dir="$out" run_name="$name" >"$out/$name.log" 2>&1 || {
        tail -n 20 "$out/$name.log" >&2
        return 1
    }
    tail -n 30 "$out/$name.log"
}

program() { # PROCESSES NAME ARGUMENT...
    "$bin/python" -m torch.distributed.run --standalone --nproc-per-node "$1" \
        "$root/tests/programs/$2.py" "${@:3}"
}

needs_gpus() { # COUNT
    "$bin/python" - "$1" <<'EOF'
import sys, torch
there, needed = torch.cuda.device_count(), int(sys.argv[1])
sys.exit(f"this part needs {needed} GPUs; there are {there}" if there < needed else 0)
EOF
}

same_draws() { # A.json B.json: of one outcomes_digest
    "$bin/python" - "$@" <<'EOF'
import json, sys
one, other = (json.load(open(path))["outcomes_digest"] for path in sys.argv[1:])
print(*sys.argv[1:], one, other)
sys.exit(one != other)
EOF
}

verify() { # every property, of the 8B shape all but transports, so many as one card has room for
    verify_8b
    verify_8b_parts
    verify_0.6b
    if [[ -n ${SMOLLM2:-} ]]; then verify_smollm2; fi
}

verify_8b() {
    verified_8b qwen3_8b batch_size,batch_position,decode_batch,prefill_chunk,prefix_cache,group,\
neighbour_abort,concurrent_callers,restart,graphs_and_overlap,score,trainer
}

verify_8b_parts() { # which leave room for other work on the card
    verified_8b speculation_qwen3_8b shared_prefixes,speculation
    verified_8b weights_qwen3_8b memory_release,pauses
    verified_8b pages_qwen3_8b weight_update,page_size,preemption
}

verify_0.6b() { verified qwen3_0.6b model="$shapes/qwen3-0.6b" load_format=dummy; }

verify_smollm2() {
    needs_smollm2
    verified smollm2 model="$SMOLLM2"
}

verified_8b() { # NAME PROPERTIES
    verified "$1" model="$shapes/qwen3-8b" load_format=dummy "properties=[$2]"
}

verified() { # NAME ARGUMENT...: samebit verify, to the digest of the committed file
    samebit "verify_$1" verify "${@:2}"
    same_draws "$out/verify_$1/verify.json" "$root/docs/results/h200_verify_$1.json"
}

engine() {
    samebit engine_qwen3_8b bench engine model="$shapes/qwen3-8b" load_format=dummy --profile \
        --cold "workloads=[64x1x512x256,1x1x512x256,8x1x512x256,64x8x512x512,64x8x700x512,\
64x8x704x512,16x16x8192x512,32x1x8192x1]"
    samebit engine_qwen3_0.6b bench engine model="$shapes/qwen3-0.6b" load_format=dummy \
        'workloads=[1x1x512x512,64x8x512x512]'
}

groups() { # a prefix that samples share, read by each and read once
    samebit groups_qwen3_8b bench engine model="$shapes/qwen3-8b" load_format=dummy repeats=2 \
        'variants=[default,no_groups]' 'workloads=[16x16x8192x512]'
    samebit groups_kernels_qwen3_8b bench kernels model="$shapes/qwen3-8b" 'tables=[shared]'
}

tables() { # a card whose products nobody has tuned
    samebit tables_qwen3_8b bench engine model="$shapes/qwen3-8b" load_format=dummy \
        'variants=[default,no_table]' \
        'workloads=[1x1x512x256,8x1x512x256,64x1x512x256,64x8x512x512]'
}

speculative() { # guesses: at a simulated acceptance, and by SmolLM2's own texts
    samebit speculative_qwen3_8b bench speculative model="$shapes/qwen3-8b" load_format=dummy \
        'proposers=[simulated]' 'batches=[1,16]'
    if [[ -n ${SMOLLM2:-} ]]; then
        samebit speculative_smollm2 bench speculative model="$SMOLLM2" 'proposers=[suffix]' \
            data.task=reasoning_gym/chain_sum data.chat=true input_len=256
    fi
}

kernels() { samebit kernels_qwen3_8b bench kernels model="$shapes/qwen3-8b"; }

trainer() { samebit trainer_qwen3_4b bench trainer model="$shapes/qwen3-4b"; }

memory() { samebit memory_qwen3_8b bench memory model="$shapes/qwen3-8b" load_format=dummy; }

sync() { samebit sync_qwen3_8b bench sync model="$shapes/qwen3-8b" load_format=dummy; }

step() { "$bin/python" "$root/tests/programs/colocated_step.py" "$out/step.json"; }

async() {
    needs_gpus 2
    "$bin/python" "$root/tests/programs/async_step.py" "$out/async_step.json"
    if [[ -n ${SMOLLM2:-} ]]; then
        "$bin/python" "$root/tests/programs/async_step.py" "$out/async_step_smollm2.json" \
            model="$SMOLLM2"
    fi
}

transfer() { # PROCESSES NAME OPTION...: weights from one layout to another
    program "$1" weight_transfers "$shapes/qwen3-8b" "$out/transfer_$2.json" "${@:3}"
}

transfers() {
    needs_gpus 2
    transfer 2 tp1_tp1 trainer=1x1 engine=1 at=1
    transfer 2 tp1_tp1_delta trainer=1x1 engine=1 at=1 delta=1
    transfer 2 tp2_tp1 trainer=2x1 engine=1 at=0
    transfer 2 tp1_tp2 trainer=1x1 engine=2 at=0
    transfer 2 pp2_tp1 trainer=1x2 engine=1 at=1
}

transfers4() {
    needs_gpus 4
    transfer 4 tp2pp2_tp2 trainer=2x2 engine=2 at=0
    transfer 4 tp2pp2_2xtp1 trainer=2x2 engine=1 engines=2 at=0
    transfer 4 tp2_apart_tp2 trainer=2x1 engine=2 at=2
}

kills() {
    "$bin/python" "$root/tests/programs/kill_demo.py" "$out/demo_kills.json" kills=20 seed=7 \
        demo=smollm2 grpo.trainer.num_steps=20 grpo.trainer.checkpoint_every=1
}

controller() {
    "$bin/python" "$root/tests/programs/controller.py" "$out/controller.json"
    "$bin/python" "$root/tests/programs/moving.py" "$out/moving_samples.json"
}

needs_smollm2() { : "${SMOLLM2:?is the folder of the model, which this part needs}"; }

algorithms() { # SmolLM2 learns to add, by four of them at the same time
    needs_smollm2
    local name runs=() own=(experiment=smollm2_chain_sum model.path="$SMOLLM2" logger=disabled)
    own+=(trainer.num_steps=130 overwrite=true engine.kv_cache_tokens=200000)
    for name in grpo dapo gspo ppo; do
        local more=()
        if [[ $name == ppo ]]; then
            more=(critic.warmup_steps=5 critic.optimizer.lr=1e-4 trainer.batch_size=256)
        fi
        samebit "$name" grpo algorithm="$name" "${own[@]}" "${more[@]}" & runs+=($!)
    done
    for name in "${runs[@]}"; do wait "$name"; done
    "$bin/samebit" report "$out"/{grpo,dapo,gspo,ppo} out="$out/algorithms.html"
}

figures() { "$bin/python" "$root/tests/programs/draft_figures.py" "$@"; }

held_out() { # RUN of eagle3: sets `words`, by which bench speculative asks its held-out prompts
    local text
    text=$(figures words "$out/$1")
    mapfile -t words <<<"$text"
    words+=(model="$SMOLLM2")
}

train_draft() { # NAME ARGUMENT...: SmolLM2's, from its own answers; what was cut goes on
    samebit "$1" eagle3 model.path="$SMOLLM2" logger=disabled resume=true "${@:2}"
}

draft_7() { # by seven passes
    needs_smollm2
    train_draft draft_7 experiment=smollm2_draft ttt.passes=7
    figures trained "$out/draft_7"
}

draft_1() { # by one, evaluated by as many guesses
    needs_smollm2
    train_draft draft_1 experiment=smollm2_draft ttt.passes=1
    figures trained "$out"/draft_{7,1}
}

draft_boards() { # of texts that a draft has more to say about
    needs_smollm2
    train_draft draft_boards experiment=smollm2_draft_boards
    figures trained "$out/draft_boards"
}

draft=${DRAFT:-draft_7} # which guesses in the next two parts

speculative_draft() { # 5 guesses each, at 1 sample and at 8; no prompt comes twice
    needs_smollm2
    local words
    held_out "$draft"
    words+=('proposers=[eagle3,suffix,hybrid]' draft_model="$out/$draft/draft")
    samebit "speculative_$draft" bench speculative "${words[@]}" adaptive_drafts=false \
        num_draft_tokens=5 'batches=[1,8]' repeats=25 data.eval_size=1024
}

adaptive_draft() { # as many guesses as pay, at every number of samples
    needs_smollm2
    local words
    held_out "$draft"
    words+=('proposers=[eagle3,suffix,hybrid]' draft_model="$out/$draft/draft")
    samebit "adaptive_$draft" bench speculative "${words[@]}" \
        'batches=[1,2,4,8,16,32,64,128,256]' data.eval_size=8192 # no prompt comes twice
}

block_draft() { # beside draft_7, with CUDA graphs and without; a block's pass cannot run in one
    needs_smollm2
    local words
    held_out draft_7
    train_draft draft_block experiment=smollm2_draft ttt.passes=7 draft.dialect=speculators \
        draft.mask_token_id=4 # <reponame>
    figures trained "$out"/draft_{7,block}
    words+=(draft_model="$out/draft_7/draft" adaptive_drafts=false num_draft_tokens=5)
    words+=('batches=[1]' repeats=25)
    samebit chain_in_graphs bench speculative "${words[@]}" 'proposers=[eagle3,simulated]'
    samebit block_draft bench speculative "${words[@]}" engine.cuda_graphs=false \
        'proposers=[eagle3,peagle,simulated]' block_draft_model="$out/draft_block/draft"
    figures block "$out"/{chain_in_graphs,block_draft}
}

verify_rows() { # 64 in all: what a step of them takes, beside a decode step of as many samples
    local batch
    for batch in 8 16 32; do
        samebit "verify_rows_$batch" bench speculative model="$shapes/qwen3-8b" load_format=dummy \
            'proposers=[simulated]' simulated_acceptance=0 adaptive_drafts=false \
            num_draft_tokens=$((64 / batch - 1)) "batches=[$batch]" input_len=16 output_len=1008
    done
    figures rows "$out"/verify_rows_{8,16,32}
}

online_draft() { # a draft of sums, which then learns in GRPO, stays as it is, or is not there
    needs_smollm2
    local sums='{name: chain_sum, weight: 1.0, config: {min_terms: 2, max_terms: 3,'
    sums+=' min_digits: 2, max_digits: 4}}'
    train_draft draft_of_sums experiment=smollm2_draft ttt.passes=5 data.args.datasets="[$sums]" \
        trainer.num_steps=100 trainer.checkpoint_every=25
    local own=(experiment=smollm2_online_draft model.path="$SMOLLM2" logger=disabled resume=true)
    own+=(trainer.num_steps=60 trainer.checkpoint_every=10 engine.max_num_seqs=64)
    local off=(draft.train=off draft.optimizer.lr=1e-4 draft.optimizer.lr_warmup_steps=0)
    local given=(engine.speculative=eagle3 engine.draft_model="$out/draft_of_sums/draft")
    given+=(engine.adaptive_drafts=false engine.num_draft_tokens=5)
    samebit online_draft grpo "${own[@]}" "${given[@]}"
    samebit frozen_draft grpo "${own[@]}" "${given[@]}" "${off[@]}" ttt.passes=7
    samebit no_draft grpo "${own[@]}" engine.speculative=none "${off[@]}" ttt.passes=7
    figures online "$out"/{online,frozen,no}_draft
}

draft_trainer() { samebit draft_qwen3_8b bench draft model="$shapes/qwen3-8b"; }

long_tail() { # GRPO's rollouts, as long as they come: by siblings' and earlier texts, and without
    needs_smollm2
    local kind own=(experiment=smollm2_chain_sum model.path="$SMOLLM2" logger=disabled)
    own+=(overwrite=true rollout.samples_per_prompt=16 rollout.max_new_tokens=1024)
    own+=(rollout.temperature=1.0 trainer.num_steps=6 engine.max_num_seqs=512)
    for kind in none suffix; do
        samebit "long_tail_$kind" grpo "${own[@]}" engine.speculative=$kind
    done
    "$bin/python" - "$out"/long_tail_{none,suffix} <<'EOF'
import json, statistics, sys
seconds, digests = [], []
for folder in sys.argv[1:]:
    rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    seconds.append(statistics.median(r["perf/rollout_s"] for r in rows if "perf/rollout_s" in r))
    digests.append(json.load(open(f"{folder}/summary.json"))["weights_digest"])
print(f"rollout: {seconds[0]:.2f} s without guesses, {seconds[1]:.2f} with them; digests", *digests)
sys.exit(len(set(digests)) > 1)
EOF
}

tensor_parallel() { # drawn and computed again; tp_invariant: one GPU draws what two draw
    needs_gpus 2
    local model=$shapes/qwen3-8b
    program 2 tensor_parallel "$model" "$out/tp2.json" dummy=true
    program 2 tensor_parallel "$model" "$out/tp2_eager.json" dummy=true cuda_graphs=false
    program 2 tensor_parallel "$model" "$out/tp2_invariant.json" dummy=true tp_invariant=true
    program 1 tensor_parallel "$model" "$out/tp1_invariant.json" dummy=true tp_invariant=true
    same_draws "$out"/tp{1,2}_invariant.json
}

trainer_tp() { # what tp_invariant costs
    needs_gpus 2
    local layout=(parallel.tensor=2 parallel.sequence=true compare=false 'packs=[8x1024]')
    samebit trainer_tp2 bench trainer model="$shapes/qwen3-8b" "${layout[@]}"
    samebit trainer_tp2_invariant bench trainer model="$shapes/qwen3-8b" "${layout[@]}" \
        tp_invariant=true
}

elastic() { # what gradient segments cost, and that one GPU's weights are two's
    needs_gpus 2
    "$bin/python" "$root/tests/programs/elastic.py" "$out/elastic.json"
}

layouts() { # of the trainer, each on as many GPUs as it needs
    needs_gpus 4
    "$bin/python" "$root/tests/programs/layouts.py" "$out/layouts.json"
}

tp1_tp4() { # tp_invariant: one GPU draws what four draw
    needs_gpus 4
    local size
    for size in 1 4; do
        program $size tensor_parallel "$shapes/qwen3-8b" "$out/tp1_tp4_$size.json" dummy=true \
            tp_invariant=true
    done
    same_draws "$out"/tp1_tp4_{1,4}.json
}

eight=${EIGHT:-8} # GPUs of the parts for a whole machine

eight_tp() { # tp_invariant: all GPUs draw what half of them draw; and without it
    needs_gpus "$eight"
    local size model=$shapes/qwen3-8b
    for size in "$eight" $((eight / 2)); do
        program "$size" tensor_parallel "$model" "$out/eight_tp${size}_invariant.json" dummy=true \
            tp_invariant=true
    done
    same_draws "$out"/eight_tp{"$eight",$((eight / 2))}_invariant.json
    program "$eight" tensor_parallel "$model" "$out/eight_tp$eight.json" dummy=true
}

eight_steps() { # of colocated GRPO under two layouts
    needs_gpus "$eight"
    local half=$((eight / 2))
    "$bin/python" "$root/tests/programs/layout_steps.py" "$out/eight_steps.json" \
        layouts="tensor:2+data:$half,tensor:$half+pipeline:2"
}

eight_elastic() { # gradient segments: the weights of all copies and of half of them
    needs_gpus "$eight"
    "$bin/python" "$root/tests/programs/elastic.py" "$out/eight_elastic.json" \
        copies=$((eight / 2)),"$eight" segments="$eight"
}

eight_transfers() { # one trainer to engines on all other GPUs; half of them to the other half
    needs_gpus "$eight"
    local half=$((eight / 2))
    transfer "$eight" eight_tp1_tp1s trainer=1x1 engine=1 engines=$((eight - 1)) at=1
    transfer "$eight" eight_tp_tp1s trainer=${half}x1 engine=1 engines=$half at=$half
}

eight_sums() { # by peer reads against NCCL
    needs_gpus "$eight"
    program "$eight" peer_sums "$out/eight_sums.json"
}

for part; do
    echo "== $part"
    time "$part"
done
