# Sourced by the other scripts: go to the repository's root and make the virtual environment .venv.
#   [requirements=FILE] source scripts/setup.sh
# An environment whose requirements have not changed is used as it is. PYTHON names another interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${requirements:-requirements.txt}
stamp=".venv/.$(basename "$requirements").$(cat requirements*.txt | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
    "${PYTHON:-python3}" -m venv .venv
    echo "Installing $requirements into .venv (some minutes, once)"
    .venv/bin/python -m pip install --quiet --requirement "$requirements"
    touch "$stamp"
fi
python=$PWD/.venv/bin/python
