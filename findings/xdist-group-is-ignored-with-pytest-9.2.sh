#!/usr/bin/env bash
# pytest-xdist 3.8.0 with pytest 9.2.0: `--dist loadgroup` runs tests of one xdist_group in several processes.
#
# Documented: tests marked `xdist_group(name)` run in the same process under `--dist loadgroup`. xdist writes the
# group into the private attribute `_nodeid` of each test; pytest 9.2 makes node ids from another attribute, so the
# group is lost without a warning. With pytest 9.0.2 it is kept. Whoever shares an expensive fixture by a group makes
# it once per process; whoever keeps tests apart by a group runs them at the same time.
# Instead: --dist loadfile, with what belongs together in one file.
#
# Seen: "pytest 9.0.2: 1 process, pytest 9.2.0: 2 processes". Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_group.py" <<'PYTHON'
import os, time
import pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(8))
def test_says_its_process(number, tmp_path_factory):
    time.sleep(0.2)
    root = tmp_path_factory.getbasetemp().parent
    (root / f"process-{os.getpid()}").touch()
PYTHON
seen=
for version in 9.0.2 9.2.0; do
    python3 -m venv "$folder/venv-$version"
    "$folder/venv-$version/bin/pip" install --quiet --disable-pip-version-check "pytest==$version" "pytest-xdist==3.8.0"
    (cd "$folder" && "venv-$version/bin/python" -m pytest -q -n 2 --dist loadgroup --basetemp "run-$version" test_group.py)
    count=$(find "$folder/run-$version" -name 'process-*' | wc -l)
    seen="$seen pytest $version: $count"
done
echo "processes of one group:$seen"
[ "$seen" = " pytest 9.0.2: 1 pytest 9.2.0: 2" ]
