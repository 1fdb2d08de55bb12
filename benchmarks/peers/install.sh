#!/bin/sh
# Makes one virtual environment per peer: benchmarks/peers/install.sh [FOLDER] [PEER ...]   (default: runs/peers, all of them)
set -eu
here=$(dirname "$0")
folder=${1:-runs/peers}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- litserve mlserver bentoml ray pytriton
for peer in "$@"; do
  ${PYTHON:-python3} -m venv "$folder/$peer"
  "$folder/$peer/bin/python" -m pip install --disable-pip-version-check -q -r "$here/with_$peer.txt"
  echo "$peer: $folder/$peer"
done
