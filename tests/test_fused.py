"""The fused kernels against PyTorch in float64, and the fused layers against the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden

from mimo_audio_hf import modeling_mimo_audio_tokenizer as modeling


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="these tests need a CUDA GPU"),
]
fused = pytest.importorskip("mimo_audio_hf.fused")
DEVICE, DTYPE = "cuda", torch.bfloat16


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator)


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
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))


def test_add_norm_limits_without_a_gradient():
    large = torch.full((3, 64), 60000.0, device=DEVICE, dtype=torch.float16)
    ones = torch.ones(64, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        summed, normed = fused.add_norm(large, large, ones, ones, 1e-5)
    assert (summed == torch.finfo(torch.float16).max - 1000).all() and normed.isfinite().all()


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


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window"),
    [(20, 64, (-1, -1)), (20, 64, (-1, 0)), (3, 32, (40, 10)), (2, 32, (128, 0)), (2, 64, (100, -1))],
)
def test_rotary_attention(heads, head_dim, window, apart):
    sequences = modeling.PackedSequences.from_lengths([1, 7, 130, 64, 128, 300, 1400], DEVICE)
    dim = heads * head_dim
    states = draw(sequences.total, 3 * dim).split(dim, dim=1)
    if not apart:
        states = [tensor.contiguous() for tensor in states]
    embeddings = modeling._rotary_embedding(sequences.position_ids, head_dim, 10000.0, DTYPE, DTYPE)
    with torch.no_grad():
        output = fused.rotary_attention(*states, embeddings, sequences.cu_seqlens, sequences.max_seqlen, heads, window)
        query, key, value = (tensor.unflatten(1, (heads, head_dim)).double() for tensor in states)
        query, key = modeling.apply_rotary(query, key, *(tensor.double() for tensor in embeddings))
        expected = modeling.eager_attention_forward(
            query,
            key,
            value,
            attention_mask=modeling.padded_mask(sequences, window),
            scaling=head_dim**-0.5,
            sequences=sequences,
            window=window,
        )
    # Queries, keys, weights and outputs are each rounded to 2**-9.
    assert error(output, expected.flatten(1)) < 6e-3


@pytest.mark.parametrize("name", ["base", "no_skip_windowed"])
def test_fused_layers(name):
    model = load_golden(name).to(DEVICE, DTYPE)
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
        states = draw(sequences.total, len(stack.layer_norm.weight))
        gradient = draw(*states.shape, seed=1)
        results = []
        for backend in (with_fused, plain):
            stack.zero_grad()
            leaf = states.clone().requires_grad_()
            output = stack.run_layers(leaf, sequences, backend, None, skip)
            output.backward(gradient)
            weights = torch.cat([p.grad.flatten() for p in stack.layers.parameters() if p.grad is not None])
            with torch.no_grad():
                unchanged = stack.run_layers(states, sequences, backend, None, skip)
            results.append((output, unchanged, leaf.grad, weights))
        for actual, expected in zip(*results, strict=True):
            assert F.cosine_similarity(actual.flatten().float(), expected.flatten().float(), dim=0) > 0.999


def test_what_cannot_be_fused_is_not():
    stack = load_golden("base").encoder
    assert fused.can_fuse(stack)
    handle = stack.layers[1].fc1.register_forward_hook(lambda module, args, output: None)
    assert not fused.can_fuse(stack)
    handle.remove()
    assert fused.can_fuse(stack)
    stack.layers[1].fc1 = torch.nn.Sequential(stack.layers[1].fc1)
    assert not fused.can_fuse(stack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_search(dtype):
    quantizer = load_golden("base").to(DEVICE, dtype).encoder.quantizer
    books = [codebook.entries(dtype) for codebook in quantizer.codebooks]
    features = torch.randn(999, books[0].shape[1], device=DEVICE).to(dtype)
    search = fused.ResidualSearch(books, dtype)
    for count in (len(books), 1):
        expected = quantizer.encode(features, count, dtype)
        # Where two entries are equally near but for float32's rounding, either may be chosen.
        assert (search(features, count) == expected).float().mean() > 0.999
