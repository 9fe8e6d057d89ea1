"""What maintainers run: benchmarks beside what others use, and the torture of what is promised."""
