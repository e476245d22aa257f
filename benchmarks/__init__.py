"""Benchmarks: curvscope's time and memory against a peer and against the floor, as ratios in one process."""
