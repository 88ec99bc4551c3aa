"""What `hope bench` prints and draws around the measurements of `hope_kernels.measuring`."""
