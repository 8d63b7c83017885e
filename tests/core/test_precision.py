"""bf16 is used where the device has instructions for it, and nowhere else."""

import logging
import platform

import pytest
import torch

from tiger_ray.core import precision
from tiger_ray.core.precision import dtype_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cpu_knows_bf16(request, monkeypatch):
    precision._multiplies_bf16.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    yield
    precision._multiplies_bf16.cache_clear()


@pytest.mark.parametrize("cpu_knows_bf16", [True], indirect=True)
def test_a_cpu_that_knows_bf16_computes_in_it(cpu_knows_bf16, caplog):
    assert dtype_of("bf16", CPU) == torch.bfloat16
    assert not caplog.records


@pytest.mark.parametrize("cpu_knows_bf16", [False], indirect=True)
def test_a_cpu_without_bf16_computes_in_fp32_and_says_so_once(cpu_knows_bf16, caplog):
    with caplog.at_level(logging.WARNING):
        assert [dtype_of("bf16", CPU) for _ in range(3)] == [torch.float32] * 3
    assert [record.message for record in caplog.records] == [
        "this cpu has no bf16 instructions; fp32 is used where bf16 was asked for"
    ]


@pytest.mark.parametrize("instructions", [None, "_is_avx512_bf16_supported", "_is_amx_tile_supported"])
@pytest.mark.parametrize("cpu_knows_bf16", [True], indirect=True)
def test_an_intel_cpu_that_only_emulates_bf16_by_avx512_computes_in_fp32(
    cpu_knows_bf16, monkeypatch, instructions
):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda each=each: each == instructions)
    assert dtype_of("bf16", CPU) == (torch.bfloat16 if instructions else torch.float32)


@pytest.mark.parametrize("cpu_knows_bf16", [True], indirect=True)
def test_a_build_of_torch_without_onednn_computes_in_fp32(cpu_knows_bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    assert dtype_of("bf16", CPU) == torch.float32


@pytest.mark.parametrize("known", [True, False])
def test_a_gpu_is_asked_whether_it_has_the_instructions_not_whether_it_can_emulate_them(monkeypatch, known):
    precision._multiplies_bf16.cache_clear()
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: known or including_emulation
    )
    assert dtype_of("bf16", GPU) == (torch.bfloat16 if known else torch.float32)
    precision._multiplies_bf16.cache_clear()


@pytest.mark.parametrize("cpu_knows_bf16", [True, False], indirect=True)
def test_fp32_is_fp32_everywhere(cpu_knows_bf16):
    assert dtype_of("fp32", CPU) == dtype_of("fp32", GPU) == torch.float32
