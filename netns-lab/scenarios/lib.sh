# What the scenarios share: `np` is the program, LAB a lab of this script's own, taken down at its end. LAB_OPTIONS go to `lab up`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
LAB=${LAB:-s$$}
np() { "${NODEPLANE:-nodeplane}" "$@"; }
say() { printf '\n== %s\n' "$*"; }
fail() { printf '!! %s\n' "$*" >&2; exit 1; }
up() { np lab up --name "$LAB" ${LAB_OPTIONS:-} "$@"; }
at() { local place=$1; shift; np lab exec --name "$LAB" "$place" -- "$@"; }
change() { np lab "$1" --name "$LAB" -f "${2:--}" && np lab wait --name "$LAB"; }
# ask PLACE URL N: N connections, one line an answer; a failed one is an empty line
ask() { at "$1" sh -c 'for i in $(seq '"$3"'); do curl -s -m 2 "$0" || echo; done' "$2"; }
# field EXPRESSION: of `lab status -o json`, called s
field() { np lab status --name "$LAB" -o json | python3 -c "import json,sys; s = json.load(sys.stdin); print($1)"; }
trap 'np lab down --name "$LAB" 2>/dev/null || true' EXIT
