"""A trainer for test_ab.py that only writes a log. Its loss falls with --lr, by far more than its noise.

--control names a file with lines `RUN crash`, or `RUN hold`, which holds that run as long as the line is there.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

c = dict(track=sys.argv[1], num_steps=4, batch_tokens=8, target=9.0, lr=0.002, seed=0, control=os.devnull)
for name, value in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    c[name[2:]] = type(c.get(name[2:], ""))(value)
folder, control = Path(c["log_dir"], c["run_id"]), Path(c["control"])
assert os.listdir(folder) == ["console.txt"]     # nothing of another run
with open(folder.parent / "calls.txt", "a") as calls:
    print(c["run_id"], os.getpid(), os.environ.get("OMP_NUM_THREADS"), os.environ["GOMP_SPINCOUNT"],
          os.environ["MALLOC_TRIM_THRESHOLD_"], os.environ["MALLOC_MMAP_THRESHOLD_"], file=calls)
print(*range(20), sep="\n", flush=True)
if f"{c['run_id']} crash" in control.read_text():
    sys.exit("ValueError: \x1b[2Ja crash asked for")

source = Path(__file__).read_text()
sha256 = hashlib.sha256(source.encode()).hexdigest()
git = os.popen(f"git -C {Path(__file__).parent} describe --always 2>/dev/null || echo none").read().strip()
log = open(folder / "log.txt", "w")
print(f"{source}{'=' * 100}\nrun folder: {folder}\nsource: sha256 {sha256}, git {git}\nconfig: {json.dumps(c)}",
      file=log, flush=True)
while f"{c['run_id']} hold" in control.read_text():
    (folder / "held").write_text(f"{os.getpid()}\n")
    time.sleep(0.02)
noise = (c["seed"] * 7919 + round(c["lr"] * 1e6) * 31) % 13
print(f"step:4/4 val_loss:{3 - 500 * (c['lr'] - 0.002) + noise / 1000} train_time:{100_000 + 40 * noise}ms", file=log)
