"""The GPU's programs equal torch: on a GPU if there is one, else in Triton's interpreter, in a process of its own.

What the interpreter cannot show, that the compiler makes of them what they are meant to be, is held by compiling them
for a GPU that need not be there.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from supsupd.learning import gpu_kernels as gpu
from supsupd.learning.gpu_layers import FixedLayer, find_programs, fixed_layers, in_planes, pack_bits
from supsupd.learning.inference import reference_logits
from supsupd.learning.network import Architecture, Network
from supsupd.learning.optimiser import Layer, Step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None
PARTS = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies no bfloat16
LOGIT_ERROR = 1e-4
"""Of the norm: two bfloat16 for each activation leave 2^-17."""
WIDTHS = [(13, (70, 9), 5), (8, (), 16), (1, (1,), 1), (98, (300,), 50)]
HOPPER = 90

programs_run = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED, reason="no GPU here: held by the test of Triton's interpreter"
)
triton_there = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def make_network(widths, signed=True, seed=0):
    """A network's layers on the device: of signs, or with normal weights as from a pretrained file."""
    inputs, hidden, outputs = widths
    network = Network(Architecture((inputs,), hidden, outputs), seed)
    generator = torch.Generator().manual_seed(seed)
    weights = network.weights if signed else [torch.randn(w.shape, generator=generator) for w in network.weights]
    layers = fixed_layers([w.to(DEVICE) for w in weights], network.architecture.layers, PARTS)
    return network, layers


def random_bank(network, masks, padding=0, seed=0):
    """Masks of several densities, `padding` bytes that are none of theirs behind each."""
    rng = np.random.default_rng(seed)
    shapes = network.architecture.layers
    bank = rng.integers(0, 256, (masks, network.architecture.mask_bytes + padding), np.uint8)
    for place, row in enumerate(bank):
        bits = [torch.from_numpy(rng.random((s.rows, s.columns)) < (place % 5) / 4) for s in shapes]
        row[: network.architecture.mask_bytes] = network.pack(bits)
    return torch.from_numpy(bank).to(DEVICE)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_near(found, wanted, error):
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= error * float(wanted.norm())


@programs_run
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 20, 70])
@pytest.mark.parametrize("widths", WIDTHS)
def test_logits_under_every_mask_equal_those_of_torch(widths, n, signed):
    network, layers = make_network(widths, signed)
    bank, x = random_bank(network, 5), normal(n, widths[0])
    wanted = gpu.all_masks_logits_by_torch(x, bank, layers, torch.arange(5, device=DEVICE))
    assert_near(gpu.all_masks_logits(x, bank, layers), wanted, LOGIT_ERROR)


@programs_run
@pytest.mark.parametrize("masks", [0, 1, 65])
def test_they_do_under_any_number_of_masks(masks):
    network, layers = make_network(WIDTHS[0])
    bank, x = random_bank(network, masks), normal(3, 13)
    wanted = gpu.all_masks_logits_by_torch(x, bank, layers, torch.arange(masks, device=DEVICE))
    assert_near(gpu.all_masks_logits(x, bank, layers), wanted, LOGIT_ERROR)


@programs_run
def test_without_samples_there_are_no_logits():
    network, layers = make_network(WIDTHS[0])
    assert gpu.all_masks_logits(normal(0, 13), random_bank(network, 2), layers).shape == (2, 0, 5)


@programs_run
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-41])
def test_they_do_for_constant_and_for_denormal_inputs(value):
    network, layers = make_network(WIDTHS[0])
    bank, x = random_bank(network, 4), torch.full((2, 13), value, device=DEVICE)
    wanted = gpu.all_masks_logits_by_torch(x, bank, layers, torch.arange(4, device=DEVICE))
    torch.testing.assert_close(gpu.all_masks_logits(x, bank, layers), wanted, rtol=1e-4, atol=1e-5 * abs(value) + 1e-37)


@programs_run
def test_slots_name_masks_of_a_larger_bank_in_any_order():
    network, layers = make_network(WIDTHS[0])
    bank, x = random_bank(network, 9, padding=7), normal(4, 13)
    vector = normal(8 * network.architecture.bit_bytes)
    slots = torch.tensor([8, 0, 3, 3], device=DEVICE)
    chosen = bank[slots][:, : network.architecture.mask_bytes].contiguous()
    assert torch.equal(gpu.all_masks_logits(x, bank, layers, slots), gpu.all_masks_logits(x, chosen, layers))
    assert torch.equal(gpu.bank_times_vector(bank, vector, slots), gpu.bank_times_vector(chosen, vector))


@programs_run
def test_masks_in_several_parts_have_the_same_logits(monkeypatch):
    network, layers = make_network(WIDTHS[0])
    bank, x = random_bank(network, 21), normal(9, 13)
    together = gpu.all_masks_logits(x, bank, layers)
    monkeypatch.setattr(gpu, "CHUNK_BYTES", 1 << 18)
    assert len(list(gpu._chunks(9, layers, 21))) > 1
    assert torch.equal(gpu.all_masks_logits(x, bank, layers), together)


@programs_run
def test_repeated_runs_give_the_same_bits():
    network, layers = make_network(WIDTHS[3])
    bank, x = random_bank(network, 6), normal(20, 98)
    vector = normal(8 * network.architecture.bit_bytes)
    logits = [gpu.all_masks_logits(x, bank, layers) for _ in range(2)]
    sums = [gpu.bank_times_vector(bank, vector) for _ in range(2)]
    assert all(torch.equal(each, logits[0]) for each in logits)
    assert all(torch.equal(each, sums[0]) for each in sums)


@programs_run
def test_an_effective_weight_is_the_weight_where_the_bit_is_set():
    for signed in (True, False):
        network, layers = make_network(WIDTHS[0], signed)
        packed = random_bank(network, 3)[2]
        wanted = gpu.effective_weights_by_torch(packed, layers)
        assert all(torch.equal(a, b) for a, b in zip(gpu.effective_weights(packed, layers), wanted, strict=True))


@programs_run
def test_a_masked_linear_layer_is_the_product_with_its_effective_weights():
    network, layers = make_network(WIDTHS[0], signed=False)
    packed = random_bank(network, 4)[3]
    for layer, weight in zip(layers, gpu.effective_weights_by_torch(packed, layers), strict=True):
        x, shape = normal(6, layer.shape.columns), layer.shape
        rows = packed[shape.offset : shape.offset + shape.nbytes]
        assert_near(gpu.masked_linear(x, rows, layer), x @ weight.T, LOGIT_ERROR)


@programs_run
@pytest.mark.parametrize("masks", [0, 1, 65])
@pytest.mark.parametrize("padding", [0, 2, 6, 14])
def test_bank_times_vector_equals_torch(masks, padding):
    network, _ = make_network((13, (70, 9), 5))
    bank, vector = random_bank(network, masks, padding), normal(8 * network.architecture.bit_bytes)
    wanted = gpu.bank_times_vector_by_torch(bank, vector, torch.arange(masks, device=DEVICE))
    torch.testing.assert_close(gpu.bank_times_vector(bank, vector), wanted, rtol=1e-6, atol=1e-6)


@programs_run
def test_it_does_for_masks_of_several_chunks_and_values_of_any_size():
    network, _ = make_network(WIDTHS[3])
    bank = random_bank(network, 6)
    assert network.architecture.bit_bytes > gpu.CHUNK
    vector = normal(8 * network.architecture.bit_bytes) * (6 * normal(8 * network.architecture.bit_bytes, seed=1)).exp()
    wanted = gpu.bank_times_vector_by_torch(bank, vector, torch.arange(6, device=DEVICE))
    atol = 1e-7 * float(vector.abs().sum())
    torch.testing.assert_close(gpu.bank_times_vector(bank, vector), wanted, rtol=1e-6, atol=atol)


@programs_run
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 3e36, 1e-38, 1e-41, 1.4e-45])
def test_it_is_exact_for_constant_and_for_denormal_vectors(value):
    network, _ = make_network(WIDTHS[0])
    bank = random_bank(network, 5)
    vector = torch.full((8 * network.architecture.bit_bytes,), value, device=DEVICE)
    wanted = gpu.bank_times_vector_by_torch(bank, vector, torch.arange(5, device=DEVICE))
    assert torch.equal(gpu.bank_times_vector(bank, vector), wanted)


@programs_run
def test_what_a_mask_sums_to_does_not_depend_on_the_masks_beside_it():
    network, _ = make_network(WIDTHS[0])
    bank, vector = random_bank(network, 65), normal(8 * network.architecture.bit_bytes)
    alone = torch.cat([gpu.bank_times_vector(bank[i : i + 1], vector) for i in (0, 40, 64)])
    assert torch.equal(gpu.bank_times_vector(bank, vector)[[0, 40, 64]], alone)


@programs_run
def test_the_fused_step_equals_its_operations_one_by_one():
    fixed, scores, second, gradient = (normal(70, 13, seed=seed) for seed in range(4))
    tensors = [fixed, 0.1 * scores, 0.2 * scores, scores.clone(), second.abs()]
    ours, theirs = (Layer(*(t.clone() for t in tensors)) for _ in range(2))
    outs = torch.empty_like(fixed), torch.empty_like(fixed)
    for count in range(1, 4):
        step = Step.of("rmsprop", "threshold", count, lr=1e-2, share=0.1)
        gpu.fused_rmsprop(ours, gradient, step, outs[0])
        gpu.fused_rmsprop_by_torch(theirs, gradient, step, outs[1])
    for a, b in zip((*ours, outs[0]), (*theirs, outs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("optimiser", "rule"), [("adam", "threshold"), ("rmsprop", "edge-popup")])
def test_the_fused_step_refuses_another_optimiser_or_rule(optimiser, rule):
    layer = Layer(*(torch.zeros(2, 2) for _ in range(5)))
    with pytest.raises(ValueError, match="RMSProp under the threshold rule"):
        gpu.fused_rmsprop(layer, torch.zeros(2, 2), Step.of(optimiser, rule, 1), torch.zeros(2, 2))


@pytest.mark.parametrize("widths", WIDTHS)
def test_torchs_logits_are_those_of_numpy_in_float64(widths):
    network, layers = make_network(widths)
    bank, x = random_bank(network, 3), normal(4, widths[0])
    found = gpu.all_masks_logits_by_torch(x, bank, layers, torch.arange(3, device=DEVICE)).cpu().numpy()
    for logits, packed in zip(found, bank.cpu().numpy(), strict=True):
        np.testing.assert_allclose(logits, reference_logits(network, packed, x.cpu().numpy()), atol=1e-5)


def test_packed_bits_are_those_of_the_network():
    network, layers = make_network(WIDTHS[0])
    signs = torch.cat([pack_bits(layer.weight > 0).view(-1) for layer in layers])
    assert np.array_equal(signs.cpu().numpy(), network.packed_signs)
    assert all(torch.equal(layer.bits(signs), layer.weight > 0) for layer in layers)


def test_two_parts_keep_seventeen_bits_and_every_column_its_place():
    matrix = normal(3, 131) * normal(3, 131, seed=1).exp()
    planes = in_planes(matrix, torch.bfloat16).float()
    assert planes.shape == (2, 4, 3, 48)
    back = planes.sum(dim=0).permute(1, 2, 0).reshape(3, 192)
    torch.testing.assert_close(back[:, :131], matrix, rtol=2.0**-17, atol=0.0)
    assert not back[:, 131:].any()


def test_a_layer_of_one_magnitude_is_kept_as_signs():
    shape = Architecture((4,), (), 2).layers[0]
    assert FixedLayer.of(torch.tensor([[0.5, -0.5, 0.5, 0.5], [-0.5, 0.5, 0.5, 0.5]]), shape).signed
    assert not FixedLayer.of(torch.tensor([[0.5, -0.5, 0.5, 0.25], [-0.5, 0.5, 0.5, 0.5]]), shape).signed


@pytest.mark.skipif(INTERPRETED, reason="of the process that starts the interpreter")
def test_without_a_gpu_there_are_no_programs():
    assert find_programs(torch.zeros(1)) is None


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="of machines without a GPU")
def test_the_benchmark_says_that_there_is_no_gpu_and_stops():
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, check=True, text=True)
    assert "nothing was measured" in run.stdout and run.stdout.count("\n") == 1


@triton_there
@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="the laws run in this process")
def test_the_laws_hold_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 50


@triton_there
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("signed", [True, False])
def test_the_programs_of_fc_1024_compile_for_hopper_without_spilled_registers(signed, monkeypatch, tmp_path):
    compiled = compile_for(HOPPER, monkeypatch)
    monkeypatch.setattr(gpu, "find_programs", lambda _: importlib.import_module("supsupd.learning.gpu_programs"))
    network, layers = make_network((784, (1024, 1024), 500), signed)
    layers = fixed_layers([layer.weight for layer in layers], network.architecture.layers)
    gpu.warm_up(layers, network.architecture.mask_bytes, rows=(32,))
    products = {"masked_layer": "HGMMA", "bank_times_digits": "IMMA"}
    assert set(products) < {name for name, _ in compiled}
    for name, kernel in compiled:
        assert kernel.metadata.shared <= 227 * 1024
        assert spilled_bytes(kernel, tmp_path) == 0
        assert products.get(name, "") in kernel.asm["sass"]


def compile_for(capability, monkeypatch):
    """From now on launches compile for such a GPU and run nothing; the programs by name, as they come."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class NoDevice:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: "none: a cache of its own")
        get_current_stream = staticmethod(lambda device: 0)

    compiled, run = [], jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(driver, "_active", NoDevice())
    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    return compiled


def spilled_bytes(kernel, folder):
    """Bytes of each thread's stack, by the machine code's own account."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    run = subprocess.run(command, capture_output=True, check=True, text=True)
    return int(re.search(r"STACK:(\d+)", run.stdout)[1])
