"""What the trainer's libraries read of the environment: each variable is dropped, or known to stay."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from gymexp.processes.launcher_variables import remarks, without_launchers

# What the trainer's libraries read of the environment. commands/ are launchers of their own.
READERS = (
    ("accelerate", "", ("commands", "test_utils")),
    ("transformers", "training_args.py", ()),
    ("transformers", "trainer*.py", ()),
    ("transformers", "modeling_utils.py", ()),
    ("transformers", "integrations", ()),
    ("transformers", "distributed", ()),
    ("trl", "trainer", ()),
    ("trl", "extras", ()),
    ("peft", "utils", ()),
    ("torch", "distributed", ("elastic", "launcher", "_shard", "_tools")),
)
# Variables that stay: trackers, the machine's devices and networks, debugging, caches, and where this runs.
# None says how many processes train, where they meet, or in which precision (XLA's own are read only with
# torch_xla, which gymexp does not use).
KEPT = "".join(
    """
    BRANCH CI CLEARML_* COMET_* DISABLE_KUBEFLOW_INTEGRATION DISABLE_MLFLOW_INTEGRATION HF_* JOB_ID KUBEFLOW_*
    MLFLOW_* RAY_SCOPE SWANLAB_* TENSORBOARD_LOGGING_DIR TQDM_DISABLE TRACKIO_* VLLM_LOGGING_LEVEL WANDB_*
    ASCEND_* AWS_* CUBLAS_* FLASH_ATTENTION_DETERMINISTIC HCCL_* MKL_SERVICE_FORCE_INTEL
    PYTORCH_ENABLE_MPS_FALLBACK
    CUDA_* NCCL_* NPU_FA2_SPARSE_MODE NPROC OMP_NUM_THREADS NVSHMEM_LIB_DIR PJRT_DEVICE PT_HPU_LAZY_MODE
    PYTORCH_NO_CUDA_MEMORY_CACHING ROCSHMEM_LIB_DIR TPU_NAME USE_HUB_KERNELS USE_LIBUV USE_TORCH_XLA XLA_*
    DCP_* FR_TRACE_VERBOSE_OUTPUT LOGLEVEL NETWORK_DEBUG_* PYTHON_EXEC TORCH_* TRANSFORMERS_* TRL_*
    systemdrive
    """
).split()


def files() -> Iterator[Path]:
    for package, inside, skipped in READERS:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for found in root.glob(inside) if "*" in inside else [root / inside]:
            some = [found] if found.is_file() else found.rglob("*.py")
            yield from (path for path in some if not set(skipped) & set(path.relative_to(root).parts))


def names_read(tree: ast.AST) -> set[str]:
    """Names of environment variables, as far as they stand in the source; `*` for what is computed."""
    found: set[str] = set()

    def names_of(node: ast.AST) -> list[str]:
        match node:
            case ast.Constant(value=str(name)):
                return [name]
            case ast.JoinedStr(values=parts):
                return ["".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in parts)]
            case ast.BinOp(left=left):
                return [f"{name}*" for name in names_of(left)]
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [name for part in parts for name in names_of(part)]
        return []

    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=holder, slice=name) if "environ" in ast.unparse(holder):
                found.update(names_of(name))
            case ast.Call(func=function, args=[name, *_]) if any(
                word in ast.unparse(function) for word in ("environ", "getenv", "from_env")
            ):
                found.update(names_of(name))
            case ast.Compare(left=name, ops=[ast.In() | ast.NotIn()], comparators=[holder]) if (
                "environ" in ast.unparse(holder)
            ):
                found.update(names_of(name))
    return {name for name in found if name.replace("_", "").replace("*", "").isalnum()}


def test_every_variable_that_the_trainers_libraries_read_is_dropped_or_known_to_stay():
    read = {name for path in files() for name in names_read(ast.parse(path.read_text()))}
    assert (
        len(read) > 100 and {"RANK", "PMI_SIZE", "ACCELERATE_MIXED_PRECISION", "FSDP_STATE_DICT_TYPE"} <= read
    )
    kept = without_launchers(dict.fromkeys(sorted(read), "1"))
    unknown = [name for name in kept if not any(fnmatch(name, known) for known in KEPT)]
    assert not unknown, "decide of each in gymexp/processes/launcher_variables.py, or here"


def test_a_setting_that_does_not_act_is_named_with_the_key_that_does():
    found = {"ACCELERATE_MIXED_PRECISION": "fp16", "FSDP_VERSION": "2", "RANK": "0", "PATH": "/bin"}
    said = list(remarks(found))
    assert said[0].startswith("ACCELERATE_MIXED_PRECISION=fp16 is not used") and "model.dtype" in said[0]
    assert "trainer.fsdp_config" in said[1] and "RANK" in said[2] and len(said) == 3
    assert not list(remarks({"PATH": "/bin", "OMP_NUM_THREADS": "2"}))
