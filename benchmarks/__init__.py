"""Timings and measurements, run by hand or by `make bench`; no part of the package."""
