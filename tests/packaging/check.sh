#!/usr/bin/env bash
# The sdist carries every source, a wheel built from it carries what runs and nothing else, and that wheel installs,
# imports and computes in an environment that holds nothing but it and its dependencies.
set -euo pipefail
python=$(realpath -s "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --no-isolation --sdist --outdir "$work/dist" . >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log"; exit 1; }
tar -tzf "$work"/dist/*.tar.gz >"$work/sdist.txt"
while read -r file; do
  grep -q "/$file\$" "$work/sdist.txt" || { echo "packaging: the sdist lacks $file"; exit 1; }
done < <(git ls-files csrc kernels fastdis LICENSE README.md CHANGELOG.md)

"$python" -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$work/dist" "$work"/dist/*.tar.gz
"$python" - "$work"/dist/*.whl <<'CHECK'
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
extension = [n for n in names if n.startswith("fastdis/_C.") and n.endswith(".so")]
assert len(extension) == 1, f"packaging: the wheel has {extension or 'no'} extension"
for needed in ("fastdis/py.typed", "fastdis/kernels/style_modulation.py", "fastdis/ops/style_modulation.py"):
    assert needed in names, f"packaging: the wheel lacks {needed}"
strange = [n for n in names if not n.startswith(("fastdis/", "fastdis-"))]
assert not strange, f"packaging: the wheel installs beside fastdis: {strange}"
sources = [n for n in names if n.endswith((".cpp", ".cu", ".h", ".cuh"))]
assert not sources, f"packaging: the wheel carries sources: {sources}"
CHECK

"$python" -m venv "$work/empty"
"$work/empty/bin/python" -m pip install -q "${TORCH:-torch}" "$work"/dist/*.whl
cd "$work"
"$work/empty/bin/python" - <<'CHECK'
import torch

import fastdis

assert fastdis.build_info()["ops"]["style_modulation"]["cpu"]["backend"] == "cpu"
x, scale, shift = torch.randn(2, 4, 8, 8), torch.ones(2, 4), torch.zeros(2, 4)
y = fastdis.style_modulation(x, scale, shift, groups=4)
torch.testing.assert_close(y, torch.nn.functional.instance_norm(x), rtol=1e-4, atol=1e-4)
print("packaging: ok, 1 wheel from the sdist, imported and computing in an empty environment")
CHECK
"$work/empty/bin/fastdis" doctor >"$work/doctor.log" 2>&1 && { echo "packaging: fastdis ran without its cli extra"; exit 1; }
grep -q "fastdis\[cli\]" "$work/doctor.log" || { echo "packaging: the cli does not name its extra:"; cat "$work/doctor.log"; exit 1; }
