"""What transformers' common model tests ask of a model, in this project's own words.

Not applicable here: input embeddings (there are none); buffers that `_init_weights` must reproduce exactly (fresh
codebooks are random); loading a checkpoint with missing tensors (an error, by contract); gradients of the returned
hidden states (they are padded copies of packed tensors).
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from golden import CHECKPOINTS, GOLDEN, expected_clips, load_golden, pad_features, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel
from mimo_audio_hf import modeling_mimo_audio_tokenizer as modeling
from mimo_audio_hf.modeling_mimo_audio_tokenizer import (
    BAND_BLOCK,
    PackedSequences,
    banded_mask,
    padded_mask,
    rotary_embedding,
)


@pytest.fixture
def config() -> MiMoAudioTokenizerConfig:
    return MiMoAudioTokenizerConfig.from_pretrained(GOLDEN / "base")


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    features, mask = pad_features([clip["mel"] for clip in expected_clips("base")[3:6]])
    return {"input_features": features, "attention_mask": mask}


def released_shapes() -> dict[str, list[int]]:
    return json.loads((GOLDEN / "released_state_dict_shapes.json").read_text())


# --- checkpoints ---


def test_released_configuration_has_the_released_keys_and_shapes():
    config = MiMoAudioTokenizerConfig.from_pretrained(GOLDEN / "released_config.json")
    assert config.to_dict() == MiMoAudioTokenizerConfig().to_dict()  # the defaults are the released model
    with torch.device("meta"):
        model = MiMoAudioTokenizerModel(config)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == released_shapes()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_284_653_122


def test_saving_gives_upstreams_keys(tmp_path):
    load_golden("base").save_pretrained(tmp_path)
    original, saved = (load_file(folder / "model.safetensors") for folder in (GOLDEN / "base", tmp_path))
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[key], saved[key]) for key in original)
    again = MiMoAudioTokenizerModel.from_pretrained(tmp_path)
    for key, value in json.loads((GOLDEN / "base" / "config.json").read_text()).items():
        assert getattr(again.config, key) == value


def test_sharded_checkpoint(tmp_path):
    model = load_golden("base")
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = MiMoAudioTokenizerModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def edited_checkpoint(folder, edit) -> None:
    tensors = load_file(GOLDEN / "base" / "model.safetensors")
    edit(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((GOLDEN / "base" / "config.json").read_text())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("encoder.conv1.bias"), "missing tensor encoder.conv1.bias"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensor extra"),
        (
            lambda t: t.update({"decoder.layer_norm.weight": torch.zeros(3)}),
            r"decoder.layer_norm.weight has shape \(3,\) instead of \(64,\)",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "decoder.vocoder" in k], "missing tensor decoder.vocoder"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_its_tensors(tmp_path, edit, message):
    edited_checkpoint(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        MiMoAudioTokenizerModel.from_pretrained(tmp_path)


def test_a_pickle_is_refused(tmp_path):
    load_golden("base").config.save_pretrained(tmp_path)
    torch.save(load_golden("base").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        MiMoAudioTokenizerModel.from_pretrained(tmp_path)


def test_encoder_only_checkpoint(tmp_path):
    """MiMo-V2: in a folder of a language model's repository, without decoder, beside tensors of something else."""

    def edit(tensors):
        for key in [key for key in tensors if key.startswith("decoder.")]:
            del tensors[key]
        tensors["speech_embeddings.0.weight"] = torch.zeros(2, 2)

    edited_checkpoint(tmp_path / "audio_tokenizer", edit)
    model = MiMoAudioTokenizerModel.from_pretrained(tmp_path, subfolder="audio_tokenizer").eval()
    assert not model.config.has_decoder
    clip = expected_clips("base")[4]
    codes = model.encode(clip["mel"][None]).audio_codes
    assert torch.equal(codes[0].T, clip["codes"].long())
    with pytest.raises(ValueError, match="holds an encoder only"):
        model.decode(codes)
    with pytest.raises(ValueError, match="holds an encoder only"):
        model(clip["mel"][None])
    model.save_pretrained(tmp_path / "again")
    again = MiMoAudioTokenizerModel.from_pretrained(tmp_path / "again")
    assert again.decoder is None
    assert torch.equal(again.encode(clip["mel"][None]).audio_codes, codes)


def test_encoder_only_checkpoint_with_a_missing_encoder_tensor(tmp_path):
    def edit(tensors):
        for key in [key for key in tensors if key.startswith("decoder.") or key == "encoder.conv2.weight"]:
            del tensors[key]

    edited_checkpoint(tmp_path, edit)
    with pytest.raises(ValueError, match="missing tensor encoder.conv2.weight"):
        MiMoAudioTokenizerModel.from_pretrained(tmp_path)


# --- precision ---


def test_a_bfloat16_model_is_the_same_however_it_came_to_be(inputs):
    loaded = load_golden("base", dtype=torch.bfloat16)
    cast = load_golden("base").bfloat16()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), cast.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        a, b = (model(**inputs, output_latents=True) for model in (loaded, cast))
    assert a.latents.dtype == torch.bfloat16
    assert a.audio_values.dtype == torch.float32
    assert torch.equal(a.latents, b.latents)
    assert torch.equal(a.audio_values, b.audio_values)


def test_bfloat16_rounds_codebooks_and_rope_frequencies_and_not_the_window():
    """The three roundings that decide upstream's codes, done by hand to a float32 model."""
    mel = torch.randn(1, 128, 400, generator=torch.Generator().manual_seed(0))
    model = load_golden("base").bfloat16()
    reference = load_golden("base").bfloat16().float()  # rounded weights and codebooks, exact frequencies
    output = model.encode(mel, output_latents=True)
    rounded = reference.encoder.quantizer.encode(output.latents[0], 6, torch.float32)
    assert torch.equal(output.audio_codes[0].T, rounded)

    exact = load_golden("base").encoder.quantizer
    vectors = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        exact.encode(vectors, 6, torch.bfloat16), model.encoder.quantizer.encode(vectors, 6, torch.bfloat16)
    )
    assert not torch.equal(exact.encode(vectors, 6, torch.bfloat16), exact.encode(vectors, 6, torch.float32))

    position = torch.tensor([1499])
    rounded = (1 / 10000 ** (torch.arange(0, 64, 2).float() / 64)).bfloat16().float()
    expected = (1499 * rounded).cos()
    cos, _ = rotary_embedding(position, 64, 10000, torch.bfloat16, torch.float32)
    assert torch.equal(cos[0, 0], expected)
    exact_cos, _ = rotary_embedding(position, 64, 10000, torch.float32, torch.float32)
    assert (exact_cos - cos).abs().max() > 0.1

    # A constant spectrum through a bfloat16 head gives what the float32 window gives.
    layout = model.decoder_layout([3])
    spectrum = torch.ones(12, 481, dtype=torch.complex64)
    istft = model.decoder.vocoder.head.istft
    assert istft.window.dtype == torch.bfloat16
    float_istft = reference.decoder.vocoder.head.istft
    assert torch.equal(istft(spectrum, layout), float_istft(spectrum, layout))


def test_half_precision_overflow_is_clamped():
    model = load_golden("base").half()
    layer = model.encoder.layers[0]
    torch.nn.init.constant_(layer.fc2.bias, 65000.0)
    torch.nn.init.constant_(layer.self_attn.out_proj.bias, 65000.0)
    layout = model.encoder_layout([40])
    captured = []
    layer.register_forward_hook(lambda module, args, output: captured.append(output))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            model.encode(torch.randn(40, 128), layout=layout)
    for output in captured:
        assert output.isfinite().all()
        assert output.max() == torch.finfo(torch.float16).max - 1000


# --- attention ---


def test_attention_backends_agree_and_can_be_chosen(inputs):
    eager = load_golden("no_skip_windowed", attn_implementation="eager")
    sdpa = load_golden("no_skip_windowed")
    assert (eager.attn_implementation, sdpa.attn_implementation) == ("eager", "sdpa")
    with torch.no_grad():
        a, b = (model(**inputs, output_latents=True) for model in (eager, sdpa))
        sdpa.set_attn_implementation("eager")
        c = sdpa(**inputs, output_latents=True)
    assert sdpa.attn_implementation == "eager"
    assert torch.equal(a.audio_codes, b.audio_codes)
    assert relative_error(b.audio_values, a.audio_values) < 1e-5
    assert torch.equal(a.audio_values, c.audio_values)


@pytest.mark.parametrize("name", ["torch_varlen", "flash_attention_2", "flex_attention", "nonsense"])
def test_an_attention_backend_that_cannot_run_here_is_one_clear_error(name):
    with pytest.raises((ValueError, ImportError), match=name if name != "flash_attention_2" else "(?i)flash"):
        load_golden("base", attn_implementation=name).encode(torch.randn(1, 128, 20))


def test_flash_attention_gets_the_windows(monkeypatch, inputs):
    """The flash-attn call, against a stand-in with that package's documented meaning of its arguments."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        left, right = window_size[0], 0 if causal else window_size[1]
        outputs = []
        for start, end in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True):
            queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
            i = torch.arange(int(end - start))
            distance = i - i[:, None]
            seen = ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))
            scores = (queries @ keys.transpose(1, 2) * softmax_scale).masked_fill(~seen, -torch.inf)
            outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(modeling, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    backend = modeling.ATTENTION_BACKENDS["flash_attention_2"]
    monkeypatch.setattr(MiMoAudioTokenizerModel, "attention_backend", lambda self, device: backend)
    for name in CHECKPOINTS:
        clips = expected_clips(name)
        model = load_golden(name)
        output = model.encode(*pad_features([clip["mel"] for clip in clips]))
        for index, clip in enumerate(clips):
            assert torch.equal(output.audio_codes[index, :, : len(clip["codes"])].T, clip["codes"].long())
            if "audio" in clip:
                audio = model.decode(clip["codes"].T[None]).audio_values[0, 0]
                assert relative_error(audio, clip["audio"]) < 1e-5


@pytest.mark.parametrize("window", [(40, 10), (5, 0), (0, 3), (200, 100)])
def test_banded_mask_is_the_padded_mask_without_what_is_never_seen(window):
    sequences = PackedSequences.from_lengths([1, 300, 7, BAND_BLOCK, 129])
    band = banded_mask(sequences, window)
    seen = torch.zeros(sequences.total, sequences.total, dtype=torch.bool)
    for block in range(len(band.key_index)):
        for query in range(BAND_BLOCK):
            row = block * BAND_BLOCK + query
            if row < sequences.total:
                seen[row, band.key_index[block][band.mask[block, 0, query]]] = True
    padded = padded_mask(sequences, window)[:, 0]
    for clip, (start, end) in enumerate(zip(sequences.cu_seqlens[:-1], sequences.cu_seqlens[1:], strict=True)):
        length = end - start
        assert torch.equal(seen[start:end, start:end], padded[clip, :length, :length])
        seen[start:end, start:end] = False
    assert not seen.any()


# --- training ---


def test_training_step_reaches_every_parameter(config, inputs):
    torch.manual_seed(0)
    model = MiMoAudioTokenizerModel(config).train()
    before = copy.deepcopy(model.state_dict())
    output = model(**inputs)
    assert torch.equal(output.loss, output.commitment_loss + output.reconstruction_loss)
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved
    assert all("_codebook" in name for name in moved)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(inputs, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = load_golden("base").train()
        model.encoder.quantizer.eval()  # its codebooks would move, and be others the second time
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_freeze_lasts_when_a_surrounding_model_trains(inputs):
    class AudioLanguageModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokenizer = load_golden("base").freeze()
            self.embedding = torch.nn.Embedding(64, 8)

    outer = AudioLanguageModel().train()
    assert outer.training
    assert not any(module.training for module in outer.tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in outer.tokenizer.parameters())
    before = copy.deepcopy(outer.tokenizer.state_dict())
    codes = outer.tokenizer.encode(**inputs).audio_codes
    outer.embedding(codes[:, 0]).sum().backward()
    outer.tokenizer(**inputs)
    assert all(torch.equal(tensor, before[key]) for key, tensor in outer.tokenizer.state_dict().items())


def test_latents_carry_gradient(inputs):
    model = load_golden("base")
    features = inputs["input_features"].nan_to_num().requires_grad_()
    model.encode(features, inputs["attention_mask"], output_latents=True).latents.sum().backward()
    assert features.grad.abs().sum() > 0
    assert not features.grad[inputs["attention_mask"][:, None].expand_as(features) == 0].any()


# --- outputs, devices, compilation ---


@torch.no_grad()
def test_hidden_states(config, inputs):
    model = load_golden("base")
    output = model(**inputs, output_hidden_states=True)
    frames = (inputs["attention_mask"].sum(1) - 1) // 2 + 1
    assert len(output.hidden_states) == config.encoder_layers + 1
    assert len(output.decoder_hidden_states) == config.decoder_layers + 1
    for states in output.hidden_states:
        assert states.shape == (3, frames.max(), config.d_model)
    # The first layer, run on the first hidden state of one clip, gives the second.
    alone = model.encode(inputs["input_features"][:1, :, :37], output_hidden_states=True)
    for mine, batched in zip(alone.hidden_states, output.hidden_states, strict=True):
        assert relative_error(batched[:1, : mine.shape[1]], mine) < 1e-5
    assert model.encode(**inputs).hidden_states is None


@torch.no_grad()
def test_tuple_output(inputs):
    model = load_golden("base")
    as_tuple = model(**inputs, return_dict=False)
    as_dict = model(**inputs)
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, as_dict.to_tuple(), strict=True))


@torch.no_grad()
def test_audio_codes_mask_of_an_attention_mask():
    model = load_golden("base")
    for frames in range(1, 30):
        mask = torch.zeros(2, 30, dtype=torch.long)
        mask[0, :frames] = mask[1] = 1
        output = model.encode(torch.randn(2, 128, 30), mask)
        assert torch.equal(model.get_audio_codes_mask(mask), output.audio_codes_mask)
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.float32):
        mask = (torch.arange(800) < torch.tensor([[800], [700]])).to(dtype)
        codes_mask = model.get_audio_codes_mask(mask)
        assert codes_mask.dtype == dtype
        assert codes_mask.shape == (2, 200)
        assert codes_mask.float().sum(1).tolist() == [200, 175]


@torch.no_grad()
def test_device_map(inputs):
    expected = load_golden("base")(**inputs)
    for device_map in ("auto", {"": "cpu"}, "cpu"):
        output = load_golden("base", device_map=device_map)(**inputs)
        assert torch.equal(output.audio_codes, expected.audio_codes)
        assert torch.equal(output.audio_values, expected.audio_values)


@torch.no_grad()
def test_disk_offload(tmp_path, inputs):
    """Layers that accelerate loads when they are called, one by one."""
    model = load_golden("base")
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    for number, device_map in enumerate(
        (
            {"encoder": "cpu", "decoder": "disk"},
            {"encoder": "disk", "decoder": "cpu"},
        )
    ):
        offloaded = MiMoAudioTokenizerModel.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / f"offload{number}"
        )
        assert any(parameter.is_meta for parameter in offloaded.parameters())
        assert offloaded.attn_implementation == "sdpa"
        output = offloaded(**inputs)
        assert torch.equal(output.audio_codes, expected.audio_codes)
        assert relative_error(output.audio_values, expected.audio_values) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["base", "no_skip_windowed"])
def test_packed_input_compiles_in_one_graph(name):
    model = load_golden(name)
    mels = [clip["mel"] for clip in expected_clips(name)[:4]]
    layout = model.encoder_layout([mel.shape[1] for mel in mels])
    packed = torch.cat([mel.T for mel in mels])
    expected = model.encode(packed, layout=layout, output_latents=True)
    assert expected.audio_codes.shape == (layout.codes.total, 6)
    compiled = torch.compile(model.encode, fullgraph=True)(packed, layout=layout, output_latents=True)
    assert torch.equal(compiled.audio_codes, expected.audio_codes)
    assert relative_error(compiled.latents, expected.latents) < 1e-5

    decoder_layout = model.decoder_layout(layout.codes.lengths.tolist())
    audio = model.decode(expected.audio_codes, layout=decoder_layout).audio_values
    padded = model.decode(layout.codes.pad(expected.audio_codes).transpose(1, 2), layout.codes.mask.long())
    lengths = padded.audio_lengths.tolist()
    assert torch.equal(audio, torch.cat([row[0, :n] for row, n in zip(padded.audio_values, lengths, strict=True)]))
    compiled = torch.compile(model.decode, fullgraph=True)(expected.audio_codes, layout=decoder_layout)
    assert relative_error(compiled.audio_values, audio) < 1e-5


def test_meta_device_initialization_gives_the_same_distribution(config):
    with torch.device("meta"):
        model = MiMoAudioTokenizerModel(config)
    model.to_empty(device="cpu").init_weights()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    assert torch.equal(model.decoder.vocoder.head.istft.window, torch.hann_window(960))
    assert model.encoder.layers[0].fc1.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)


def test_only_safetensors_are_written(tmp_path):
    load_golden("base").save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


# --- what a strict reviewer found ---


def test_losses_do_not_depend_on_the_batch():
    model = load_golden("base").train()
    model.encoder.quantizer.eval()
    clips = [expected_clips("base")[3]["mel"], expected_clips("base")[7]["mel"]]
    frames = [mel.shape[1] for mel in clips]
    with torch.no_grad():
        alone = [model(mel[None]).reconstruction_loss for mel in clips]
        batched = model(*pad_features(clips)).reconstruction_loss
    expected = sum(loss * n for loss, n in zip(alone, frames, strict=True)) / sum(frames)
    torch.testing.assert_close(batched, expected, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_encoder_past_a_quantizer_in_evaluation_mode(inputs):
    model = load_golden("base").train()
    model.encoder.quantizer.eval()
    before = copy.deepcopy(model.encoder.quantizer.state_dict())
    model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in model.encoder.quantizer.state_dict().items())


def test_half_precision_codebooks_are_not_trained(inputs):
    with pytest.raises(ValueError, match=r"codebooks in torch.bfloat16 cannot be trained"):
        load_golden("base").bfloat16().train()(**inputs)


def test_a_clip_that_is_not_finite_does_not_touch_its_neighbour():
    model = load_golden("base")
    with torch.no_grad():
        model.encoder.quantizer.codebooks[0].embed[0] = float("inf")
        codes = torch.ones(2, 6, 300, dtype=torch.long)
        codes[0] = 0
        audio = model.decode(codes).audio_values
        alone = model.decode(codes[1:]).audio_values
    assert not audio[0].isfinite().all()
    assert relative_error(audio[1], alone[0]) < 1e-5


def test_gradient_is_finite_where_the_magnitude_is_limited(inputs):
    model = load_golden("base")
    torch.nn.init.constant_(model.decoder.vocoder.head.out.bias, 100.0)
    model.decoder.requires_grad_(True)
    output = model.decode(torch.zeros(1, 6, 5, dtype=torch.long)).audio_values
    output.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters() if p.grad is not None)


@torch.no_grad()
def test_the_default_dtype_changes_nothing(inputs):
    model = load_golden("base")
    expected = model(**inputs)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            output = model(**inputs)
        finally:
            torch.set_default_dtype(torch.float32)
        assert output.audio_values.dtype == torch.float32
        assert torch.equal(output.audio_values, expected.audio_values)


def test_a_shared_configuration_leaves_the_choice_of_attention_open(config):
    model = MiMoAudioTokenizerModel(config)
    for other in (MiMoAudioTokenizerModel(model.config), MiMoAudioTokenizerModel(copy.deepcopy(model.config))):
        assert other.config._attn_implementation_is_default
    model.set_attn_implementation("sdpa")
    assert not model.config._attn_implementation_is_default
    assert "_attn_implementation_is_default" not in model.config.to_dict()
    chosen = MiMoAudioTokenizerModel.from_pretrained(GOLDEN / "base", attn_implementation="sdpa")
    assert not chosen.config._attn_implementation_is_default
    reused = MiMoAudioTokenizerModel._from_config(
        copy.deepcopy(load_golden("base").config), attn_implementation="sdpa"
    )
    assert not reused.config._attn_implementation_is_default
    with pytest.raises(ValueError, match="encoder_attention_heads"):
        MiMoAudioTokenizerConfig(hidden_size=97)
    outer = torch.nn.ModuleDict({"tokenizer": load_golden("base")})
    outer["tokenizer"].config._attn_implementation = "eager"
    assert outer["tokenizer"].attn_implementation == "eager"


def test_a_state_dict_is_checked_like_a_file(config):
    state = load_file(GOLDEN / "base" / "model.safetensors")
    del state["encoder.conv1.weight"]
    with pytest.raises(ValueError, match="missing tensor encoder.conv1.weight"):
        MiMoAudioTokenizerModel.from_pretrained(None, config=config, state_dict=state)


def test_encoder_only_configuration_does_not_name_a_decoder():
    config = MiMoAudioTokenizerConfig(d_model=1024, encoder_attention_heads=16, has_decoder=False)
    assert config.decoder_attention_heads == 16


@torch.no_grad()
def test_arrays_and_small_integers_are_taken(inputs):
    model = load_golden("base")
    expected = model(**inputs)
    features = inputs["input_features"].numpy()
    output = model.encode(features, inputs["attention_mask"].tolist())
    assert torch.equal(output.audio_codes, expected.audio_codes)
    decoded = model.decode(expected.audio_codes.to(torch.uint16), expected.audio_codes_mask.bool())
    assert torch.equal(decoded.audio_values, expected.audio_values)


def test_packed_rows_that_are_not_the_layouts():
    model = load_golden("base")
    with pytest.raises(ValueError, match=r"input_features have shape \(70, 128\); accepted: \(30, ...\)"):
        model.encode(torch.zeros(70, 128), layout=model.encoder_layout([30]))
    with pytest.raises(ValueError, match=r"audio_codes have shape \(7, 6\); accepted: \(3, ...\)"):
        model.decode(torch.zeros(7, 6, dtype=torch.long), layout=model.decoder_layout([3]))
    with pytest.raises(ValueError, match="a layout and a mask"):
        model.encode(torch.zeros(30, 128), torch.ones(1, 30), layout=model.encoder_layout([30]))
