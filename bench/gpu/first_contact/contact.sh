# Sourced by the three scripts: where results go, and how they are packed.
#   out      folder of this script's results
#   python   what runs everything
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

# begin NUMBER DIR
begin() {
  out=$2/$1
  mkdir -p "$out"
}

# bounded SECONDS LOG COMMAND...: its output goes to a file, its exit status to the screen
bounded() {
  local seconds=$1 log=$2
  shift 2
  timeout "$seconds" "$@" > "$out/$log.log" 2>&1
  echo "$log: exit status $?"
}

# suite SECONDS NUMBER PARTS...
suite() {
  local seconds=$1 number=$2
  shift 2
  bounded "$seconds" "suite$number" "$python" -m bench.gpu_suite --out "$out" --parts "$@"
}

# packages FOLDER...: their wheels can be imported from here on
packages() {
  local site
  site=$(mktemp -d)
  for folder in "$@"; do
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
      "$folder"/*.whl || echo "the wheels of $folder could not be installed"
  done
  export PYTHONPATH=$site
}

# One file for all: few may be had back from such a machine.
pack() {
  tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")" && rm -rf "$out"
}
