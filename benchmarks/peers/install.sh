#!/bin/sh
# Build one peer's environment: install.sh NAME FOLDER PYTHON TORCH
#
# A build that fails leaves its reason in FOLDER/failed.txt and exits 0: the comparison goes on and
# reports the peer as not installed.  FOLDER/install.log holds everything pip said.
name=$1 folder=$2 python=$3 torch=$4
here=$(dirname "$0")
rm -rf "$folder" && mkdir -p "$folder"
log=$folder/install.log

fail() {
    echo "peer $name: not installed ($1; see $log)" >&2
    { echo "$1"; grep -iE 'error|no matching|could not' "$log" | tail -n 3; } > "$folder/failed.txt"
    exit 0
}
pip() { "$folder/bin/python" -m pip "$@" >> "$log" 2>&1; }

echo "peer $name: installing into $folder"
"$python" -m venv "$folder" >> "$log" 2>&1 || fail "no virtual environment from $python"
if [ "$name" != llamacpp ] && [ "$name" != clients ]; then  # these two need no torch
    # torch comes first, so that nothing pulls in a CUDA build
    # shellcheck disable=SC2086  # TORCH may carry an --index-url
    pip install -q $torch || fail "$torch cannot be installed"
fi
if [ "$name" = llamacpp ]; then
    export CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON}"
fi
pip install -q -c "$here/requirements/constraints.txt" -r "$here/requirements/$name.txt" ||
    fail "$(tr '\n' ' ' < "$here/requirements/$name.txt")cannot be installed"
pip uninstall -q -y torchvision torchaudio torchcodec  # builds that do not import beside CPU torch
"$folder/bin/python" -m pip freeze > "$folder/versions.txt"
echo "peer $name: installed"
