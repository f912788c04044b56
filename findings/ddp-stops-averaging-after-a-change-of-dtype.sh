#!/usr/bin/env bash
# torch 2.13.0: DistributedDataParallel stops averaging the gradient of a parameter whose `.data` was float32 in between.
#
# Optimisers that step bf16 weights in float32 may exchange `.data` for a float32 tensor and back. The dtype, the shape
# and the Parameter object are the same afterwards, but the parameter has got a new gradient accumulator, and the hook
# that averages gradients is on the old one. From the next step on each process trains on its own gradients, without an
# error or a warning, and the weights of the processes drift apart.
# Instead: step a float32 copy, and copy the result into the bf16 parameter in place.
#
# Seen: with bf16 throughout the two processes have equal gradients in steps 0, 1, 2; with float32 in between they are
# equal in step 0 and differ from step 1 on. Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy<3"
cat > "$folder/ddp.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank, folder, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/{way}", rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 4, bias=False).bfloat16())
weight = model.module.weight
generator = torch.Generator().manual_seed(rank)  # each process has data of its own
equal = []
for _ in range(3):
    model(torch.randn(8, 4, generator=generator).bfloat16()).float().square().mean().backward()
    gathered = [torch.zeros(4, 4) for _ in range(2)]
    dist.all_gather(gathered, weight.grad.float())
    equal.append("equal" if torch.equal(*gathered) else "differ")
    gradient, weight.grad = weight.grad, None
    if way == "float32":
        weight.data = weight.data.float()
        weight.data -= 0.1 * gradient.float()
        weight.data = weight.data.bfloat16()
    else:
        weight.data -= 0.1 * gradient
if rank == 0:
    print(f"{way}: {' '.join(equal)}")
dist.destroy_process_group()
PYTHON
seen=""
for way in bf16 float32; do
  "$folder/venv/bin/python" "$folder/ddp.py" 1 "$folder" "$way" >"$folder/other.log" 2>&1 &
  line=$("$folder/venv/bin/python" "$folder/ddp.py" 0 "$folder" "$way" 2>"$folder/first.log")
  wait
  echo "$line"
  seen="$seen$line;"
done
[ "$seen" = "bf16: equal equal equal;float32: equal differ differ;" ]
