"""Run examples/fsdp.py on a fake GPU, as the first of several ranks, and say what would go wrong on a real one.

    python tests/fake_gpu/sharded.py [--capability 9.0] [--ranks 8] [OPTION of examples/fsdp.py ...]

The other ranks are not there: their part of a collective is made up. The last line is the report, as JSON; its memory
counts gathered parameters that FSDP has let go, since it empties their storages. Exit status: 1 if there is a problem.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import device

if __name__ == "__main__":
    device.load_hooks()

import numpy as np
import torch
import torch.distributed as dist
from recorder import Recorder
from run import ROOT, ShardWriter, problems, real, replace_in_trainer
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(ROOT / "examples"))
import fsdp  # noqa: E402

import train_gpt  # noqa: E402


def replace_in_example(recorder: Recorder, ranks: int) -> None:
    """Streams, and all that works with numbers. The record begins with the second step."""
    replace_in_trainer(recorder)
    for name in ("Stream", "Event", "stream", "current_stream"):
        setattr(torch.cuda, name, getattr(torch.cpu, name))
    start_group, step = dist.distributed_c10d.init_process_group, fsdp.train_step
    dist.init_process_group = real(lambda backend, **settings: start_group(
        "fake", rank=0, world_size=ranks, store=FakeStore()))
    train_gpt.gather = fsdp.gather = lambda value: [value] * ranks
    fsdp.init_device_mesh = real(fsdp.init_device_mesh)
    DeviceMesh.__getitem__ = real(DeviceMesh.__getitem__)
    initialize = train_gpt.GPT.initialize
    train_gpt.GPT.initialize = lambda self: initialize(self).to("cuda:0")     # torch's own way swaps the data

    def train_step(run, tokens):
        if run.step == 1:
            recorder.start()
        recorder.start_step()
        loss = step(run, tokens)
        recorder.in_step = False
        return loss
    fsdp.train_step = train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", choices=device.GPUS, default="9.0")
    parser.add_argument("--ranks", type=int, default=8)
    options, arguments = parser.parse_known_args()
    os.environ.update(WORLD_SIZE=str(options.ranks), RANK="0", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "val"):
            with ShardWriter(Path(folder) / f"{name}_000000.bin", 50257) as shard:
                shard.write(np.where(np.arange(2_000_001) % 500, 0, 50256).astype("<u2"))     # documents
        device.install(options.capability, 85 * 10**9)
        with Recorder(fsdp.__file__) as recorder:
            replace_in_example(recorder, options.ranks)
            status = fsdp.main([*arguments, "--data", folder, "--log_dir", f"{folder}/logs"])
    report = recorder.report() | dict(status=status)
    report["problems"] = problems(report)
    print(json.dumps(report), flush=True)
    os._exit(bool(report["problems"]))


if __name__ == "__main__":
    main()
