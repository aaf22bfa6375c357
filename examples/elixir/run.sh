#!/usr/bin/env bash
# Compiles and runs the example, then checks the values that docs/how-to/elixir.md documents.
#
#     VENV=/path/to/venv ./run.sh                                     SnakeBridge and Snakepit from Hex
#     VENV=/path/to/venv ./run.sh /src/snakebridge /src/snakepit      from folders, each named after its package
#
# VENV has Lockstep installed and gets the Python packages of Snakepit's worker. Needs mix of Elixir 1.18, and uv, which
# SnakeBridge compiles with. Packages without a folder, and Hex itself if it is missing, come from the network.
set -euo pipefail
VENV=$(realpath "${VENV:?must name the environment in which Lockstep is installed}")
ELIXIR_SOURCES=$([ $# -eq 0 ] || realpath "$@" | xargs)
cd "$(dirname "$0")"

refuse() {
    echo "examples/elixir: not run: $1" >&2
    exit 1
}
command -v mix >/dev/null || refuse "no mix on this machine (install Elixir 1.18 or newer)"
command -v uv >/dev/null || refuse "no uv on this machine, which SnakeBridge compiles with"

# SNAKEPIT_PYTHON is read when the project is compiled, SNAKEBRIDGE_VENV when it runs.
export ELIXIR_SOURCES SNAKEPIT_PYTHON=$VENV/bin/python SNAKEBRIDGE_VENV=$VENV
mix local.hex --force --if-missing >/dev/null || refuse "mix could not fetch Hex"
mix local.rebar --force --if-missing >/dev/null || refuse "mix could not fetch rebar3"
mix deps.get || refuse "mix could not fetch a dependency"
snakepit=$(printf '%s\n' $ELIXIR_SOURCES deps/snakepit | grep --max-count 1 '/snakepit$')
"$VENV/bin/python" -m pip install --quiet --requirement "$snakepit/priv/python/requirements.txt"

mix run -e LockstepExample.run
mix run -e LockstepExample.DocumentedValues.check
