"""Runs prime-rl's own trainer loop on a CPU, for tests only.

prime-rl names the device "cuda" in its source and imports kernels that need a GPU. `install()` changes neither its
files nor its logic; it does four things, all in this process:

1. the string constant "cuda" in modules of `prime_rl.trainer` and `prime_rl.transports.weights` reads "cpu" (on the
   syntax tree, while the module is imported);
2. packages that only exist for GPUs (`GPU_ONLY`) import as empty stand-ins; calling into one is an error;
3. `torch.cuda`'s bookkeeping (peak memory, set_device, empty_cache) does nothing;
4. process groups use gloo.

`fit_host()` then replaces attention, precision, clipping and peak FLOPS.

What a run on it shows: the wire, the loader, the denominators, compute_loss, the optimizer and the hooks are
prime-rl's. What it does not show: CUDA kernels, NCCL, flash attention, weight broadcast to a live vLLM.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import FunctionType, ModuleType

import torch

#: Imported by prime-rl's trainer, useless without a GPU (or not on PyPI). Those that are installed are used.
GPU_ONLY = (
    "flash_attn", "flash_attn_3", "ring_flash_attn", "dion", "tilelang", "fla", "torchao", "torchtitan", "deep_ep",
    "deep_gemm", "modelexpress", "prime_cli", "prime_kernels", "quack", "nixl", "pynvml", "mooncake", "vllm", "torchvision", "wandb_workspaces", "wandb_gql", "prometheus_client",
)  # fmt: skip
_REWRITTEN = ("prime_rl.trainer.", "prime_rl.transports.weights")


class _Attributes(type):
    def __getattr__(cls, name: str):
        return _made(cls, name, f"{cls.__module__}.{cls.__name__}")


class _StandIn(ModuleType):
    """An empty module: any attribute is a class that cannot be made, any submodule is another stand-in."""

    __path__ = ()

    def __getattr__(self, name: str):
        return _made(self, name, self.__name__)


def _made(owner, name: str, module: str):
    if name.startswith("__"):
        raise AttributeError(name)
    # a class, so that it can be a base class, an annotation, a decorator or the target of isinstance
    made = _Attributes(name, (), {"__new__": _unusable, "__module__": module})
    setattr(owner, name, made)
    return made


def _unusable(cls, *args, **kwargs):
    if len(args) == 1 and not kwargs and isinstance(args[0], FunctionType):
        return args[0]  # used as a decorator
    if not args and kwargs and sys._getframe(1).f_code.co_name == "<module>":
        return lambda function: function  # a decorator with options
    raise RuntimeError(f"{cls.__module__}.{cls.__name__} needs a GPU: prime-rl on a CPU cannot use it.")


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] not in self.names or not _asked_by_prime_rl():
            return None  # to everyone else (transformers looks for flash_attn) it is not installed, which is true
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module) -> None:
        module.__version__ = "0"


class _ToCPU(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.copy_location(ast.Constant("cpu"), node) if node.value == "cuda" else node


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.fix_missing_locations(_ToCPU().visit(ast.parse(data, path)))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname):  # never from, nor into, the byte code cache: that one says "cuda"
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Rewriter(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(_REWRITTEN):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _Loader(fullname, spec.origin)
        return spec


def install() -> list[str]:
    """Make `prime_rl.trainer.rl.train` importable and runnable on a CPU; return the packages that were stood in for."""
    if torch.cuda.is_available():
        raise RuntimeError("This machine has a GPU: run prime-rl itself, not this stand-in.")
    already = [name for name in sys.modules if name.startswith(_REWRITTEN) and name != "prime_rl.trainer.rl.loss"]
    if already:
        raise RuntimeError(f"install() must run before {already[0]} is imported.")
    missing = tuple(name for name in GPU_ONLY if not _usable(name))
    sys.meta_path.insert(0, _StandIns(missing))
    sys.meta_path.insert(0, _Rewriter())
    _quiet_cuda()
    _gloo()
    torch._dynamo.config.disable = True
    return list(missing)


def _usable(name: str) -> bool:
    if name in ("ring_flash_attn", "torchtitan"):  # the first needs flash_attn; the second must fit prime-rl's pin
        return False
    return importlib.util.find_spec(name) is not None


def _asked_by_prime_rl() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and not name.startswith("importlib"):
            return name.startswith("prime_rl")
        frame = frame.f_back
    return False


def _quiet_cuda() -> None:
    for name in ("set_device", "reset_peak_memory_stats", "empty_cache", "synchronize"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.max_memory_reserved = lambda *args, **kwargs: 0
    torch.cuda.current_device = lambda: 0
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _gloo() -> None:
    import torch.distributed as dist

    original = dist.init_process_group

    def init_process_group(backend=None, **kwargs):
        kwargs.pop("device_id", None)
        return original(backend="gloo", **kwargs)

    dist.init_process_group = init_process_group


def fit_host() -> None:
    """Replace the four things of prime-rl that a CPU cannot give. Call it after `install()`, before training.

    Attention: torch's. Forward pass: float32 (prime-rl's is bfloat16). Gradient clipping: torch's own function, in place
    of torchtitan's (which adds pipelines and expert parallelism). Peak FLOPS, for the logged utilisation: 1.
    """
    from prime_rl.trainer import model, perf, utils

    original, policy = model.get_model, model.MixedPrecisionPolicy

    def get_model(config, *args, **kwargs):
        return original(config.model_copy(update={"attn": "sdpa"}), *args, **kwargs)

    def clip(parameters, max_norm, ep_enabled=False):
        norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    model.get_model = get_model
    model.MixedPrecisionPolicy = lambda **kwargs: policy(**{**kwargs, "param_dtype": torch.float32})
    utils.torch_clip_grad_norm_ = clip
    perf.PerfCounter.gpu_peak_flops = property(lambda self: 1.0, lambda self, value: None)


@contextlib.contextmanager
def stand_ins(*names: str):
    """While this holds, those of `names` that are not installed import as stand-ins, for prime-rl only."""
    finder = _StandIns(tuple(name for name in names if importlib.util.find_spec(name) is None))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
