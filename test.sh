#!/usr/bin/env bash
# Environment and tests: ./test.sh [pytest arguments]. --slow adds the tests that take minutes, --upstream those of this
# repository's own documents, records and golden figures, which a fork may break.
set -euo pipefail
cd "$(dirname "$0")"
python=$(./run.sh env requirements-dev.txt)
"$python" -m ruff check .
exec "$python" -m pytest -n 2 --dist loadscope "$@"     # two processes, each with a module at a time
