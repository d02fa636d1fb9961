"""A GPU that is not there: tensors that say `cuda:0`, keep their numbers in ordinary memory and refuse what CUDA refuses.

    python tests/make_believe.py NOTEBOOK ...     run notebooks as a machine with a GPU would, one process each

Refused are operations between tensors of two devices, conversion to numpy, a generator of the CPU and kernels that CUDA does
not have. Arithmetic, dtypes and shapes are those of the CPU; time, memory and rounding of a real GPU are not imitated. PyTorch
lets tensors of another device go through Python ("meta" tensors, wrapped), so that not one line of the package knows of it.
`install` changes PyTorch for good: call it in a process of its own.
"""
import contextlib
import io
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
JOINING = {aten.cat.default, aten.stack.default}
MISSING = {"histogram", "histogramdd", "_histogramdd_bin_edges", "_histogramdd_from_bin_cts"}  # these have no kernel for CUDA


class There(torch.Tensor):
    "A tensor on the make-believe GPU; `.here` holds its numbers."

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=torch.device("meta"))

    def __init__(self, here):
        self.here = here
        There.made += 1

    made = 0  # since the process began
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self, **options):
        return f"There({self.here})"

    def __format__(self, spec):
        return format(self.here, spec)

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, *args, **options):
        return self.numpy()

    def tolist(self):
        return self.here.tolist()

    def data_ptr(self):
        return self.here.data_ptr()

    def untyped_storage(self):
        return self.here.untyped_storage()

    def _copied(self, here):
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(here, self.requires_grad)
        return here.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):  # a file that is written on a GPU is read with `map_location="cpu"`
        return self._copied(self.here.detach()).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = self._copied(There(self.here.detach().clone(memory_format=torch.preserve_format)))
        return memo[id(self)]


def here(x):
    "The numbers behind a tensor, and anything else as it is."
    return x.here if isinstance(x, There) else x


def there_is(x):
    "A tensor as one on the make-believe GPU, unless it is sparse (such a tensor has no device here); anything else as it is."
    return There(x) if isinstance(x, torch.Tensor) and x.layout == torch.strided else x


def away(device):
    "Whether a device is the make-believe GPU."
    return device is not None and torch.device(device).type in ("cuda", "meta")


def refuse(func, args, tensors):
    "RuntimeError where CUDA has no such kernel or would find tensors of two devices."
    name = func.overloadpacket.__name__
    if name in MISSING:
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend")
    for x in tensors:
        if isinstance(x, There) or x.layout != torch.strided:
            continue
        if x.dim() == 0 and func not in JOINING and not (x is args[0] and name.endswith("_")):
            continue  # a number may be on the CPU
        if func in INDEXING and isinstance(args[0], There) and x is not args[0] and not (len(args) > 2 and x is args[2]):
            continue  # an index may be on the CPU
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})")


def run(func, args, kwargs):
    "One operation of PyTorch, on the numbers; what it gives is there if its arguments are, or if `device` says so."
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    device = kwargs.get("device")
    if func is aten._to_copy.default:
        out = func(here(args[0]), **{k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")})
        return There(out) if (away(device) if device is not None else isinstance(args[0], There)) else out
    if func is aten.copy_.default:
        func(here(args[0]), here(args[1]))
        return args[0]
    if func is aten._local_scalar_dense.default:
        return func(here(args[0]))
    there = any(isinstance(x, There) for x in tensors)
    if not there and not away(device):
        return func(*args, **kwargs)
    if there:
        refuse(func, args, tensors)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    options = tree_map(here, kwargs) | ({"device": torch.device("cpu")} if device is not None else {})
    out = func(*tree_map(here, args), **options)
    if device is not None and not away(device):
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(there_is, out))


class GPU(TorchDispatchMode):
    "Within it, a machine has a GPU."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def install():
    "Let PyTorch believe that there is a GPU, as far as Python asks."
    to = torch.Tensor.to

    def mapped(x):
        return torch.device("meta") if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x

    def moved(self, *args, **options):
        if args and isinstance(args[0], There):
            args = CUDA, args[0].dtype, *args[1:]
        return to(self, *map(mapped, args), **{k: mapped(v) for k, v in options.items()})

    def made(make):
        def build(data, *args, device=None, **options):
            if isinstance(data, There):
                data = data if make is as_tensor else data.detach().clone()
                return data.to(device or CUDA, options.get("dtype") or data.dtype)
            out = make(data, *args, **options)
            return out.to(device) if away(device) else out
        return build

    as_tensor = torch.as_tensor
    torch.Tensor.to, torch.Tensor.cuda = moved, lambda self, *args, **options: self.to(CUDA)
    torch.Tensor.new_tensor = lambda x, data, dtype=None, device=None: torch.tensor(data, dtype=dtype or x.dtype, device=device or x.device)
    torch.tensor, torch.as_tensor = made(torch.tensor), made(torch.as_tensor)
    cuda = torch.cuda
    for name in ("is_available", "is_initialized", "is_bf16_supported"):
        setattr(cuda, name, lambda *args, **options: True)
    for name in ("_lazy_init", "synchronize", "set_rng_state", "manual_seed_all"):
        setattr(cuda, name, lambda *args, **options: None)
    cuda.device_count, cuda.get_device_name = lambda: 1, lambda *args: "make-believe"
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    if hasattr(torch, "accelerator"):  # since PyTorch 2.6
        torch.accelerator.is_available = lambda: False
    sys.modules[torch.nn.DataParallel.__module__]._get_available_device_type = lambda: None  # wraps, and spreads over nothing
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            setattr(torch.optim.Optimizer, name, lambda self: None)


def run_notebook(path):
    "The cells of a notebook, in this process and where it lies; what went wrong, a text for each cell."
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell

    sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
    from run_notebooks import skipped

    install()
    os.chdir(path.parent)
    shell, wrong = InteractiveShell.instance(colors="NoColor"), []
    with GPU():
        for cell in nbformat.read(path, 4).cells:
            source = cell.source
            if cell.cell_type != "code" or skipped(cell, set()) or "nbdev_export" in source or 'device="meta"' in source:
                continue  # the last: what is about the device that this one is made of
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                done = shell.run_cell(source, store_history=False)
            error = done.error_before_exec or done.error_in_exec
            if error is not None:
                lines = [f"    {Path(f.filename).name}:{f.lineno} {f.line}" for f in traceback.extract_tb(error.__traceback__)[-8:]]
                wrong.append("\n".join([f"cell {cell['id']}: {error!r:.300}", *lines]))
    return wrong


if __name__ == "__main__":
    if len(sys.argv) == 2:
        wrong = run_notebook(Path(sys.argv[1]).resolve())
        print("\n".join(wrong) or f"{There.made} tensors on the make-believe GPU")
        sys.exit(bool(wrong))
    failed = 0
    for name in sys.argv[1:]:
        start = time.monotonic()
        failed += subprocess.run([sys.executable, __file__, name]).returncode
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    sys.exit(bool(failed))
