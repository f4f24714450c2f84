"""The quantizer's training mode."""

from __future__ import annotations

import pytest
import torch
from golden import GOLDEN
from safetensors.torch import load_file, save_file

from mimo_audio_hf import MiMoAudioTokenizerConfig
from mimo_audio_hf.modeling_mimo_audio_tokenizer import (
    MiMoAudioTokenizerCodebook,
    MiMoAudioTokenizerResidualVectorQuantizer,
)


def test_upstreams_training_step():
    step = load_file(GOLDEN / "rvq_train_step.safetensors")
    config = MiMoAudioTokenizerConfig.from_pretrained(GOLDEN / "base", threshold_ema_dead_code=0)
    quantizer = MiMoAudioTokenizerResidualVectorQuantizer(config).train()
    before, after = (
        {key.removeprefix(f"{when}."): tensor for key, tensor in step.items() if key.startswith(when)}
        for when in ("before", "after")
    )
    quantizer.load_state_dict(before)
    features = step["input"].clone().requires_grad_()
    quantized, codes, loss = quantizer(features, 6, torch.float32)
    (quantized.square().mean() + loss).backward()

    assert torch.equal(codes.T, step["codes"].long())
    for actual, expected in (
        (quantized, step["quantized"]),
        (loss[None], step["commit_loss"]),
        (features.grad, step["input_grad_of_mean_square_plus_commit"]),
        *((tensor, after[key]) for key, tensor in quantizer.state_dict().items()),
    ):
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-5, atol=1e-6)


def clusters(generator: torch.Generator, centers: torch.Tensor, samples: int) -> torch.Tensor:
    chosen = torch.randint(len(centers), (samples,), generator=generator)
    return centers[chosen] + 0.01 * torch.randn(samples, centers.shape[1], generator=generator)


def test_kmeans_initialization_writes_means_counts_and_sums():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(500, 8, generator=generator)
    codebook = MiMoAudioTokenizerCodebook(16, 8, threshold_ema_dead_code=2)
    codebook.initialize(x)
    codes = codebook.nearest(x, codebook.embed)
    counts = torch.bincount(codes, minlength=16)
    assert codebook.inited.item() == 1
    assert torch.equal(codebook.cluster_size, counts.float())
    torch.testing.assert_close(codebook.embed_avg, codebook.embed * counts[:, None])
    # Lloyd's algorithm: 16 means explain far more of the data than 16 of its own points do.
    error = (x - codebook.embed[codes]).square().sum(-1).mean()
    points = x[:16]
    assert error < 0.8 * (x - points[codebook.nearest(x, points)]).square().sum(-1).mean()
    entries = codebook.embed.clone()
    codebook.initialize(x + 1)
    assert torch.equal(codebook.embed, entries)  # only once


def test_dead_entries_come_back():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = clusters(generator, torch.randn(4, 8, generator=generator), 200)
    codebook = MiMoAudioTokenizerCodebook(8, 8, threshold_ema_dead_code=2)
    codebook.embed.normal_(generator=generator)
    codebook.embed[5:] += 100  # nothing will ever choose these
    codebook.cluster_size.fill_(10)
    codebook.cluster_size[5:] = 1
    codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
    codebook.update(x, codebook.nearest(x, codebook.embed))
    for entry in range(5, 8):
        revived = codebook.embed[entry]
        assert (x == revived).all(-1).any()
        assert codebook.cluster_size[entry] == 2
        assert torch.equal(codebook.embed_avg[entry], 2 * revived)
    # They are chosen now, and the next step does not send them back to where they were.
    codes = codebook.nearest(x, codebook.embed)
    assert (torch.bincount(codes, minlength=8)[5:] > 0).all()
    codebook.update(x, codes)
    assert (torch.cdist(codebook.embed[5:], x).min(-1).values < 0.5).all()


def test_evaluation_mode_leaves_the_codebooks_alone():
    config = MiMoAudioTokenizerConfig.from_pretrained(GOLDEN / "base")
    quantizer = MiMoAudioTokenizerResidualVectorQuantizer(config).eval()
    for codebook in quantizer.codebooks:
        codebook.embed.normal_(generator=torch.Generator().manual_seed(0))
        codebook.embed_avg.copy_(codebook.embed)
    before = {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    x = torch.randn(50, 64)
    quantized, codes, loss = quantizer(x, 4, torch.float32)
    assert codes.shape == (50, 4)
    assert loss == 0
    assert torch.equal(quantized, quantizer.decode(codes, torch.float32))
    assert all(torch.equal(tensor, before[key]) for key, tensor in quantizer.state_dict().items())


def test_the_first_of_equal_entries_is_chosen():
    entries = torch.randn(4, 8).repeat(3, 1)
    x = torch.randn(100, 8)
    assert MiMoAudioTokenizerCodebook.nearest(x, entries).max() < 4


@pytest.mark.parametrize("num_quantizers", [1, 3, 6])
def test_codes_are_the_nearest_entries_in_float64(num_quantizers):
    quantizer = MiMoAudioTokenizerResidualVectorQuantizer(MiMoAudioTokenizerConfig.from_pretrained(GOLDEN / "base"))
    tensors = load_file(GOLDEN / "base" / "model.safetensors")
    prefix = "encoder.quantizer."
    quantizer.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    residual, expected = x.double(), []
    for codebook in quantizer.codebooks[:num_quantizers]:
        expected.append(torch.cdist(residual, codebook.embed.double()).argmin(-1))
        residual = residual - codebook.embed.double()[expected[-1]]
    codes = quantizer.encode(x, num_quantizers, torch.float32)
    assert torch.equal(codes, torch.stack(expected, -1))
    torch.testing.assert_close(
        quantizer.decode(codes, torch.float32).double(), x.double() - residual, rtol=0, atol=1e-5
    )


def train_step(rank: int, processes: int, folder: str) -> None:
    """One training step on this process's share of the batch; the state goes to a file."""
    if processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
        )
    config = MiMoAudioTokenizerConfig.from_pretrained(GOLDEN / "base", threshold_ema_dead_code=0)
    quantizer = MiMoAudioTokenizerResidualVectorQuantizer(config).train()
    step = load_file(GOLDEN / "rvq_train_step.safetensors")
    quantizer.load_state_dict({k.removeprefix("before."): t for k, t in step.items() if k.startswith("before.")})
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    quantizer(x.chunk(processes)[rank], 6, torch.float32)
    # Replaced entries and k-means start from random vectors: the first process's, in all of them.
    torch.manual_seed(rank)
    codebook = MiMoAudioTokenizerCodebook(32, 64, threshold_ema_dead_code=2)
    codebook.initialize(x.chunk(processes)[rank])
    codebook.update(x.chunk(processes)[rank][:40], codebook.nearest(x.chunk(processes)[rank][:40], codebook.embed))
    state = quantizer.state_dict() | {f"fresh.{k}": t for k, t in codebook.state_dict().items()}
    save_file(state, f"{folder}/{processes}-{rank}.safetensors")
    if processes > 1:
        # Or gloo's threads may still run when the process ends, which aborts it.
        torch.distributed.destroy_process_group()


def test_two_processes_on_half_batches_are_one_on_the_whole(tmp_path):
    train_step(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(train_step, args=(2, str(tmp_path)), nprocs=2)
    whole, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
        if not key.startswith("fresh."):
            torch.testing.assert_close(tensor, whole[key], msg=key)
