"""ddpm_fast inside other projects, under their interfaces."""
