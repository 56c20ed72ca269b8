#!/usr/bin/env bash
# All that one GPU of 139 GiB is measured by, in 25 minutes on 16 cores: parts of measure.sh and the
# tests that fit beside each other, then the speeds, alone:
#
#   SMOLLM2=FOLDER docs/results/one_card.sh OUT
#
# What each has said is in OUT/NAME.out, when it began and ended in OUT/times; the exit code is 1 if
# any failed. What is done is not done again where it is called again with the same OUT. FOLDER may
# come while it runs: what needs it waits for its config.json.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/.venv/bin/python
if (($# != 1)) || [[ -z ${SMOLLM2:-} ]]; then
    echo "usage: SMOLLM2=FOLDER docs/results/one_card.sh OUT; samebit fetch-smollm2 makes it" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
running=()

one() { # NAME COMMAND...
    local name=$1 began=$SECONDS code=0
    shift
    [[ ! -e $out/$name.done ]] || return 0
    "$@" >"$out/$name.out" 2>&1 || code=$?
    echo "$name: exit code $code, from $began to $SECONDS s" >>"$out/times"
    ((code)) || touch "$out/$name.done"
    return $code
}

beside() { # NAME COMMAND...: while the others run
    one "$@" &
    running+=($!)
}

ended() { # all that run
    local each
    for each in "${running[@]}"; do wait "$each" || failed=1; done
    running=()
}

part() { "$root/docs/results/measure.sh" "$out" "$@"; }

tests() { # WORD...
    (cd "$root" && PYTHONSAFEPATH=1 "$python" -m pytest -q -m gpu --timeout-method thread "$@")
}

parts_of_8b() { # one behind another; the last one's trainer takes 100 GiB
    one verify_8b_parts part verify_8b_parts && one verify_8b part verify_8b
}

with_smollm2() { # PART
    until [[ -e $SMOLLM2/config.json ]]; do sleep 1; done
    part "$1"
}

whole_card=(tests/rollout/test_gpu_engine_memory.py tests/trainer/test_gpu_trainer_memory.py)
whole_card+=(tests/kernels/test_gpu_memory.py)
others=("${whole_card[@]/#/--deselect=}")
others+=($(cd "$root" && grep -rlE 'mark\.gpu' tests --include='test_*.py'))
failed=0

parts_of_8b & running+=($!)
beside verify_0.6b part verify_0.6b
beside verify_smollm2 with_smollm2 verify_smollm2
beside tests tests -n 5 --dist loadfile "${others[@]}"
ended
beside algorithms with_smollm2 algorithms
beside sanitize make -C "$root" sanitize SANITIZER_JOBS=8
ended
one whole_card tests -p no:xdist "${whole_card[@]}" || failed=1
for each in engine tables kernels groups; do one "$each" part "$each" || failed=1; done
exit $failed
