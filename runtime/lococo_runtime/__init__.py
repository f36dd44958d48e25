"""Runs lococo bundles: numpy and the standard library over our C library."""
