"""What several benchmarks share: timing, reports, images, networks, baselines."""
