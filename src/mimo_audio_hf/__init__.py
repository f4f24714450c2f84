"""MiMo-Audio-Tokenizer in the Hugging Face ecosystem.

Importing this package registers the tokenizer's classes with transformers' `AutoConfig`, `AutoModel`,
`AutoModelForAudioTokenization` and `AutoFeatureExtractor`.
"""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

from . import kernels as kernels  # offers its attention backend to the model
from .audio import load_audio, save_audio
from .checkpoints import load_model
from .codes import AudioCodes
from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .dataset import detokenize_audio, tokenize_audio
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .inference import decode_codes, encode_waveforms
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .optimization import optimize_for_inference
from .streaming import StreamingDecoder, StreamingDecoderPool, StreamingEncoder
from .version import __version__


AutoConfig.register(MiMoAudioTokenizerConfig.model_type, MiMoAudioTokenizerConfig)
AutoFeatureExtractor.register(MiMoAudioTokenizerConfig, MiMoAudioTokenizerFeatureExtractor)
AutoModel.register(MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel)
AutoModelForAudioTokenization.register(MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel)

__all__ = [
    "AudioCodes",
    "MiMoAudioTokenizerConfig",
    "MiMoAudioTokenizerFeatureExtractor",
    "MiMoAudioTokenizerModel",
    "StreamingDecoder",
    "StreamingDecoderPool",
    "StreamingEncoder",
    "__version__",
    "decode_codes",
    "detokenize_audio",
    "encode_waveforms",
    "load_audio",
    "load_model",
    "optimize_for_inference",
    "save_audio",
    "tokenize_audio",
]
