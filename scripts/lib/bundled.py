"""Names of the small checkpoint in `models/`, which the pack shows in the host's model lists."""

from .pack import ROOT

MODELS = ROOT / "models"
MODEL = "wan21-tiny-i2v.safetensors"
VAE = "wan21-tiny-vae.safetensors"
TEXT_ENCODER = "wan21-tiny-umt5.safetensors"
LORA = "wan21-tiny-lora.safetensors"
FOUR_STEPS_LORA = "wan21-tiny-four-steps.safetensors"
FILES = {"model_name": MODEL, "text_encoder_name": TEXT_ENCODER, "vae_name": VAE, "lora_name": LORA}
