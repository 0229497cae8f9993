"""The mode in which a program runs on the fake GPU of device.py, and what it records."""

import collections
import functools
import sys
import weakref
from pathlib import Path

import device
import torch
import torchgen
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401  collectives of fake tensors
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

# What a tensor says that nobody computed: a loss that is finite, a flag that is set.
NUMBERS = {torch.bool: True, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5}
FREE = ("prim.", "profiler.", "aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.detach", "aten._reshape_alias")
# What touches a few rows of a table: how often it reads or writes each.
ROWS = {torch.ops.aten.embedding: 2, torch.ops.aten.index_select: 2, torch.ops.aten.index_copy_: 2,
        torch.ops.aten.index_add_: 3, torch.ops.aten.index_fill_: 1}
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
ATTENTION = {"torch_attn::_varlen_attn": 4, "torch_attn::_varlen_attn_backward": 10}     # operations of a key's channel


def attention_over_documents(function, args: tuple, kwargs: dict) -> tuple[str, float]:
    """(its name with the longest document and the window, operations).

    A token sees itself and up to `window` tokens before it. The operations are an upper bound: those of documents that
    all have the longest's length. (torch's own count is that of every pair of so many tokens, in each document.)
    """
    given = dict(zip([argument.name for argument in function._schema.arguments], args, strict=False)) | kwargs
    tokens, heads, channels = given["query"].shape
    longest, window = given["max_k"], (given.get("window_size") or [-1])[0]
    keys = min(window + 1, longest) if window >= 0 else longest
    mean = keys - keys * (keys - 1) / (2 * longest)     # the first tokens of a document see fewer
    operations = ATTENTION[function.name()] * tokens * mean * heads * channels
    return f"{function} {longest} {window}", operations


@functools.cache
def cuda_operations() -> set[str]:
    """The operations that torch's CUDA builds have a kernel for, by the list in torch's own wheel."""
    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    cuda = parsed.backend_indices[DispatchKey.CUDA]
    functions = {str(f.func.name): f for f in parsed.native_functions}
    return {f"aten::{name}" for name, f in functions.items()
            if f.has_composite_kernel or cuda.has_kernel(functions[str(f.structured_delegate or name)])}


@functools.cache
def has_cuda_kernel(function) -> bool:
    name = function.name()
    if name.startswith("aten::"):
        return name in cuda_operations()
    if name.startswith("torch_attn::"):     # torch's own wrapper of it
        return "aten::_flash_attention_forward" in cuda_operations()
    if name.startswith(("c10d::", "prim::", "prims::", "profiler::")):
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


class Done(torch.distributed._Work):
    """A collective that is over: torch's own fake one has no result, which DDP asks for."""
    def __init__(self, tensors: list):
        super().__init__()
        self.tensors = tensors

    def wait(self, timeout=None) -> bool:
        return True

    def get_future(self):
        future = torch.futures.Future()
        future.set_result(self.tensors)
        return future


class Recorder(FakeTensorMode):
    """Follows a program whose source is the file `program`.

    Bytes of memory are of storages on the GPU, each rounded up to the 512 of torch's allocator. A synchronisation is
    named by the functions of the program that led to it.
    """
    def __init__(self, program: str):
        super().__init__(allow_non_fake_inputs=True)
        device.RECORDER, self.program = self, program
        self.done = collections.deque(maxlen=1000)     # torch keeps no reference
        self.at_once = {}       # rows of a step: those of a process at once
        self.live, self.logits, self.storages, self.kernels = 0, 0, {}, {}
        self.start()

    def start(self) -> None:
        """Forgets what has run, but for the kernels, which are compiled once."""
        self.peak, self.largest_float32, self.missing = self.live, 0, set()
        self.synchronisations, self.graphs = collections.Counter(), counters["stats"]["unique_graphs"]
        self.in_step, self.optimizer, self.steps = False, "", []

    def start_step(self) -> None:
        """Notes from here on, of this step, {kernel: [calls, operations, bytes]} and {collective and dtype: [calls,
        bytes of its result]}. A kernel of an optimizer has the optimizer's name before its own."""
        self.in_step = True
        self.steps.append(dict(work=collections.defaultdict(lambda: [0, 0, 0]),
                               collectives=collections.defaultdict(lambda: [0, 0])))

    def report(self) -> dict:
        names = ("peak", "live", "at_once", "logits", "largest_float32", "kernels", "steps", "synchronisations")
        return {name: getattr(self, name) for name in names} | dict(
            missing=sorted(self.missing), graphs=counters["stats"]["unique_graphs"] - self.graphs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in inputs if x.device.type == "cuda"]
        if function is torch.ops.aten._local_scalar_dense.default:
            if on_gpu:
                self.synchronized("item")
            return NUMBERS.get(inputs[0].dtype, 1)
        if on_gpu and not has_cuda_kernel(function):
            self.missing.add(str(function))
        if function is torch.ops.c10d.allreduce_.default:
            self.done.append(Done(args[0]))
            result = args[0], self.done[-1].boxed()
        else:
            result = super().__torch_dispatch__(function, types, args, kwargs)

        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        for x in results:
            x.constant = None     # torch would copy a tensor of one number, whose number it knows, to a real GPU
            if x.device.type == "cuda":
                self.track(x)
        moved = {x.device.type for x in inputs + results} == {"cpu", "cuda"}
        if function in COPIES and moved and not (kwargs or {}).get("non_blocking"):
            self.synchronized("copy")
        read = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]     # not kwargs' `out`
        size = sum(x.numel() * x.itemsize for x in read + results)
        if function.overloadpacket in ROWS:
            table, places = read[:2]
            row = table.numel() // table.size(0) * table.itemsize
            size = places.numel() * (ROWS[function.overloadpacket] * row + places.itemsize)
        if function.namespace == "c10d" and self.in_step:
            calls = self.steps[-1]["collectives"][f"{function.name()} {str(on_gpu[0].dtype)[6:]}"]
            results = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            calls[0], calls[1] = calls[0] + 1, calls[1] + sum(x.numel() * x.itemsize for x in results)
        elif function.namespace != "c10d" and on_gpu and not function.is_view and not str(function).startswith(FREE):
            count, name, operations = flop_registry.get(function.overloadpacket), str(function), 0
            if function.name() in ATTENTION:
                name, operations = attention_over_documents(function, args, kwargs or {})
            elif count:
                operations = count(*args, **(kwargs or {}), out_val=result)
                name += " " + " ".join("x".join(map(str, x.shape)) for x in inputs[-2:])
            self.ran(name, operations, size)
        return result

    def ran(self, name: str, operations: float, size: int) -> None:
        if not self.in_step:
            return
        work = self.steps[-1]["work"][self.optimizer + name]
        work[0], work[1], work[2] = work[0] + 1, work[1] + operations, work[2] + size

    def synchronized(self, what: str) -> None:
        """Notes that the host waits for the GPU here."""
        names, frame = [what], sys._getframe()
        while frame:
            if frame.f_code.co_filename == self.program:
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        self.synchronisations[" < ".join(names)] += 1

    def track(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.storages:
            self.storages[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            if x.dtype == torch.float32:
                self.largest_float32 = max(self.largest_float32, size)
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.live -= self.storages.pop(key)
