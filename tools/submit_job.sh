#!/usr/bin/env bash
# One experiment on a machine of a cluster; tools/submit.py hands it to sbatch:
#   submit_job.sh PROJECT FOLDER GIT_REMOTE_URL COMMIT NAME PARAMETER=VALUE...
# The clone in FOLDER outlives a job that is killed. Requeued, the job goes on there from the last save.
set -euo pipefail
project=$1 folder=$2 url=$3 commit=$4 name=$5
shift 5

if [ ! -d "$folder" ]; then
  rm -rf "$folder.unfinished"
  git clone --quiet "$url" "$folder.unfinished"
  git -C "$folder.unfinished" checkout --quiet --detach "$commit"
  mv "$folder.unfinished" "$folder"
fi
cd "$folder"
# credentials of the DVC remote, which Git does not have
if [ -f "$project/.dvc/config.local" ]; then cp "$project/.dvc/config.local" .dvc/; fi
# the submitting checkout's packages where this machine sees them, else an environment of its own
if [ -x "$project/.venv/bin/python" ] && [ ! -e .venv ]; then ln -s "$project/.venv" .venv; fi
make setup
export PATH=$PWD/.venv/bin:$PATH
unset DVC_ROOT
python -m tools.repair_dvc # what a killed DVC has left

if ! git for-each-ref --format='%(refname)' refs/exps | grep -q "/$name\$"; then
  settings=()
  for setting in "$@"; do settings+=(-S "$setting"); done
  dvc exp run --pull --name "$name" "${settings[@]}"
fi
dvc exp push origin "$name"
cd /
rm -rf "$folder"
