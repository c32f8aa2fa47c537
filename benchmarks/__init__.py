"""Measurements with floors. `make bench` runs every bench_*.py; each exits non-zero below a floor."""
