"""The network and the mathematics of generalized diffusion."""
