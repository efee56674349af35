"""A stand-in for NVIDIA's cuda-core. It is a regular package here, found before a real one."""
