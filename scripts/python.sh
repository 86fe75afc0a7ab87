# Sourced: how the scripts find an interpreter. A shim that is there may lead nowhere.

# Print the path of Python $1, such as 3.13, or fail.
interpreter() {
  local found
  for found in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if "$found" -c "import sys; assert '%d.%d' % sys.version_info[:2] == '$1'" 2>/dev/null; then
      "$found" -c "import sys; print(sys.executable)"
      return
    fi
  done
  return 1
}
