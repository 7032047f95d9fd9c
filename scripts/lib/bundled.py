"""Names of the small checkpoint in `models/`, which the pack shows in the host's model lists."""

from .pack import ROOT

MODELS = ROOT / "models"
MODEL = "wan21-tiny-i2v.safetensors"
VAE = "wan21-tiny-vae.safetensors"
TEXT_ENCODER = "wan21-tiny-umt5.safetensors"
COLOUR_LORA = "wan21-tiny-lora.safetensors"  # the colours drain
FOUR_STEPS_LORA = "wan21-tiny-four-steps.safetensors"
# Input of a loader -> its file. All LoRAs in our graphs are distilled to four steps.
FILES = {
    "model_name": MODEL,
    "text_encoder_name": TEXT_ENCODER,
    "vae_name": VAE,
    "lora_name": FOUR_STEPS_LORA,
}
