#!/usr/bin/env bash
# Makes the virtual environment .venv, installs what the tests need, and runs them.
#   bash scripts/test.sh            # all tests
#   bash scripts/test.sh -k goldens # pytest's arguments
. "$(dirname "$0")/setup.sh" requirements.txt requirements-extra.txt requirements-dev.txt
ruff check .
# Two processes of one thread each: most tests start programs, which two cores do side by side.
OMP_NUM_THREADS=1 exec python -m pytest -q -n 2 --dist loadfile "$@"
