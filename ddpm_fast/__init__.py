"""Fast sampling of pixel-space DDPMs on CPUs and NVIDIA GPUs."""

__version__ = "0.1.0"
