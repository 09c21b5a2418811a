# Sourced by demo.sh and test.sh with the requirements files they need: goes to the repo's root,
# makes the virtual environment .venv once, keeps it up to date, and activates it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: Python 3.10 or newer is needed; name one: PYTHON=python3.12 bash …" >&2
  exit 2
}
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
# pip is asked again only when one of the files has changed.
stamp="$(cat "$@" requirements-lock.txt | cksum)"
if [ "$(cat ".venv/installed-$#" 2>/dev/null)" != "$stamp" ]; then
  # The lock's versions, which the tests ran with; some of them need Python 3.11.
  lock="$(python -c 'import sys; print("-c requirements-lock.txt" * (sys.version_info >= (3, 11)))')"
  python -m pip install --quiet --disable-pip-version-check $lock $(printf -- '-r %s ' "$@")
  echo "$stamp" >".venv/installed-$#"
fi
