NAME = "lucidrains/denoising-diffusion-pytorch"
MARKER = "init_conv.weight"
