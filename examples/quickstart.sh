#!/usr/bin/env bash
# Real text to continual pre-training on two CPU cores; called by `make quickstart`. What is already there is reused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=${1:-tiny}
if [[ $model != tiny ]]; then
    echo "error: MODEL=$model is unknown; the quickstart has MODEL=tiny" >&2
    exit 2
fi

run=runs/quickstart
data=$run/data
tokenizer=$run/tokenizer.model
export OMP_NUM_THREADS=1

if [[ ! -f $data/general.valid.jsonl ]]; then # the last of the four files
    python tools/quickstart_data.py --output-dir "$data"
fi

if [[ ! -f $tokenizer ]]; then
    python tools/train_tokenizer.py --input "$data"/{medical,general}.train.jsonl --vocab-size 4096 --output "$tokenizer"
fi

for name in {medical,general}.{train,valid}; do
    prefix=$data/${name/./_}
    if [[ ! -f ${prefix}_text_document.bin ]]; then # what preprocessing writes last
        python tools/preprocess.py --input "$data/$name.jsonl" --json-keys text --output-prefix "$prefix" \
            --tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer" --append-eod --workers 2 --overwrite
    fi
done

torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_base.yaml
torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_cpt.yaml

cat <<WHERE

The lines "validation loss of ..." above say what the two losses did.
  text and tokens     $data
  tokenizer           $tokenizer
  base model          $run/base/checkpoints
  continued model     $run/cpt/checkpoints
  numbers of its run  $run/cpt/metrics.jsonl, or: $(dirname "$(command -v python)")/tensorboard --logdir $run
WHERE
