"""Architecture sizes: what a checkpoint's `config.json` says, and the sizes this project names.

Field names are Hugging Face's. Only sizes live here; how a model is trained is `train/config.py`'s.
"""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self, TypeVar

from model.llama import LlamaConfig
from model.vision import VisionConfig

MODEL_TYPE = "plain_llava"


@dataclass(frozen=True)
class LlavaConfig:
    """A vision tower, a language model, and (implied by both) the projector between them."""

    vision: VisionConfig
    text: LlamaConfig
    chat_template: str = "vicuna_v1"  # the prompt this model is talked to with, one of data.conversation's

    def __post_init__(self) -> None:
        """Raises: ValueError for sizes that do not go together."""
        vision, text = self.vision, self.text
        for fits, problem in (
            (vision.image_size % vision.patch_size == 0, "vision_config: patch_size does not divide image_size"),
            (vision.hidden_size % vision.num_attention_heads == 0, "vision_config: heads do not divide hidden_size"),
            (
                -vision.num_hidden_layers - 1 <= vision.select_layer < 0,
                "vision_config: select_layer is -1 or a layer before",
            ),
            (text.hidden_size % (2 * text.num_attention_heads) == 0, "text_config: heads do not divide hidden_size"),
            (
                text.num_attention_heads % text.num_key_value_heads == 0,
                "text_config: key/value heads do not divide heads",
            ),
            (
                0 <= text.num_padding_rows < text.vocab_size,
                "text_config: num_padding_rows is 0 or a part of vocab_size",
            ),
        ):
            if not fits:
                raise ValueError(f"config.json {problem}")

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        return {
            "model_type": MODEL_TYPE,
            "chat_template": self.chat_template,
            "vision_config": asdict(self.vision),
            "text_config": asdict(self.text),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s form.

        Raises: ValueError for a missing part, or a key or type this architecture does not have.
        """
        if values.get("model_type") != MODEL_TYPE:
            raise ValueError(f"config.json has model_type {values.get('model_type')!r}, expected {MODEL_TYPE!r}")
        for part in ("vision_config", "text_config"):
            if not isinstance(values.get(part), dict):
                raise ValueError(f"config.json has no object '{part}': this is not a plain-llava model folder")
        vision = read_sizes(VisionConfig, values["vision_config"], "vision_config")
        text = read_sizes(LlamaConfig, values["text_config"], "text_config")
        return cls(vision, text, str(values.get("chat_template", cls.chat_template)))


Sizes = TypeVar("Sizes", VisionConfig, LlamaConfig)


def read_sizes(kind: type[Sizes], values: dict[str, Any], part: str) -> Sizes:
    """Make a config of `values`, which are exactly its fields.

    Raises: ValueError for an unknown or missing key, or a value that is no size.
    """
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"config.json {part} has keys this model does not know: {', '.join(unknown)}")
    required = {name for name, field in known.items() if field.default is MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"config.json {part} lacks {', '.join(missing)}")
    for name, value in values.items():
        # JSON may write 10000.0 as 10000; bool is an int to Python and never a size.
        kinds = (int, float) if known[name].type is float else (int,)
        is_positive = name in {"select_layer", "num_padding_rows"} or not isinstance(value, kinds) or value > 0
        if isinstance(value, bool) or not isinstance(value, kinds) or not is_positive:
            wanted = "a number" if known[name].type is float else "a whole number"
            raise ValueError(f"config.json {part}.{name} = {value!r}, expected {wanted} above 0")
    return kind(**values)


VIT_L_14_336 = VisionConfig(
    image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096,
    num_hidden_layers=24, num_attention_heads=16, layer_norm_eps=1e-5, select_layer=-2,
)  # fmt: skip
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
LLAMA_13B = LlamaConfig(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
    num_key_value_heads=40, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip

CONFIGS = {
    "tiny": LlavaConfig(
        vision=VisionConfig(
            image_size=64, patch_size=8, hidden_size=128, intermediate_size=512,
            num_hidden_layers=4, num_attention_heads=4, layer_norm_eps=1e-5, select_layer=-2,
        ),
        text=LlamaConfig(
            vocab_size=768, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=10000.0,
        ),
    ),
    "llava-1.5-7b": LlavaConfig(vision=VIT_L_14_336, text=LLAMA_7B),
    "llava-1.5-13b": LlavaConfig(vision=VIT_L_14_336, text=LLAMA_13B),
}  # fmt: skip
