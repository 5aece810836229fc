"""Numbers: quantization types, fixed-point arithmetic, and the estimation of ranges."""
