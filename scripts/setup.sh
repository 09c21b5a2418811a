# Sourced by demo.sh and test.sh: go to the repo's root, make .venv once and keep it up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $("$python" --version) is too old: Python 3.10 or newer is needed (set PYTHON=…)" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# pip is asked again only when a requirements file has changed.
stamp="$(cat "$@" | cksum)"
if [ "$(cat .venv/installed-"$#" 2>/dev/null)" != "$stamp" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@")
  echo "$stamp" >.venv/installed-"$#"
fi
python=.venv/bin/python
