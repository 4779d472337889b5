# shellcheck shell=bash
# quickstart.sh and test.sh source this file under set -e. It changes to the repository's root and
# defines
#
#   prepare_environment FOLDER EXTRAS
#
# which makes FOLDER a virtual environment with this project and EXTRAS (such as "cpu,demo"), in the
# versions of constraints.txt. It uses the newest supported Python that runs, or $PYTHON. A complete
# and current environment is left unchanged, without network access.

# pip installs below without compiling, so the first import of a module must be able to store its
# bytecode: otherwise each program would compile all that it imports again, for seconds.
unset PYTHONDONTWRITEBYTECODE

fail() {
  printf 'error: ' >&2
  printf '%s\n' "$@" >&2
  exit 1
}

# A path in PYTHON is relative to the user's folder, so it is resolved before the cd.
if [[ -n "${PYTHON:-}" ]]; then
  PYTHON="$(command -v -- "$PYTHON")" || fail "PYTHON does not name a program that can be run"
  [[ "$PYTHON" == /* ]] || PYTHON="$PWD/$PYTHON"
fi
CDPATH="" cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

# Prints "3.x" if $1 is a Python that runs and can make environments. A program on the PATH may be
# unable to: a pyenv shim of a version that is not selected, or a Debian Python without venv.
# Free-threaded builds are excluded: some dependencies have no wheels for them.
python_version() {
  "$1" -c '
import ctypes, ensurepip, ssl, sys, sysconfig, venv
if not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d.%d" % sys.version_info[:2])
' 2> /dev/null < /dev/null
}

find_python() {
  local version candidate
  for version in 3.13 3.12 3.11; do
    while IFS= read -r candidate; do
      if [[ -x "$candidate" && "$(python_version "$candidate")" == "$version" ]]; then
        printf '%s\n' "$candidate"
        return
      fi
    done < <(
      type -aP "python$version" python3 python
      printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python
    )
  done
  return 1
}

install_project() {
  local venv="$1" extras="$2" pip
  # Python compiles the modules that it imports, a small part of all that are installed.
  pip=("$venv/bin/python" -m pip --disable-pip-version-check install --no-compile)
  pip+=(--constraint constraints.txt)
  [[ -t 1 ]] || pip+=(--quiet)
  # Without build isolation, pip builds with the pinned setuptools and does not fetch it each time.
  "${pip[@]}" setuptools && "${pip[@]}" --no-build-isolation --editable ".[$extras]"
}

prepare_environment() {
  local venv="$PWD/$1" extras="$2" stamp contents identity version previous=""
  stamp="$venv/installed.txt"
  contents="$(cat pyproject.toml setup.py constraints.txt | cksum)"

  # The stamp is written last: an environment without one is incomplete and is made anew. So is one
  # made in another folder, for other extras or by another Python.
  identity="$PWD [$extras]"
  if [[ -f "$stamp" ]] && "$venv/bin/python" -c "" 2> /dev/null; then
    previous="$(cat "$stamp")"
    if [[ -n "${PYTHON:-}" ]]; then
      version="import sys; print(sys.base_prefix, sys.version)"
      [[ "$("$PYTHON" -c "$version")" == "$("$venv/bin/python" -c "$version")" ]] || previous=""
    fi
  fi
  if [[ "$previous" == "$identity $contents" ]]; then
    return
  fi

  if [[ "$previous" == "$identity "* ]]; then
    echo "Updating $1 ..."
    rm -- "$stamp"
    if ! install_project "$venv" "$extras"; then
      printf '%s\n' "$previous" > "$stamp" # pip changes nothing until it has all packages
      fail "could not update $venv; pip's message is above."
    fi
  else
    if [[ -z "${PYTHON:-}" ]]; then
      PYTHON="$(find_python)" || fail \
        "found no Python 3.13, 3.12 or 3.11 that runs and has venv and pip." \
        "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name one:" \
        "PYTHON=/path/to/python $0"
    fi
    case "$(python_version "$PYTHON")" in
      3.11 | 3.12 | 3.13) ;;
      *) fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that runs and has venv and pip." ;;
    esac
    echo "Making $1 with $("$PYTHON" --version) ($PYTHON); this takes a minute or more ..."
    "$PYTHON" -m venv --clear "$venv" || fail "could not make a virtual environment in $venv."
    install_project "$venv" "$extras" || fail \
      "could not install into $venv; pip's message is above." \
      "The first run needs the network. Run the same command again to retry."
  fi
  printf '%s\n' "$identity $contents" > "$stamp"
}
