"""Side-by-side measurements of Hypercell and jupyter_kernel_gateway (README.md here says what each number means)."""
