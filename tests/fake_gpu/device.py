"""A CUDA GPU that is not there: torch's CPU build, its compiler and Triton take it for one.

Tensors of the fake GPU have shapes, types, devices and memory, and no numbers. Inductor writes, and Triton compiles
with ptxas, the kernels that a real GPU of that compute capability would run. `load_hooks` comes before the first import
of torch, `install` after it; what they replace in torch, Inductor and Triton stands here. A program runs in the mode of
recorder.py, which follows what it does.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# By compute capability: name, multiprocessors, shared memory of a block and of a multiprocessor in bytes.
GPUS = {"8.0": ("NVIDIA A100-SXM4-80GB", 108, 166_912, 167_936),
        "9.0": ("NVIDIA H100 80GB HBM3", 132, 232_448, 233_472)}
DEVICES = 8
RECORDER = None             # of the program that runs


def missing() -> str:
    """Why there can be no fake GPU here, or an empty string."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return "the fake GPU needs Linux and g++"
    if importlib.util.find_spec("triton") is None:
        return "the fake GPU needs Triton: Linux x86-64, requirements-dev.txt"
    return ""


def load_hooks() -> None:
    """Compiles hooks.cpp, in about 3 s, loads it, and imports torch."""
    assert "torch" not in sys.modules, "load the hooks before torch is imported"
    torch_folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/hooks.so"
        subprocess.run(
            ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", Path(__file__).with_name("hooks.cpp"), "-o", library,
             f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include", f"-L{torch_folder}/lib",
             "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"], check=True)
        hooks = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401
    hooks.replace_guard()


def install(capability: str, memory: int) -> None:
    name, processors, block, multiprocessor = GPUS[capability]
    major, minor = map(int, capability.split("."))
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, total_memory=memory, multi_processor_count=processors,
        regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        shared_memory_per_block=49_152, shared_memory_per_block_optin=block,
        shared_memory_per_multiprocessor=multiprocessor, L2_cache_size=40 * 2**20, gcnArchName="", uuid="fake")
    replace_cuda(properties)
    replace_inductor(properties)
    replace_triton(properties)


def always(value):
    return lambda *args, **kwargs: value


def replace_cuda(properties: SimpleNamespace) -> None:
    import torch
    capability = (properties.major, properties.minor)
    for name, value in dict(
            is_available=True, device_count=DEVICES, current_device=0, set_device=None, get_device_name=properties.name,
            get_device_capability=capability, get_device_properties=properties, is_bf16_supported=True,
            mem_get_info=(properties.total_memory,) * 2, is_current_stream_capturing=False, _lazy_init=None,
            _exchange_device=0, _maybe_exchange_device=0, manual_seed_all=None, manual_seed=None).items():
        setattr(torch.cuda, name, always(value))
    torch.cuda.get_rng_state = lambda *args: torch.empty(0)
    torch.cuda.set_rng_state = always(None)
    torch._C._cuda_getCurrentRawStream = always(0)
    torch.cuda.synchronize = lambda *args: RECORDER.synchronized("torch.cuda.synchronize")
    torch.cuda.max_memory_allocated = lambda *args: RECORDER.peak


def replace_inductor(properties: SimpleNamespace) -> None:
    import torch
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, pad_mm
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    capability = 10 * properties.major + properties.minor
    for interface in (device_interface.CudaInterface, device_interface.CudaInterface.Worker):
        for name, value in dict(
                current_device=0, set_device=None, is_available=True, device_count=DEVICES, get_raw_stream=0,
                get_device_properties=properties, get_compute_capability=capability, is_bf16_supported=True,
                raise_if_triton_unavailable=None, is_triton_capable=True, synchronize=None, exchange_device=0,
                maybe_exchange_device=0, memory_allocated=0).items():
            setattr(interface, name, staticmethod(always(value)))

    # These trace patterns, or measure, with real tensors.
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = always(None)
    config.shape_padding = config.joint_graph_constant_folding = False
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    config.compile_threads, config.force_disable_caches = 1, True
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(config, name):
            setattr(config, name, False)
    triton_helpers.set_driver_to_gpu = always(None)
    tuner = triton_heuristics.CachingAutotuner
    tuner.bench = always(1.0)
    tuner.benchmark_all_configs = lambda self, *args, **kwargs: dict.fromkeys(self.launchers, 1.0)
    tuner.coordinate_descent_tuning = lambda self, launcher, *args, **kwargs: launcher
    tuner.run = count_kernel(tuner.run)

    # Compiled programs call these two directly, past any mode.
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda:0")
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: torch.as_strided(
        x, size, stride, x.storage_offset() + offset)


def replace_triton(properties: SimpleNamespace) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    capability = 10 * properties.major + properties.minor

    class Driver(DriverBase):
        utils = SimpleNamespace(
            get_device_properties=always(dict(
                max_shared_mem=properties.shared_memory_per_block_optin, max_num_regs=65_536, warpSize=32,
                multiprocessor_count=properties.multi_processor_count)),
            load_binary=load_binary, unload_module=always(None))
        launcher_cls = staticmethod(lambda source, metadata: always(None))
        __init__ = always(None)
        is_active = classmethod(always(True))
        get_current_target = always(GPUTarget("cuda", capability, 32))
        get_current_device = get_current_stream = always(0)
        set_current_device = always(None)
        get_active_torch_device = always(torch.device("cuda:0"))
        get_device_interface = always(torch.cuda)
        map_python_to_cpp_type = always("void*")
        get_benchmarker = always(always([1.0]))

    triton.runtime.driver.set_active(Driver())


def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
    """In place of loading a kernel: reads its registers and bytes of stack, which is where registers spill to."""
    from triton.backends import nvidia
    program = Path(nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    RECORDER.kernels[name] = figures["REG"], figures["STACK"] + figures["LOCAL"]
    return 0, 0, figures["REG"], 0, 1024     # module, function, registers, spills, threads


def count_kernel(run):
    """Wraps the launch of a Triton kernel: the bytes of its tensors, of those that it updates in place twice."""
    def counted(self, *args, **kwargs):
        import torch
        sizes = [x.numel() * x.itemsize * (2 if name.startswith("in_out") else 1)
                 for x, name in zip(args, self.fn.arg_names, strict=False) if isinstance(x, torch.Tensor)]
        RECORDER.ran(self.fn.__name__, 0, sum(sizes))
        return run(self, *args, **kwargs)
    return counted
