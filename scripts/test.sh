#!/usr/bin/env bash
# Makes the virtual environment .venv, installs what the tests need, and runs them.
#   bash scripts/test.sh            # all tests
#   bash scripts/test.sh -k goldens # pytest's arguments
. "$(dirname "$0")/setup.sh" requirements.txt requirements-extra.txt requirements-dev.txt
"$python" -m ruff check .
exec "$python" -m pytest -q "$@"
