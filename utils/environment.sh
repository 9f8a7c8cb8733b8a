# Sourced by train.sh and test.sh: sets $python to an interpreter that has what requirements.txt names.
# Uses the current python3 if everything imports there, else a virtual environment in .venv, made on first use.
needed="import huggingface_hub, matplotlib, numpy, safetensors.torch, scipy, torch, torch_radon, tqdm"
python=${PYTHON:-python3}
if ! "$python" -c "$needed" 2>/dev/null; then
  if ! cmp -s requirements.txt .venv/requirements.txt; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "Python 3.11 or newer is needed; $python is $("$python" -V 2>&1)." >&2; exit 1; }
    echo "Installing requirements.txt into .venv (once; PyTorch takes a few minutes)."
    "$python" -m venv .venv || { echo "python3 -m venv failed; on Debian: apt install python3-venv." >&2; exit 1; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit 1
    cp requirements.txt .venv/requirements.txt
  fi
  python=.venv/bin/python
fi
