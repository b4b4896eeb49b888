#!/usr/bin/env bash
# Run in the image, as its user: says what it finds, and fails at the first thing that is not as it has to be.
#   docker run --rm -v "$PWD/tests/cluster/image/check.sh:/check.sh:ro" cert-ray:0.1.0-ray2.60.0 bash /check.sh
# "$@" is run at the end: e.g. cert-ray demo --small --output /tmp/demo
set -euo pipefail

# shellcheck source=/dev/null
echo "user $(id -u), $(python --version), $(. /etc/os-release && echo "$PRETTY_NAME")"
test "$(id -u)" != 0
cert-ray --version
cert-ray --help > /dev/null
python - <<'END'
import importlib.metadata
import re
from pathlib import Path

lock = dict(re.findall(r"^([\w.-]+)==([\w.!+-]+)", Path("/opt/cert-ray/requirements.lock").read_text(), re.MULTILINE))
differ = {name: version for name, version in lock.items() if importlib.metadata.version(name) != version}
assert not differ, f"not as the lock has them: {differ}"
print(f"all {len(lock)} packages of the lock")

import ray
import torch

print(f"ray {ray.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}")
END
for folder in ~/.cache/pip /var/lib/apt/lists; do
    test -z "$(ls -A "$folder" 2> /dev/null)" || { echo "left over: $folder"; exit 1; }
done
for folder in ~ /tmp /opt/cert-ray; do
    test -w "$folder" || { echo "cannot be written: $folder"; exit 1; }
    echo "can be written: $folder"
done
ldconfig -p | grep -o 'libseccomp.so.2 .*'
bwrap --ro-bind / / --proc /proc --unshare-all true && echo "bubblewrap starts" || echo "bubblewrap does not start here"
cert-ray doctor || true # it minds the machine, too: memory, disk, the token
"$@"
