# Sourced by run_all.sh and run_tests.sh: sets PY to a Python that has requirements.txt, installing it if missing.
# VENV names the virtual environment (default .venv), PYTHON the interpreter that creates it (3.11 or newer).
VENV=${VENV:-.venv}
PY=$VENV/bin/python
if ! cmp -s requirements.txt "$VENV/installed.txt"; then
  echo "installing requirements.txt into $VENV (1-3 minutes)"
  "${PYTHON:-python3}" -m venv "$VENV"
  # Python compiles what it imports; compiling all that PyTorch has would take a minute.
  "$PY" -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
  cp requirements.txt "$VENV/installed.txt"
fi
