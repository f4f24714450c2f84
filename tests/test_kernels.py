"""GPU kernels against float64, and the backends against each other. Skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from golden import expected_clips, load_golden, pad_features
from kernel_device import needs_gpu
from transformers.utils import is_flash_attn_2_available

from mimo_audio_hf import modeling_mimo_audio_tokenizer as modeling


pytestmark = [pytest.mark.gpu, needs_gpu]
pytest.importorskip("triton")
from mimo_audio_hf import attention_kernels  # noqa: E402 (which imports Triton)


HALF_PRECISION = [
    name
    for name, backend in modeling.ATTENTION_BACKENDS.items()
    if backend.half_precision_on_cuda and (name != "flash_attention_2" or is_flash_attn_2_available())
]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", [*HALF_PRECISION, "sdpa"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window"),
    [(16, 16, (40, 10)), (20, 64, (128, 0)), (4, 32, (5, 3)), (2, 64, (0, 0)), (2, 64, (-1, -1)), (2, 64, (-1, 0))],
)
def test_attention(name, heads, head_dim, window):
    sequences = modeling.PackedSequences.from_lengths([1, 7, 130, 64, 65, 300, 2000], "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(sequences.total, heads, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(3)
    )
    arguments = {"scaling": head_dim**-0.5, "sequences": sequences, "window": window}
    backend = modeling.ATTENTION_BACKENDS[name]
    mask = backend.make_mask(sequences, window) if backend.make_mask else None
    with torch.inference_mode():
        output = backend.attend(query, key, value, attention_mask=mask, **arguments)
        expected = modeling.eager_attention_forward(
            *(states.double() for states in (query, key, value)),
            attention_mask=modeling.padded_mask(sequences, window),
            **arguments,
        )
    # bfloat16 has 8 bits: weights and outputs are each rounded to 2**-9, of which about 2e-3 remains on average.
    assert error(output, expected) < 4e-3


@pytest.mark.parametrize(("heads", "head_dim"), [(20, 64), (16, 16), (3, 32)])
def test_rotary(heads, head_dim):
    query, key = (torch.randn(777, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    angles = torch.rand(777, 1, head_dim // 2, device="cuda") * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    with torch.inference_mode():
        outputs = attention_kernels.triton_rotary(query, key, cos, sin)
    expected = modeling.apply_rotary(*(states.double() for states in (query, key, cos, sin)))
    for actual, reference in zip(outputs, expected, strict=True):
        assert error(actual, reference) < 2.5e-3


@pytest.mark.parametrize("lengths", [[1, 7, 130, 64, 65, 300, 2000], [64, 128]])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window"),
    [(16, 16, (40, 10)), (4, 32, (96, 96)), (4, 32, (5, 3)), (2, 16, (0, 7)), (2, 64, (40, 10))],
)
def test_gradients_of_banded_attention(heads, head_dim, window, lengths):
    sequences = modeling.PackedSequences.from_lengths(lengths, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    *states, weights = (
        torch.randn(sequences.total, heads, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    )
    check_gradients(states, weights, sequences, window)


def check_gradients(states, weights, sequences, window, attend=attention_kernels.triton_attention_forward):
    """Against float64; the states with `requires_grad=False` get none."""
    arguments = {"scaling": states[0].shape[2] ** -0.5, "sequences": sequences, "window": window}
    differentiated = (
        [tensor.requires_grad for tensor in states] if any(t.requires_grad for t in states) else [True] * 3
    )
    ours = [tensor.detach().requires_grad_(want) for tensor, want in zip(states, differentiated, strict=True)]
    attend(*ours, attention_mask=None, **arguments).backward(weights)
    references = [tensor.detach().double().requires_grad_() for tensor in states]
    mask = modeling.padded_mask(sequences, window)
    modeling.eager_attention_forward(*references, attention_mask=mask, **arguments).backward(weights.double())
    for tensor, reference, want in zip(ours, references, differentiated, strict=True):
        assert (tensor.grad is not None) == want
        # As above, but weights and scores are both rounded on the way.
        assert not want or error(tensor.grad, reference.grad) < 8e-3


def banded_states(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, modeling.PackedSequences]:
    sequences = modeling.PackedSequences.from_lengths([7, 130, 65], "cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = sequences.total, 16, 16
    *states, weights = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4))
    return states, weights, sequences


def test_gradients_of_some_inputs():
    states, weights, sequences = banded_states()
    states[2].requires_grad_()
    check_gradients(states, weights, sequences, (40, 10))


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradients_that_are_not_contiguous(layout):
    states, weights, sequences = banded_states()
    if layout == "expanded":
        weights = weights[:1].expand(weights.shape)
    else:
        weights = weights.transpose(0, 1).contiguous().transpose(0, 1)
        states = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in states]
    check_gradients(states, weights, sequences, (40, 10))


def test_gradients_of_compiled_attention():
    states, weights, sequences = banded_states()
    compiled = torch.compile(attention_kernels.triton_attention_forward, fullgraph=True)
    check_gradients(states, weights, sequences, (40, 10), attend=compiled)


def test_what_is_not_finite_stays_in_its_clip():
    states, _, sequences = banded_states()
    arguments = {"attention_mask": None, "scaling": 0.25, "sequences": sequences, "window": (40, 10)}
    clean = attention_kernels.triton_attention_forward(*states, **arguments)
    for tensor in states:
        tensor[:7] = float("nan")
    assert torch.equal(attention_kernels.triton_attention_forward(*states, **arguments)[7:], clean[7:])


def test_gradients_of_rotary():
    states = [torch.randn(777, 20, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    weights = [torch.randn_like(tensor) for tensor in states]
    angles = torch.rand(777, 1, 32, device="cuda") * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    ours = [tensor.clone().requires_grad_() for tensor in states]
    torch.autograd.backward(attention_kernels.triton_rotary(*ours, cos, sin), weights)
    references = [tensor.double().requires_grad_() for tensor in states]
    rotated = modeling.apply_rotary(*references, cos.double(), sin.double())
    torch.autograd.backward(rotated, [tensor.double() for tensor in weights])
    for tensor, reference in zip(ours, references, strict=True):
        assert error(tensor.grad, reference.grad) < 2.5e-3


def test_gradients_of_a_model():
    """Those of our kernels and of PyTorch's, to bfloat16's rounding through all layers."""
    gradients = []
    features, mask = pad_features([clip["mel"] for clip in expected_clips("base")[3:]])
    for name in ("triton_varlen", "torch_varlen"):
        model = load_golden("base", attn_implementation=name).bfloat16().cuda().train()
        model.encoder.quantizer.eval()  # codebooks are trained in float32 only
        model(features.cuda(), mask.cuda()).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()]))
        if name == "triton_varlen":  # layers that run again in the backward pass are run apart
            model.zero_grad()
            model.gradient_checkpointing_enable()
            model(features.cuda(), mask.cuda()).loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()]))
    for other in gradients[:-1]:
        assert torch.cosine_similarity(other, gradients[-1], dim=0) > 0.98


@torch.no_grad()
def test_float32_codes_are_upstreams():
    model = load_golden("base").cuda()
    clips = expected_clips("base")
    features, mask = pad_features([clip["mel"] for clip in clips])
    output = model.encode(features.cuda(), mask.cuda())
    for index, clip in enumerate(clips):
        assert torch.equal(output.audio_codes[index, :, : len(clip["codes"])].T.cpu(), clip["codes"].long())


@torch.no_grad()
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_packed_core_never_waits_for_the_gpu(name):
    model = load_golden("base", attn_implementation=name).bfloat16().cuda()
    lengths = [300, 41, 1000]
    layout = model.encoder_layout(lengths)
    decoder_layout = model.decoder_layout(model.encoder.code_lengths(lengths))
    packed = torch.randn(sum(lengths), 128, device="cuda")
    for mode in ("default", "error"):  # once to build kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            codes = model.encode(packed, layout=layout).audio_codes
            model.decode(codes, layout=decoder_layout)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_codes_out_of_range_raise_and_leave_the_gpu_usable():
    model = load_golden("base").bfloat16().cuda()
    with pytest.raises(ValueError, match="codebook 2"):
        model.decode(torch.full((1, 6, 5), 16, device="cuda"))
    assert model.decode(torch.zeros(1, 6, 5, dtype=torch.long, device="cuda")).audio_values.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_packed_input_compiles_in_one_graph(name):
    model = load_golden("base").bfloat16().cuda()
    if name != model.attn_implementation:  # the default one is found by itself, also while a graph is compiled
        model.set_attn_implementation(name)
    mels = [clip["mel"] for clip in expected_clips("base")[3:]]
    layout = model.encoder_layout([mel.shape[1] for mel in mels])
    packed = torch.cat([mel.T for mel in mels]).cuda()
    expected = model.encode(packed, layout=layout, output_latents=True)
    compiled = torch.compile(model.encode, fullgraph=True)(packed, layout=layout, output_latents=True)
    assert error(compiled.latents, expected.latents.double()) < 2e-2  # the fused products round less often
    decoder_layout = model.decoder_layout(layout.codes.lengths.tolist())
    audio = model.decode(expected.audio_codes, layout=decoder_layout).audio_values
    compiled = torch.compile(model.decode, fullgraph=True)(expected.audio_codes, layout=decoder_layout)
    assert error(compiled.audio_values, audio.double()) < 5e-2


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this test needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_map_over_two_gpus(dtype, monkeypatch):
    """The skip connection, the quantizer and the cuts cross from one device to the other."""
    # Layers that are moved about do not run fused: neither does what they are compared with.
    plain = modeling.ATTENTION_BACKENDS["triton_varlen"]._replace(run_layers=None)
    monkeypatch.setitem(modeling.ATTENTION_BACKENDS, "triton_varlen", plain)
    features, mask = pad_features([clip["mel"] for clip in expected_clips("base")])
    expected = load_golden("base", dtype=dtype).cuda()(features.cuda(), mask.cuda())
    first = ["encoder.conv1", "encoder.conv2", "encoder.layer_norm", "encoder.layers.3", "decoder.dconv2"]
    second = ["encoder.down_sample_layer", "encoder.down_sample_norm", "encoder.quantizer", "encoder.layers.2"]
    second += ["decoder.dconv1", "decoder.layer_norm", "decoder.vocoder", "decoder.layers.0", "decoder.layers.2"]
    first += ["encoder.layers.0", "encoder.layers.1", "decoder.layers.1"]
    device_map = dict.fromkeys(first, 0) | dict.fromkeys(second, 1)
    for split in (device_map, "balanced"):
        model = load_golden("base", dtype=dtype, device_map=split)
        output = model(features.cuda(), mask.cuda())
        assert len({parameter.device for parameter in model.parameters()}) == 2
        assert torch.equal(output.audio_codes.cpu(), expected.audio_codes.cpu())
        assert error(output.audio_values.cpu(), expected.audio_values.double().cpu()) < 1e-5
