"""The fused kernels against PyTorch in float64, and the fused layers against the plain ones.

With TRITON_INTERPRET=1 some of them run without a GPU, too.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from kernel_device import DEVICE, INTERPRETED, needs_gpu, needs_kernels

from mimo_audio_hf import MiMoAudioTokenizerConfig, load_model
from mimo_audio_hf import modeling_mimo_audio_tokenizer as modeling
from mimo_audio_hf.quantization import quantize, round_rows


pytestmark = [pytest.mark.gpu, needs_kernels]
pytest.importorskip("triton")
from mimo_audio_hf import attention_kernels, fused, product_kernels  # noqa: E402 (which import Triton)


DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
LENGTHS = [1, 7, 130, 64] if INTERPRETED else [1, 7, 130, 64, 128, 300, 1400]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator)


@needs_gpu
@pytest.mark.parametrize(("rows", "dim"), [(7, 40), (1100, 256), (1031, 1280)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_add_norm(rows, dim, has_bias):
    inputs = [draw(rows, dim), draw(rows, dim, seed=1), draw(dim, seed=2), draw(dim, seed=3), draw(dim, seed=4)]
    gradients = [draw(rows, dim, seed=5), draw(rows, dim, seed=6)]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    references = [tensor.double().requires_grad_() for tensor in inputs]
    hidden, update, weight, shift, bias = ours
    outputs = fused.add_norm(hidden, update, weight, shift, 1e-5, bias if has_bias else None)
    torch.autograd.backward(outputs, gradients)
    hidden, update, weight, shift, bias = references
    summed = hidden + update + (bias if has_bias else 0)
    expected = summed, F.layer_norm(summed, (dim,), weight, shift, 1e-5)
    torch.autograd.backward(expected, [gradient.double() for gradient in gradients])
    # Inputs are exact; sums are rounded once, and norms are of rounded sums.
    for actual, reference in zip(outputs, expected, strict=True):
        assert error(actual, reference) < 4e-3
    for tensor, reference in zip(ours, references, strict=True):
        assert (tensor.grad is None) == (reference.grad is None)
        assert tensor.grad is None or error(tensor.grad, reference.grad) < 6e-3
    with torch.no_grad():
        again = fused.add_norm(*inputs[:4], 1e-5, inputs[4] if has_bias else None)
        normed = fused.norm(again[0], inputs[4], *inputs[2:4], 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
    expected = again[0].double() + inputs[4].double()
    assert error(normed, F.layer_norm(expected, (dim,), *(tensor.double() for tensor in inputs[2:4]), 1e-5)) < 4e-3


@needs_gpu
@pytest.mark.parametrize("differentiated", [True, False])
def test_float16_sums_are_limited(differentiated):
    large = torch.full((3, 64), 60000.0, device=DEVICE, dtype=torch.float16, requires_grad=differentiated)
    ones = torch.ones(64, device=DEVICE, dtype=torch.float16)
    for bias in (ones, None):
        summed, normed = fused.add_norm(large, large, ones, ones, 1e-5, bias)
        assert (summed == torch.finfo(torch.float16).max - 1000).all() and normed.isfinite().all()
        assert summed.requires_grad == differentiated


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_stays_in_its_row(dtype):
    hidden, update, weight, shift = (draw(5, 64, seed=seed).to(dtype) for seed in range(4))
    hidden[2, 7] = torch.nan
    summed, normed = fused.add_norm(hidden, update, weight[0], shift[0], 1e-5)
    expected = torch.zeros(5, 64, dtype=torch.bool, device=DEVICE)
    expected[2] = True
    assert torch.equal(normed.isnan(), expected)
    assert torch.equal(summed.isnan(), hidden.isnan())
    assert torch.equal(fused.gelu_(hidden.clone()).isnan(), hidden.isnan())


@needs_gpu
def test_inputs_of_other_strides():
    hidden, update, weight, shift = draw(64, 64).t(), draw(64, 64, seed=1), draw(64, seed=2), draw(64, seed=3)
    with torch.no_grad():
        summed, normed = fused.add_norm(hidden, update, weight, shift, 1e-5)
    expected = hidden.double() + update.double()
    assert error(summed, expected) < 3e-3
    expected = F.layer_norm(expected, (64,), weight.double(), shift.double())
    assert error(normed, expected) < 6e-3
    assert error(fused.bias_gelu(hidden, weight), F.gelu(hidden.double() + weight.double())) < 3e-3


@needs_gpu
@pytest.mark.parametrize(("rows", "dim"), [(5, 40), (700, 300), (1031, 5120)])
def test_bias_gelu(rows, dim):
    states, bias, gradient = draw(rows, dim), draw(dim, seed=1), draw(rows, dim, seed=2)
    ours = [tensor.clone().requires_grad_() for tensor in (states, bias)]
    output = fused.bias_gelu(*ours)
    output.backward(gradient)
    references = [tensor.double().requires_grad_() for tensor in (states, bias)]
    expected = F.gelu(sum(references))
    expected.backward(gradient.double())
    assert error(output, expected) < 3e-3
    for tensor, reference in zip(ours, references, strict=True):
        assert error(tensor.grad, reference.grad) < 3e-3
    assert error(fused.gelu_(states.clone()), F.gelu(states.double())) < 3e-3


@needs_gpu
def test_gelu_of_all_sizes():
    states = torch.linspace(-8, 8, 4801, device=DEVICE, dtype=torch.float32)[:, None]
    expected = F.gelu(states.double())
    # Of the negative tail, where x * (1 + erf) cancels, the sum of powers has the digits.
    expected = torch.where(states < 0, 0.5 * states.double() * torch.special.erfc(-states.double() / 2**0.5), expected)
    output = fused.gelu_(states.clone())
    assert ((output - expected).abs() <= 1e-5 * expected.abs()).all()
    limits = torch.tensor([[float("inf")], [float("nan")], [1e30], [-1e30], [0.0], [-60.0]], device=DEVICE)
    output = fused.gelu_(limits.clone()).flatten()
    assert output[0] == float("inf") and output[1].isnan() and output[2] == limits[2]
    assert (output[3:] == 0).all()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window"),
    [
        (20, 64, (-1, -1)),
        (20, 64, (-1, 0)),
        (3, 32, (40, 10)),
        (2, 32, (128, 0)),
        (2, 64, (100, -1)),
        (4, 16, (-1, 0)),
    ],
)
def test_rotary_attention(heads, head_dim, window, apart):
    sequences = modeling.PackedSequences.from_lengths(LENGTHS, DEVICE)
    dim = heads * head_dim
    states = draw(sequences.total, 3 * dim).split(dim, dim=1)
    if not apart:
        states = [tensor.contiguous() for tensor in states]
    embeddings = modeling.rotary_embedding(sequences.position_ids, head_dim, 10000.0, DTYPE, DTYPE)
    with torch.no_grad():
        query, key, value = (tensor.unflatten(1, (heads, head_dim)).double() for tensor in states)
        places = sequences.cu_seqlens, sequences.max_seqlen
        output = attention_kernels.rotary_attention_(*states, embeddings, *places, heads, 0.1, window)
        query, key = modeling.apply_rotary(query, key, *(tensor.double() for tensor in embeddings))
        expected = modeling.eager_attention_forward(
            query,
            key,
            value,
            attention_mask=modeling.padded_mask(sequences, window),
            scaling=0.1,
            sequences=sequences,
            window=window,
        )
    # Queries, keys, weights and outputs are each rounded to 2**-9.
    assert error(output, expected.flatten(1)) < 6e-3


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("heads", "head_dim", "window"), [(16, 16, (40, 10)), (2, 32, (0, 0)), (3, 64, (128, 64))])
@torch.no_grad()
def test_banded_rotary_attention(heads, head_dim, window, apart):
    sequences = modeling.PackedSequences.from_lengths(LENGTHS, DEVICE)
    dim = heads * head_dim
    states = draw(sequences.total, 3 * dim).split(dim, dim=1)
    if not apart:
        states = [tensor.contiguous() for tensor in states]
    embeddings = modeling.rotary_embedding(sequences.position_ids, head_dim, 10000.0, DTYPE, DTYPE)
    assert attention_kernels.takes_band(window, head_dim)
    output = attention_kernels.banded_rotary_attention(*states, embeddings, sequences, heads, 0.1, window)
    query, key, value = (tensor.unflatten(1, (heads, head_dim)).double() for tensor in states)
    query, key = modeling.apply_rotary(query, key, *(tensor.double() for tensor in embeddings))
    mask = modeling.padded_mask(sequences, window)
    expected = modeling.eager_attention_forward(query, key, value, mask, 0.1, sequences, window)
    assert error(output, expected.flatten(1)) < 6e-3


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize(("rows", "dim"), [(7, 48), (1031, 1280)])
def test_rows_rounded_to_8_bits(rows, dim):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with 8-bit floats")
    inputs = [draw(rows, dim, seed=seed) for seed in range(4)]
    hidden, update, weight, shift = inputs[0], inputs[1], inputs[2][0], inputs[3][0]
    hidden[3] = update[3] = shift[:] = 0
    plain = fused.add_norm(hidden, update, weight, shift, 1e-5)
    summed, rounded = fused.add_norm_rounded(hidden, update, weight, shift, 1e-5, torch.float8_e4m3fn)
    assert torch.equal(summed, plain[0])
    widened = fused.gelu_rounded(hidden, torch.float8_e4m3fn)
    for (actual, scale), states in ((rounded, plain[1]), (widened, fused.gelu_(hidden.clone()))):
        expected, expected_scale = round_rows(states, torch.float8_e4m3fn)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        # A quotient may be rounded to the other side; no more than a step of four bits.
        assert (actual.float() != expected.float()).float().mean() < 1e-3
        torch.testing.assert_close(actual.float(), expected.float(), rtol=0.13, atol=2**-9)


@torch.no_grad()
@pytest.mark.parametrize("num_quantizers", [1, 3, 5, 6, 11])
def test_residual_search(num_quantizers):
    sizes = (1024, 1024, 128, 100, 3, 200, 7, 16, 130, 64, 5)
    books = [draw(size, 128, seed=seed) for seed, size in enumerate(sizes)]
    features = draw(100 if INTERPRETED else 500, 128, seed=99)
    search = fused.ResidualSearch([book.float() for book in books], DTYPE)
    codes = search.encode(features, num_quantizers)
    residual = features.double()
    expected = []
    for book in books[:num_quantizers]:
        expected.append(torch.cdist(residual, book.double()).argmin(-1))
        residual = residual - book.double()[expected[-1]]
    # Another entry is chosen only where two are as near as float32 can tell; then the next books' differ as well.
    assert (codes != torch.stack(expected, dim=1)).any(1).float().mean() < 0.01
    summed = sum(book.double()[column] for book, column in zip(books, codes.t(), strict=False))
    assert error(search.decode(codes), summed) < 4e-3


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize(("depth", "dim"), [(256, 256), (1024, 256), (64, 16)])
def test_products_with_what_follows(rows, depth, dim):
    states, weight, bias = draw(rows, depth), draw(dim, depth, seed=1) / depth**0.5, draw(dim, seed=2)
    expected = F.linear(*(tensor.double() for tensor in (states, weight, bias)))
    assert product_kernels.takes_product(depth, dim, is_row=True)
    assert error(product_kernels.product_gelu(states, weight, bias), F.gelu(expected)) < 4e-3
    hidden, scale, shift = draw(rows, dim, seed=3), draw(dim, seed=4), draw(dim, seed=5)
    expected += hidden.double()
    normed = product_kernels.product_add_norm_(hidden, states, weight, bias, scale, shift, 1e-5, 1e30)
    assert error(hidden, expected) < 4e-3
    assert error(normed, F.layer_norm(expected, (dim,), scale.double(), shift.double(), 1e-5)) < 6e-3


@needs_gpu
@pytest.mark.parametrize(
    ("depth", "dim", "is_row", "taken"),
    [
        (256, 1024, False, True),
        (256, 1024, True, False),
        (1280, 5120, False, False),
        (100, 256, True, False),
        (256, 48, True, False),
    ],
)
def test_which_products_are_taken(depth, dim, is_row, taken):
    assert product_kernels.takes_product(depth, dim, is_row) is taken


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("skip", [None, 2])
@pytest.mark.parametrize("quantized", [False, True])
def test_prepared_layers(skip, quantized):
    if quantized and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with 8-bit floats")
    torch.manual_seed(0)
    # Wide enough that biases are summed.
    sizes = {"d_model": 320, "encoder_attention_heads": 5, "encoder_ffn_dim": 640, "encoder_layers": 3}
    config = MiMoAudioTokenizerConfig(**sizes, encoder_skip_layer_id=skip, has_decoder=False)
    model = modeling.MiMoAudioTokenizerModel(config).to(DEVICE, DTYPE).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    if quantized:
        quantize(model, "fp8")
    stack = model.encoder
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = draw(50, config.d_model)
    sequences = modeling.PackedSequences.from_lengths([20, 30], DEVICE)
    backend = modeling.ATTENTION_BACKENDS["triton_varlen"]
    before = stack.run_layers(states.clone(), sequences, backend._replace(run_layers=None), None, skip)
    fused.prepare(stack, skip)
    assert stack.optimized.is_of(stack) and (stack.optimized.lacking_at_skip is None) == (skip is None)
    assert all(layer.self_attn.optimized.are_those_of(layer.self_attn) for layer in stack.layers)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    after = stack.run_layers(states.clone(), sequences, backend, None, skip)
    assert error(after, before.double()) < (0.1 if quantized else 2e-2)
    copied = deepcopy(stack)
    assert not copied.layers[0].self_attn.optimized.are_those_of(copied.layers[0].self_attn)
    assert not copied.optimized.is_of(copied) and fused.can_fuse(copied)


@needs_gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("base", DTYPE), ("no_skip_windowed", DTYPE), ("tiny", DTYPE), ("tiny", torch.float16)],
)
def test_fused_layers(name, dtype):
    # The golden models' heads are too small for our attention, the tiny one's are not.
    model = load_model("tiny", device="cpu") if name == "tiny" else load_golden(name)
    model = model.to(DEVICE, dtype)
    with_fused = modeling.ATTENTION_BACKENDS["triton_varlen"]
    plain = with_fused._replace(run_layers=None)
    sequences = modeling.PackedSequences.from_lengths([1, 7, 170, 33], DEVICE)
    stacks = [
        (model.encoder, model.config.encoder_skip_layer_id),
        (model.decoder, None),
        (model.decoder.vocoder, None),
    ]
    for stack, skip in stacks:
        assert fused.can_fuse(stack)
        states = draw(sequences.total, len(stack.layer_norm.weight)).to(dtype)
        gradient = draw(*states.shape, seed=1).to(dtype)
        results = []
        for backend in (with_fused, plain):
            stack.zero_grad()
            leaf = states.clone().requires_grad_()
            output = stack.run_layers(leaf, sequences, backend, None, skip)
            output.backward(gradient)
            weights = torch.cat([p.grad.flatten() for p in stack.layers.parameters() if p.grad is not None])
            with torch.no_grad():
                unchanged = stack.run_layers(states.clone(), sequences, backend, None, skip)
            results.append((output, unchanged, leaf.grad, weights))
        for actual, expected in zip(*results, strict=True):
            assert F.cosine_similarity(actual.flatten().float(), expected.flatten().float(), dim=0) > 0.999
