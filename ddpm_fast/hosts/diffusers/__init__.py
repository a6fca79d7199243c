"""Inside diffusers: its DDPM and DDIM schedulers on the fused step, and its pipelines accelerated.

The classes have diffusers' names, and are its subclasses: the configurations and folders are its.
"""

try:
    import diffusers as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ddpm_fast.hosts.diffusers needs diffusers: pip install 'ddpm_fast[diffusers]'"
    ) from error

from .pipelines import DDIMPipeline, DDPMPipeline, accelerate
from .schedulers import DDIMScheduler, DDPMScheduler

__all__ = ["DDIMPipeline", "DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "accelerate"]
