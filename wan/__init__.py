"""Wan2.1 itself: model, VAE, solvers and options. Imports torch, safetensors, einops and itself only."""
