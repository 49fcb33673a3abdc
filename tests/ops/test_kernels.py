"""Which kernels are chosen, and what is said about it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_implicit.device import kernels
from megatron_implicit.device.kernels import FORCE_VARIABLE, describe, find_kernels


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)
    kernels._find.cache_clear()
    yield
    kernels._find.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts packages on the path: install("a/b.py", "source") makes a.b importable for this test.

    What is really installed under those names is out of the way meanwhile, parts of failed imports included.
    """
    ours = ("mamba_ssm", "causal_conv1d", "transformer_engine", "apex", "amp_C")
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}
    for name in real:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str = "") -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(tmp_path).parents:
            if folder != Path("."):
                (tmp_path / folder / "__init__.py").touch()
        file.write_text(source)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.modules.update(real)


def test_tensors_on_a_cpu_use_torch_and_say_why() -> None:
    found = find_kernels("cpu")
    assert found.ssd == "torch" and "needs a CUDA device" in found.reasons["ssd"]
    assert found.causal_conv in ("onednn", "torch")
    assert found.norm == "torch"


def test_answer_is_cached() -> None:
    assert find_kernels("cpu") is find_kernels("cpu")


def test_variable_forces_torch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    find_kernels("cuda")
    monkeypatch.setenv(FORCE_VARIABLE, "torch")
    found = find_kernels("cuda")
    assert (found.ssd, found.causal_conv, found.norm) == ("torch", "torch", "torch")
    assert FORCE_VARIABLE in found.reasons["ssd"]
    monkeypatch.setenv(FORCE_VARIABLE, "triton")
    with pytest.raises(ValueError, match="set it to 'torch'"):
        find_kernels("cuda")


def test_installed_packages_are_used_on_a_cuda_device(install: Callable[..., None]) -> None:
    install("mamba_ssm/ops/triton/ssd_combined.py")
    install("causal_conv1d/__init__.py")
    install("transformer_engine/pytorch/optimizers.py")
    found = find_kernels("cuda")
    assert (found.ssd, found.causal_conv, found.norm) == ("mamba_ssm", "causal_conv1d", "fused")
    assert found.optimizer == "transformer_engine"
    assert find_kernels("cpu").ssd == "torch"


@pytest.mark.parametrize("error", ["ImportError('libcudart.so.12')", "OSError('undefined symbol')"])
def test_package_that_fails_to_load_is_named_with_its_error(install: Callable[..., None], error: str) -> None:
    install("mamba_ssm/ops/triton/ssd_combined.py", f"raise {error}")
    found = find_kernels("cuda")
    assert found.ssd == "torch"
    assert error.partition("(")[0] in found.reasons["ssd"] and error.split("'")[1] in found.reasons["ssd"]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    found = find_kernels("cuda")
    assert found.ssd == "torch" and found.reasons["ssd"] == "mamba_ssm not found"
    assert "apex not found" in found.reasons["optimizer"]


def test_the_other_apex_is_recognised_without_importing_it(install: Callable[..., None]) -> None:
    install("transformer_engine/__init__.py", "raise ImportError('not on this machine')")
    install("apex/__init__.py", "raise SystemExit('a web framework was started')")
    found = find_kernels("cuda")
    assert found.optimizer == "torch"
    assert "Pyramid" in found.reasons["optimizer"] and "pip uninstall apex" in found.reasons["optimizer"]


def test_nvidias_apex_is_used_once_its_extensions_are_built(install: Callable[..., None]) -> None:
    install("transformer_engine/__init__.py", "raise ImportError('not on this machine')")
    install("apex/optimizers/__init__.py", "class FusedAdam: ...")
    assert "amp_C" in find_kernels("cuda").reasons["optimizer"]
    install("amp_C.py")
    kernels._find.cache_clear()
    assert find_kernels("cuda").optimizer == "apex"


def test_description_has_a_line_for_each_choice() -> None:
    lines = describe("cpu").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "kernel of ssd", "kernel of causal_conv", "kernel of norm", "kernel of optimizer",
    ]  # fmt: skip
    assert all("(" in line for line in lines)
