"""OpenAI's improved- and guided-diffusion: their diffusion object, on our tables and fused step."""

from .diffusion import GaussianDiffusion, SpacedDiffusion, from_openai

__all__ = ["GaussianDiffusion", "SpacedDiffusion", "from_openai"]
