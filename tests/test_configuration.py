from __future__ import annotations

import pytest
from golden import GOLDEN
from transformers import AutoConfig

from mimo_audio_hf import MiMoAudioTokenizerConfig


def test_derived_rates():
    config = MiMoAudioTokenizerConfig()
    assert config.frame_rate == 25
    assert config.samples_per_frame == 960
    assert config.bitrate(8) == 1550  # the report's 1.55 kbps
    assert config.bitrate() == 25 * (2 * 10 + 18 * 7)
    with pytest.raises(ValueError, match="num_quantizers=21"):
        config.bitrate(21)


@pytest.mark.parametrize(
    ("codebook_size", "expected"), [([8, 4], [8, 4, 4, 4]), ([8, 4, 2, 2, 1], [8, 4, 2, 2]), (16, [16] * 4)]
)
def test_codebook_sizes(codebook_size, expected):
    assert MiMoAudioTokenizerConfig(num_quantizers=4, codebook_size=codebook_size).codebook_sizes == expected


def test_saved_configuration_is_found_by_auto_config(tmp_path):
    config = MiMoAudioTokenizerConfig.from_pretrained(GOLDEN / "causal_hybrid_encoder")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MiMoAudioTokenizerConfig
    assert loaded.to_json_string() == config.to_json_string()
    assert (loaded.hidden_size, loaded.num_hidden_layers) == (config.d_model, config.encoder_layers)
