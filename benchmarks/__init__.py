"""What the kernels cost: proved without a GPU, measured with one. Run from the checkout's root."""
