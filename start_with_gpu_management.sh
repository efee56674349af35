#!/usr/bin/env bash
# Runs the app with GPU management on a machine that has nothing but Python, or Docker: `--help` lists the settings.
# This finds a Python and runs the launcher with it (residency/launch), which makes the environment and starts the app.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# Isolated from PYTHONPATH and the caller's folder; -B, since --check writes nothing.
exec "$here/scripts/python" -IBc 'import sys
sys.path.insert(0, sys.argv[1])
from residency.launch.__main__ import main
sys.exit(main(sys.argv[2], sys.argv[3:]))' "$here" "$0" "$@"
