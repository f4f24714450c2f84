"""The decoder's kernels against the plain modules in float64 or float32."""

from __future__ import annotations

import pytest
import torch
from kernel_device import needs_gpu

from mimo_audio_hf import MiMoAudioTokenizerConfig, load_model
from mimo_audio_hf import modeling_mimo_audio_tokenizer as modeling


pytestmark = [pytest.mark.gpu, needs_gpu]
pytest.importorskip("triton")
from mimo_audio_hf import vocoder_kernels  # noqa: E402 (which imports Triton)


DEVICE, DTYPE = "cuda", torch.bfloat16
LENGTHS = [1, 7, 1300, 64]


@torch.no_grad()
@pytest.mark.parametrize("dim", [48, 1280])
def test_group_norm(dim):
    sequences = modeling.PackedSequences.from_lengths(LENGTHS, DEVICE)
    torch.manual_seed(0)
    # With means of clips, and of rows, that are large beside the deviation.
    means = torch.randn(len(LENGTHS), 1, device=DEVICE)[sequences.sequence_ids] * 10
    states = (torch.randn(sequences.total, dim, device=DEVICE) + means).to(DTYPE)
    norm = modeling.PackedGroupNorm(1, dim, device=DEVICE).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    output = vocoder_kernels.group_norm(states, sequences, norm.weight, norm.bias, norm.eps)
    expected = [
        torch.nn.functional.group_norm(clip.double().t()[None], 1, norm.weight.double(), norm.bias.double(), norm.eps)
        for clip in states.split(LENGTHS)
    ]
    error = output.double() - torch.cat([clip[0].t() for clip in expected])
    # Rounded once, to 2**-8 of themselves; of a clip of one row no other has a part in the mean.
    assert error.abs().max() < 2**-8 * torch.cat([clip.flatten() for clip in expected]).abs().max()
    nothing = modeling.PackedSequences.from_tensor(torch.tensor([0, 5, 0], device=DEVICE), 5, 5)
    assert vocoder_kernels.group_norm(states[:5], nothing, norm.weight, norm.bias, norm.eps).isfinite().all()


@torch.no_grad()
def test_synthesis():
    config = MiMoAudioTokenizerConfig()
    model = load_model("tiny", device=DEVICE)
    head = model.decoder.vocoder.head
    assert (head.istft.n_fft, head.istft.block) == (config.nfft, 120)
    layout = model.decoder_layout([1, 2, 30], DEVICE)
    torch.manual_seed(0)
    hidden_states = torch.randn(layout.mel.total, model.config.vocoder_dim, device=DEVICE)
    head.out.bias[:481] = torch.linspace(-3, 6, 481)  # some magnitudes beyond the limit
    expected = head(hidden_states, layout)
    head.optimized = vocoder_kernels.synthesize
    output = head(hidden_states, layout)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
