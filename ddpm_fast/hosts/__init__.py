"""The objects of other code bases, on our schedule and fused step: a module per code base."""
